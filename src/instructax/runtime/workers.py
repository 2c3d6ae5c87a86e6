"""Independent work side by side on one machine: each piece in a process of its own, on its own cores.

A small model leaves a second core idle: its operations are too short to be divided. Two processes
with a core each finish two pieces in the time of one. On accelerators one process drives all devices,
and pieces follow each other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess

import jax

from instructax.config import UserError
from instructax.runtime.distributed import are_many
from instructax.runtime.environment import enable_compile_cache
from instructax.runtime.stopping import StopSignal, leaving_on_sigterm

Piece = Callable[[], object]
_POLL_SECONDS = 0.2


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

    A piece must be importable (a module's function, or a functools.partial of one) and leave its
    results in files. SIGTERM and SIGINT are passed on, so that every piece saves and ends. Where
    one fails, the others are stopped in the same way.

    Raises:
      SystemExit: 143 or 130 after a signal; where a piece failed, its exit code.
    """
    if workers == 1 or len(pieces) < 2:
        for piece in pieces:
            piece()
        return
    waiting, shares = deque(pieces), _shares(min(workers, len(pieces)))
    running: dict[SpawnProcess, list[int]] = {}
    failed: int | None = None
    with StopSignal() as stop:
        told = False
        try:
            while running or (waiting and failed is None and stop.signal is None):
                while waiting and shares and failed is None and stop.signal is None:
                    share = shares.pop(0)
                    running[_start(waiting.popleft(), share)] = share
                connection.wait([child.sentinel for child in running], _POLL_SECONDS)
                for child in [child for child in running if child.exitcode is not None]:
                    shares.append(running.pop(child))
                    if child.exitcode and failed is None and stop.signal is None:
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


def _shares(workers: int) -> list[list[int]]:
    """The cores of each worker: all are given away, one may serve several where they are too few."""
    if not hasattr(os, "sched_getaffinity"):
        return [[] for _ in range(workers)]
    cores = sorted(os.sched_getaffinity(0))
    return [cores[i::workers] or [cores[i % len(cores)]] for i in range(workers)]


def _start(piece: Piece, share: list[int]) -> SpawnProcess:
    cache = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_work, args=(piece, share, cache))
    child.start()
    return child


def _work(piece: Piece, share: list[int], cache: str | None) -> None:
    if share:
        # XLA starts a thread for every core that it may use, when devices are first asked for.
        os.sched_setaffinity(0, share)
    if cache:
        enable_compile_cache(cache)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with leaving_on_sigterm():
            piece()
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
