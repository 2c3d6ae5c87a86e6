"""Pieces of work that wait for each other, side by side on one machine: each in a process of its own.

A small model leaves a second core idle: its operations are too short to be divided. Two processes
with a core each finish two pieces in the time of one. On accelerators one process drives all devices,
and pieces follow each other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import SpawnProcess

import jax

from instructax.config import UserError
from instructax.runtime.distributed import are_many
from instructax.runtime.environment import enable_compile_cache
from instructax.runtime.stopping import StopSignal, leaving_on_sigterm

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Piece:
    """``call()``, once the pieces named in ``after`` are done.

    What is called must be importable (a module's function, or a functools.partial of one) and leave
    its results in files.
    """

    name: str
    call: Callable[[], object]
    after: tuple[str, ...] = ()


def check(workers: int) -> None:
    """Raises UserError where ``workers`` processes cannot work side by side."""
    if workers > 1 and (are_many() or jax.default_backend() != "cpu"):
        where = "of several processes" if are_many() else f"on {jax.default_backend()}"
        raise UserError(
            f"workers = {workers} is for a single process on CPU, but this run is {where}; "
            "set --workers 1 and spread it by --mesh"
        )


def side_by_side(pieces: Sequence[Piece], workers: int) -> None:
    """Call every piece; with ``workers`` above 1, at most so many at a time, in processes.

    Of those that may begin, the first given goes first. SIGTERM and SIGINT are passed on, so that
    every piece saves and ends. Where one fails, the others are stopped in the same way.

    Raises:
      SystemExit: 143 or 130 after a signal; where a piece failed, its exit code.
      ValueError: ``pieces`` has a name twice, or a piece comes before one that it waits for.
    """
    _check_order(pieces)
    if workers == 1 or len(pieces) < 2:
        for piece in pieces:
            piece.call()
        return
    waiting, finished = list(pieces), set[str]()
    shares = _shares(min(workers, len(pieces)))
    running: dict[SpawnProcess, tuple[str, list[int]]] = {}
    failed: int | None = None
    with StopSignal() as stop:
        told = False
        try:
            while running or (waiting and failed is None and stop.signal is None):
                while shares and failed is None and stop.signal is None:
                    ready = [piece for piece in waiting if finished.issuperset(piece.after)]
                    if not ready:
                        break
                    # Who is alone, and so will be until it is done, has all cores.
                    alone = len(ready) == 1 and not running
                    cores = {core for share in (shares if alone else shares[:1]) for core in share}
                    waiting.remove(ready[0])
                    running[_start(ready[0], cores)] = (ready[0].name, shares.pop(0))
                connection.wait([child.sentinel for child in running], _POLL_SECONDS)
                for child in [child for child in running if child.exitcode is not None]:
                    name, share = running.pop(child)
                    shares.append(share)
                    if not child.exitcode:
                        finished.add(name)
                    elif failed is None and stop.signal is None:
                        failed = _exit_code(child)
                if not told and (failed is not None or stop.signal is not None):
                    told = True
                    for child in running:
                        child.terminate()
        finally:
            for child in running:
                child.terminate()
                child.join()
    if stop.signal is not None:
        raise SystemExit(128 + stop.signal)
    if failed is not None:
        raise SystemExit(failed)


def _check_order(pieces: Sequence[Piece]) -> None:
    known: set[str] = set()
    for piece in pieces:
        if piece.name in known:
            raise ValueError(f"pieces has {piece.name!r} twice")
        if missing := set(piece.after) - known:
            raise ValueError(
                f"piece {piece.name!r} comes before {sorted(missing)}, which it waits for"
            )
        known.add(piece.name)


def _shares(workers: int) -> list[list[int]]:
    """The cores of each worker: all are given away, one may serve several where they are too few."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::workers] or [cores[i % len(cores)]] for i in range(workers)]


def _start(piece: Piece, cores: set[int]) -> SpawnProcess:
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_work, args=(piece, cores, cache))
    child.start()
    return child


def _work(piece: Piece, cores: set[int], cache: str | None) -> None:
    if cores:
        # XLA starts a thread for every core that it may use, when devices are first asked for.
        os.sched_setaffinity(0, cores)
    if cache:
        enable_compile_cache(cache)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with leaving_on_sigterm():
            piece.call()
    except UserError as error:
        print(error.line(), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _end_with_parent() -> None:
    """A run that is killed and started again must not meet its own workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _exit_code(child: SpawnProcess) -> int:
    code = child.exitcode or 0
    if code < 0:
        print(
            f"instructax: a worker was ended by signal {-code}; if memory ran out, set --workers 1. "
            "The same command continues",
            file=sys.stderr,
        )
        return 128 - code
    return code
