"""Pieces of a run side by side: all are done, one that fails or a signal ends all of them."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from instructax.config import UserError
from instructax.runtime import workers
from instructax.runtime.stopping import StopSignal
from instructax.runtime.workers import Piece

PIECES = """
import functools, pathlib, sys
import test_workers
from instructax.runtime.workers import Piece, side_by_side
if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    calls = [functools.partial(test_workers.until_stopped, folder / str(i)) for i in range(3)]
    side_by_side([Piece(str(i), call) for i, call in enumerate(calls)], 2)
"""


def note(path: Path) -> None:
    """Process and number of cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    path.write_text(f"{os.getpid()} {cores}")


def note_after(path: Path, others: list[Path]) -> None:
    assert all(other.read_text() for other in others)
    note(path)


def refuse() -> None:
    raise UserError("the figure is wrong;\n mend it")


def break_down() -> None:
    raise RuntimeError("broken")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def until_stopped(path: Path) -> None:
    """A stage's loop: goes on until a signal, then saves."""
    with StopSignal() as stop:
        path.with_suffix(".pid").write_text(str(os.getpid()))
        while not stop.requested(0):
            time.sleep(0.02)
    path.with_suffix(".saved").write_text("")
    raise SystemExit(128 + (stop.signal or 0))


def wait_for(paths, seconds=60.0):
    end = time.monotonic() + seconds
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < end, "the workers did not come up"
        time.sleep(0.05)


def pieces(calls, after=()):
    return [Piece(str(i), call, tuple(after)) for i, call in enumerate(calls)]


def test_one_worker_calls_the_pieces_in_order_and_here():
    seen: list[int] = []
    workers.side_by_side(pieces([functools.partial(seen.append, i) for i in range(3)]), 1)
    workers.side_by_side(pieces([functools.partial(seen.append, 3)]), 2)
    assert seen == [0, 1, 2, 3]


def test_pieces_run_in_processes_with_a_share_of_the_cores(tmp_path):
    paths = [tmp_path / str(i) for i in range(3)]
    workers.side_by_side(pieces([functools.partial(note, path) for path in paths]), 2)
    found = [path.read_text().split() for path in paths]
    pids = {int(pid) for pid, _ in found}
    assert len(pids) == 3 and os.getpid() not in pids
    if hasattr(os, "sched_getaffinity"):
        here = len(os.sched_getaffinity(0))
        assert all(1 <= int(cores) <= max(1, -(-here // 2)) for _, cores in found)


def test_a_piece_begins_when_those_it_waits_for_are_done_and_alone_has_all_cores(tmp_path):
    """first -> two side by side -> last."""
    first, left, right, last = (tmp_path / name for name in ("first", "left", "right", "last"))
    workers.side_by_side(
        [
            Piece("first", functools.partial(note, first)),
            Piece("left", functools.partial(note_after, left, [first]), ("first",)),
            Piece("right", functools.partial(note_after, right, [first]), ("first",)),
            Piece("last", functools.partial(note_after, last, [left, right]), ("left", "right")),
        ],
        2,
    )
    if hasattr(os, "sched_getaffinity"):
        here = len(os.sched_getaffinity(0))
        assert first.read_text().split()[1] == last.read_text().split()[1] == str(here)
        if here > 1:
            assert int(left.read_text().split()[1]) < here


def test_a_piece_names_others_before_it():
    def never():
        raise AssertionError

    with pytest.raises(ValueError, match="'1' comes before .*'2'"):
        workers.side_by_side([Piece("1", never, ("2",)), Piece("2", never)], 1)
    with pytest.raises(ValueError, match="'1' twice"):
        workers.side_by_side([Piece("1", never), Piece("1", never)], 2)


def test_shares_give_every_core_away_once():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this platform does not bind processes to cores")
    cores = os.sched_getaffinity(0)
    for count in range(1, len(cores) + 3):
        shares = workers._shares(count)
        assert len(shares) == count and all(shares)
        assert set().union(*shares) == cores
        if count <= len(cores):
            assert sum(map(len, shares)) == len(cores)


@pytest.mark.parametrize(
    ("piece", "code", "said"),
    [
        (refuse, 2, "instructax: the figure is wrong; mend it\n"),
        (break_down, 1, "RuntimeError: broken"),
        (killed, 128 + signal.SIGKILL, "ended by signal 9"),
    ],
)
def test_a_piece_that_fails_stops_the_others(tmp_path, capfd, piece, code, said):
    other = functools.partial(until_stopped, tmp_path / "other")
    never = functools.partial(note, tmp_path / "never")
    with pytest.raises(SystemExit) as left:
        workers.side_by_side(pieces([piece, other, never]), 2)
    assert left.value.code == code
    assert said in capfd.readouterr().err
    # The other one had begun or not; where it had, it saved.
    assert (tmp_path / "other.saved").exists() == (tmp_path / "other.pid").exists()
    assert not (tmp_path / "never").exists()


def start(tmp_path):
    script = tmp_path / "pieces.py"
    script.write_text(PIECES)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    child = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    wait_for([tmp_path / "0.pid", tmp_path / "1.pid"])
    return child


def test_a_signal_is_passed_on_and_nothing_new_begins(tmp_path):
    child = start(tmp_path)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=60) == 128 + signal.SIGTERM
    assert (tmp_path / "0.saved").exists() and (tmp_path / "1.saved").exists()
    assert not (tmp_path / "2.pid").exists()


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    child = start(tmp_path)
    pids = [int((tmp_path / f"{i}.pid").read_text()) for i in (0, 1)]
    child.kill()
    child.wait(timeout=60)
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not list(tmp_path.glob("*.saved"))


def test_workers_are_for_one_process_on_cpu(monkeypatch):
    workers.check(2)
    monkeypatch.setattr(workers.jax, "default_backend", lambda: "gpu")
    workers.check(1)
    with pytest.raises(UserError, match="workers = 2 .* on gpu; set --workers 1"):
        workers.check(2)
    monkeypatch.setattr(workers, "are_many", lambda: True)
    with pytest.raises(UserError, match="of several processes"):
        workers.check(2)
