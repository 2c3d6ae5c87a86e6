"""The end of a run by a signal: who notices it, and where it takes effect.

A training loop finishes its step and saves (:mod:`instructax.runtime.loop`). Everywhere else the run
leaves at once, or, as one of several processes, at the next point that all of them pass: what it was
doing there is done again by the same command, like after a kill.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

from jax.experimental import multihost_utils

from instructax.runtime.distributed import are_many, is_main

# Processes agree on a moment by a number that only grows; steps begin anew with every stage.
_moments = itertools.count(1)
_loops = 0  # how many StopSignals are at work: within them their loop decides


class StopSignal:
    """Within it SIGTERM and SIGINT set a flag instead of ending the program.

    A second SIGINT interrupts at once. With many processes JAX's preemption service, which caught
    the SIGTERM of any of them, makes all see it at the same step.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def requested(self, step: int) -> bool:
        """Whether to stop after ``step``; every process must ask about every step."""
        if are_many() and _all_preempted():
            self.signal = signal.SIGTERM
        return self.signal is not None

    def __enter__(self) -> Self:
        global _loops
        _loops += 1
        # The preemption service of many processes has its own handler of SIGTERM.
        caught = [signal.SIGTERM, signal.SIGINT] if not are_many() else []
        for number in caught:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        global _loops
        _loops -= 1
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Within it, and outside of a StopSignal, SIGTERM ends a lone process as Ctrl-C does: cleanly.

    Raises:
      SystemExit: 143, where the signal came.
    """
    if are_many():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _leave_at_once)
    try:
        yield
    except _Terminated as left:
        leave("between two steps", signal.Signals(left.code - 128))
    finally:
        signal.signal(signal.SIGTERM, previous)


def leave_if_stopped() -> None:
    """A point at which a run of many processes may end; every process must pass it.

    Does nothing for a lone process, which has ended already, and inside of a loop, which saves first.

    Raises:
      SystemExit: 143, where any process has got SIGTERM.
    """
    if are_many() and not _loops and _all_preempted():
        leave("between two steps", signal.SIGTERM)


def leave(where: str, number: signal.Signals) -> None:
    """Raises SystemExit 128 + number; the main process says why."""
    if is_main():
        print(
            f"{where}: stopped by {number.name}, all saved; run the same command again to continue",
            file=sys.stderr,
            flush=True,
        )
    raise SystemExit(128 + number)


class _Terminated(SystemExit):
    code: int


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    raise _Terminated(128 + number)


def _all_preempted() -> bool:
    return bool(multihost_utils.reached_preemption_sync_point(next(_moments)))
