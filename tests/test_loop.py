"""The loop saves when it should, never a state that is not finite, and ends with dignity."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from instructax.config import UserError
from instructax.runtime import environment
from instructax.runtime.loop import run_steps
from instructax.runtime.metrics import MetricsWriter
from instructax.runtime.stopping import StopSignal, leave_if_stopped, leaving_on_sigterm


class Run:
    """run_steps in a folder; ``rows`` and ``saved`` tell what it did, however it ended."""

    def __init__(self, folder):
        self.folder = folder
        self.saved: list[int] = []

    def __call__(self, step, *, start=0, total=6, save_at=lambda done: done % 4 == 0, **more):
        with MetricsWriter(self.folder) as writer, StopSignal() as stop:
            run_steps(
                name="sft",
                start=start,
                total=total,
                step=step,
                save=self.saved.append,
                save_at=save_at,
                writer=writer,
                show=("loss",),
                stop=stop,
                **more,
            )

    @property
    def rows(self) -> list[tuple[int, float]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["loss"]) for row in map(json.loads, lines)]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def loss_of(i):
    return {"loss": jnp.float32(i)}


def test_rows_are_numbered_by_steps_done_and_saves_fall_on_time(run):
    run(loss_of)
    assert run.rows == [(i + 1, i) for i in range(6)]
    assert run.saved == [4, 6]


def test_a_resumed_loop_runs_the_steps_that_are_left(run):
    run(loss_of, start=4)
    assert run.rows == [(5, 4), (6, 5)] and run.saved == [6]


def test_nothing_is_left_to_do(run):
    run(loss_of, start=6)
    assert run.rows == [] and run.saved == []


def test_logging_now_and_then_still_writes_what_is_saved_and_the_last(run):
    run(loss_of, total=7, log_at=lambda done: done % 3 == 0)
    assert [done for done, _ in run.rows] == [3, 4, 6, 7] and run.saved == [4, 7]


def test_metrics_are_fetched_one_step_late(run):
    seen = []

    class Late:
        """A metric that notes when it is fetched."""

        def __init__(self, i):
            self.i = i

        def __array__(self, dtype=None, copy=None):
            seen.append(f"fetch {self.i}")
            return jnp.float32(self.i).__array__()

    def step(i):
        seen.append(f"run {i}")
        return {"loss": Late(i)}

    run(step, total=3, save_at=lambda done: done % 10 == 0)
    assert list(dict.fromkeys(seen)) == [
        "run 0",
        "run 1",
        "fetch 0",
        "run 2",
        "fetch 1",
        "fetch 2",
    ]


@pytest.mark.parametrize("bad", [2, 3])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(run, bad):
    with pytest.raises(UserError, match=f"loss is nan at step {bad + 1}"):
        run(lambda i: {"loss": jnp.float32(jnp.nan if i == bad else 0)})
    assert run.saved == []


def test_the_guard_must_name_a_metric(run):
    with pytest.raises(ValueError, match="guard names 'loss'"):
        run(lambda i: {"nll": 1.0})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_says_how_to_continue_and_leaves(run, capsys, number, code):
    def step(i):
        if i == 1:
            os.kill(os.getpid(), number)
        return loss_of(i)

    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as leave:
        run(step)
    assert leave.value.code == code
    assert run.saved == [2] and run.rows == [(1, 0), (2, 1)]
    said = [line for line in capsys.readouterr().err.splitlines() if "continue" in line]
    assert len(said) == 1 and "after step 2 of 6" in said[0]
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once(run):
    def step(i):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return loss_of(i)

    with pytest.raises(KeyboardInterrupt):
        run(step)
    assert run.saved == []


def test_a_signal_before_the_first_step_runs_and_saves_nothing(run, monkeypatch, capsys):
    """It came while the stage looked at its samples, say, or read a checkpoint."""

    def requested(self, step):
        self.signal = signal.SIGTERM
        return True

    monkeypatch.setattr(StopSignal, "requested", requested)
    with pytest.raises(SystemExit) as leave:
        run(loss_of, start=4)
    assert leave.value.code == 143 and run.saved == [] and run.rows == []
    assert "sft, after step 4 of 6" in capsys.readouterr().err


def test_outside_of_loops_sigterm_ends_a_lone_process_like_an_interrupt(run, capsys):
    before, ended = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as leave, leaving_on_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            ended.append("cleanly")
    assert leave.value.code == 143 and ended and signal.getsignal(signal.SIGTERM) is before
    assert "continue" in capsys.readouterr().err

    def step(i):
        if i == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        leave_if_stopped()
        return loss_of(i)

    with pytest.raises(SystemExit), leaving_on_sigterm():
        run(step)
    assert run.saved == [2], "a loop inside of it saves first"


def test_without_a_terminal_progress_is_plain_lines(run, capsys):
    run(loss_of)
    assert capsys.readouterr().err.splitlines() == ["sft 6/6  loss 5  0 s left"]


def test_environment_is_json_and_names_no_path():
    described = environment.environment()
    assert json.loads(json.dumps(described)) == described
    assert described["packages"]["jax"] == jax.__version__ and described["devices"]["count"] >= 1
    folder = str(Path(environment.__file__).parents[1])
    assert described["instructax"] and len(described["sources"]) == 12
    assert folder not in json.dumps({**described, "argv": []})


def test_the_hash_of_the_sources_is_of_their_contents_and_not_of_their_place(tmp_path, monkeypatch):
    of_here = environment.sources_hash()
    package = tmp_path / "site-packages" / "instructax"
    shutil.copytree(Path(environment.instructax.__file__).parent, package)

    def of_copy() -> str:
        environment.sources_hash.cache_clear()
        return environment.sources_hash()

    monkeypatch.setattr(environment.instructax, "__file__", str(package / "__init__.py"))
    try:
        assert of_copy() == of_here and environment._git_commit() is None
        (package / "masking.py").write_text("# another\n")
        assert of_copy() != of_here
    finally:
        environment.sources_hash.cache_clear()


def test_peak_memory_is_in_bytes():
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert len(held) < environment.peak_rss_bytes() < 64 << 30
