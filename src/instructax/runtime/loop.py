"""The loop around any step function: progress, metrics, checkpoints, a dignified end."""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from instructax.config import UserError
from instructax.runtime.distributed import is_main
from instructax.runtime.metrics import MetricsWriter, scalars
from instructax.runtime.stopping import StopSignal, leave

_PLAIN_SECONDS = 10.0


def run_steps(
    *,
    name: str,
    start: int,
    total: int,
    step: Callable[[int], Mapping[str, Any]],
    save: Callable[[int], None],
    save_at: Callable[[int], bool],
    writer: MetricsWriter,
    show: tuple[str, ...],
    stop: StopSignal,
    log_at: Callable[[int], bool] = lambda done: True,
    guard: tuple[str, ...] = ("loss",),
) -> None:
    """Run steps ``start`` to ``total - 1``; a row or a checkpoint is numbered by the steps done.

    The metrics of a step are fetched while the next one runs, so that the device never waits for
    the host. Where ``save_at(done)``, at the end and on SIGTERM or SIGINT, ``save(done)``
    is called, never with a state whose guarded metrics are not finite.

    Args:
      name: what the progress bar and the messages call the stage.
      step: ``step(i) -> metrics``, scalars on host or device.
      show: the metrics beside the bar.
      log_at: after which steps a row is fetched and written; a step that is saved always has one.
      guard: metrics that must be finite in every fetched row.

    Raises:
      UserError: a guarded metric is not finite.
      SystemExit: 143 after SIGTERM, 130 after SIGINT, the state being saved; without a step where
        the signal came before the first.
    """
    if stop.requested(start):
        _leave(name, start, total, stop)
    pending: tuple[int, Mapping[str, Any]] | None = None
    with _progress(name, start, total, show) as display:

        def flush() -> None:
            nonlocal pending
            if pending is None:
                return
            done, metrics = pending
            pending = None
            row = scalars(metrics)
            writer.write(done, row)
            _check_finite(name, done, row, guard)
            display.update(done, row)

        for i in range(start, total):
            metrics = step(i)
            flush()
            done = i + 1
            stopping = stop.requested(done) and done < total
            saving = stopping or save_at(done) or done == total
            # What is saved must have been checked, so a checkpoint waits for its own step.
            if saving or log_at(done):
                pending = (done, metrics)
            if saving:
                flush()
                save(done)
            if stopping:
                break
    if stop.signal is not None:
        _leave(name, done if start < total else start, total, stop)


def _leave(name: str, done: int, total: int, stop: StopSignal) -> None:
    assert stop.signal is not None
    leave(f"{name}, after step {done} of {total}", stop.signal)


def _check_finite(name: str, done: int, row: Mapping[str, float], guard: tuple[str, ...]) -> None:
    for key in guard:
        if key not in row:
            raise ValueError(f"guard names {key!r}, but the step's metrics are {sorted(row)}")
        if not math.isfinite(row[key]):
            raise UserError(
                f"{name}: {key} is {row[key]} at step {done}; lower the learning rate or clip the "
                "gradient (max_grad_norm), then run again: it continues from the last checkpoint"
            )


def _progress(name: str, start: int, total: int, show: tuple[str, ...]) -> _Silent:
    if not is_main():
        return _Silent()
    console = Console(stderr=True)
    # The bars of processes side by side would overwrite each other.
    if console.is_terminal and multiprocessing.parent_process() is None:
        return _Bar(console, name, start, total, show)
    return _Lines(name, start, total, show)


def _shown(row: Mapping[str, float], show: tuple[str, ...]) -> str:
    return "  ".join(f"{key} {row[key]:.4g}" for key in show if key in row)


class _Silent:
    """The display of a process that shows nothing; the others derive from it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, done: int, row: Mapping[str, float]) -> None:
        pass


class _Bar(_Silent):
    def __init__(self, console: Console, name: str, start: int, total: int, show: tuple[str, ...]):
        self._show = show
        self._rich = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=console,
        )
        self._task = self._rich.add_task(name, total=total, completed=start, shown="")

    def __enter__(self) -> Self:
        self._rich.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._rich.stop()

    def update(self, done: int, row: Mapping[str, float]) -> None:
        self._rich.update(self._task, completed=done, shown=_shown(row, self._show))


class _Lines(_Silent):
    """Where nobody watches a terminal: a line every ten seconds, and the last one."""

    def __init__(self, name: str, start: int, total: int, show: tuple[str, ...]):
        self._name, self._start, self._total, self._show = name, start, total, show
        self._began = self._last = time.monotonic()

    def update(self, done: int, row: Mapping[str, float]) -> None:
        now = time.monotonic()
        if done < self._total and now - self._last < _PLAIN_SECONDS:
            return
        self._last = now
        left = (now - self._began) / (done - self._start) * (self._total - done)
        print(
            f"{self._name} {done}/{self._total}  {_shown(row, self._show)}  {left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
