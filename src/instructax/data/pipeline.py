"""Streams: every global batch a pure function of (seed, step), whatever was computed before it.

A stream is an endless row of *units* (a model row, or one prompt), epoch after epoch in new orders,
cut into batches of a fixed size. Batch ``step`` holds units ``step * batch_size`` and on, so a cursor
is one number, the units consumed, and a batch may span two epochs. Shapes never change within a
stream. Orders are grain's, imported where they are used; mixtures are in :mod:`instructax.data.mixture`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

BatchT = TypeVar("BatchT")
Unit = tuple[int, ...]  # indices of the examples that stand together


def derive_seed(seed: int, purpose: str) -> int:
    """An independent seed for each purpose, so that no stream's order depends on another's."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % 2**31


class Units(Protocol):
    """Random access to an endless row of units, and where each epoch begins in it."""

    def __getitem__(self, index: int) -> Unit: ...

    def epoch_start(self, epoch: int) -> int: ...


class SingleUnits:
    """Each example a unit of its own; a new shuffle every epoch, or file order."""

    def __init__(self, size: int, seed: int | None):
        self._size = size
        self._shuffled: Any = None
        if seed is not None:
            import grain

            self._shuffled = grain.MapDataset.range(size).seed(seed).shuffle().repeat()

    def __getitem__(self, index: int) -> Unit:
        if self._shuffled is None:
            return (index % self._size,)
        return (int(self._shuffled[index]),)

    def epoch_start(self, epoch: int) -> int:
        return epoch * self._size


class PlannedUnits:
    """Units made anew for each epoch by ``plan(order_n)``, from the epoch's order of the examples.

    The plan of an epoch depends on (seed, epoch) alone. To find a unit of epoch e the number of
    units in the epochs before it must be known: they are planned once after a restart.
    """

    def __init__(self, size: int, seed: int | None, plan: Callable[[Sequence[int]], list[Unit]]):
        self._singles = SingleUnits(size, seed)
        self._size, self._seed, self._plan = size, seed, plan
        self._starts = [0]
        self._lock = threading.Lock()
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> list[Unit]:
        first = epoch * self._size
        units = self._plan([self._singles[first + i][0] for i in range(self._size)])
        if self._seed is None or len(units) == 1:
            return units
        # Packing leaves its thinnest rows for the end; an epoch should not end on them.
        shuffled = SingleUnits(len(units), derive_seed(self._seed, f"units/{epoch}"))
        return [units[shuffled[i][0]] for i in range(len(units))]

    def epoch_start(self, epoch: int) -> int:
        with self._lock:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
            return self._starts[epoch]

    def __getitem__(self, index: int) -> Unit:
        epoch = max(0, int(np.searchsorted(self._starts, index, side="right")) - 1)
        while self.epoch_start(epoch + 1) <= index:
            epoch += 1
        return self._epoch(epoch)[index - self.epoch_start(epoch)]


class Stream(Generic[BatchT]):
    """``stream(step)`` is batch ``step``: pure, random access, constant shapes.

    ``assemble(units, size, first)`` builds a batch of ``size`` units from at most as many; ``first``
    is the number of the first unit in the stream. ``record_index_n`` leads from examples back to the
    records they were made from. A step takes ``units_per_step`` units (1 where a unit is a batch).
    """

    def __init__(
        self,
        *,
        units: Units,
        ordered: Callable[[], list[Unit]],
        assemble: Callable[[Sequence[Unit], int, int], BatchT],
        record_index_n: np.ndarray,
        batch_size: int,
        units_per_step: int | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self._per_step = batch_size if units_per_step is None else units_per_step
        self._units, self._ordered, self._assemble = units, ordered, assemble
        self._record_index_n = record_index_n

    def __call__(self, step: int) -> BatchT:
        return self.rows(step * self._per_step, self._per_step)

    def rows(self, start: int, count: int) -> BatchT:
        """A batch of the ``count`` units from unit ``start`` on."""
        if start < 0:
            raise ValueError(f"units are counted from 0, got {start}")
        return self._assemble([self._units[start + i] for i in range(count)], count, start)

    def record_indices(self, step: int) -> np.ndarray:
        """Indices of the records behind batch ``step``, in the order in which it holds them."""
        start = step * self._per_step
        members = [i for u in range(start, start + self._per_step) for i in self._units[u]]
        return self._record_index_n[members]

    @property
    def num_examples(self) -> int:
        return len(self._record_index_n)

    def epoch_start(self, epoch: int) -> int:
        """Units in the epochs before ``epoch``."""
        return self._units.epoch_start(epoch)

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Steps after which every example of ``epoch`` has been seen, counted from the epoch before.

        Their sum over epochs 0..e is the step at which epoch e is complete.
        """
        return self._steps_through(epoch + 1) - self._steps_through(epoch)

    def _steps_through(self, epochs: int) -> int:
        return -(-self._units.epoch_start(epochs) // self._per_step)

    def in_order(self, batch_size: int | None = None) -> InOrder[BatchT]:
        """Every example once, in the order of the records; the last batch is filled with padding."""
        units_per_batch = self._per_step
        if batch_size is not None:
            if self._per_step != self.batch_size:
                raise ValueError("the units of this stream are whole batches: leave batch_size out")
            units_per_batch = batch_size
        return InOrder(self._ordered(), units_per_batch, self._assemble, self._record_index_n)


class InOrder(Generic[BatchT]):
    """The finite counterpart of a stream, for evaluation; padding has weight 0 or valid False."""

    def __init__(
        self,
        units: list[Unit],
        units_per_batch: int,
        assemble: Callable[[Sequence[Unit], int, int], BatchT],
        record_index_n: np.ndarray,
    ):
        self._units, self._per_batch, self._assemble = units, units_per_batch, assemble
        self._record_index_n = record_index_n

    def __len__(self) -> int:
        return math.ceil(len(self._units) / self._per_batch)

    def _slice(self, i: int) -> list[Unit]:
        if not 0 <= i < len(self):
            raise IndexError(f"batch {i} of {len(self)}")
        return self._units[i * self._per_batch : (i + 1) * self._per_batch]

    def __getitem__(self, i: int) -> BatchT:
        return self._assemble(self._slice(i), self._per_batch, i * self._per_batch)

    def __iter__(self) -> Iterator[BatchT]:
        return (self[i] for i in range(len(self)))

    def record_indices(self, i: int) -> np.ndarray:
        """Records behind batch ``i``, in its order; padding rows have none and come last."""
        return self._record_index_n[[j for unit in self._slice(i) for j in unit]]


def prefetch(
    stream: Callable[[int], BatchT], start: int, stop: int | None = None, depth: int = 2
) -> Generator[BatchT, None, None]:
    """Batches ``start``, ``start + 1``, ... made by a thread up to ``depth`` steps ahead.

    An error in the stream is raised here, at its own step. Closing the generator ends the thread.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    ready: queue.Queue[tuple[BatchT | None, BaseException | None]] = queue.Queue(depth)
    closed = threading.Event()

    def offer(item: tuple[BatchT | None, BaseException | None]) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        step = start
        try:
            while not closed.is_set() and (stop is None or step < stop):
                offer((stream(step), None))
                step += 1
        except BaseException as error:  # noqa: BLE001  the reader must see it, not wait for ever
            return offer((None, error))
        offer((None, None))

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        closed.set()
        thread.join()
