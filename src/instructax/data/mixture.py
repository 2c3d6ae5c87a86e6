"""Rows of several streams in fixed shares; the schedule of the mixture is grain's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from instructax.batches import LmBatch, scored_slots
from instructax.config import UserError
from instructax.data.pipeline import Stream


class _Marker:
    """An endless source whose element i is (source, i): grain's mixture of these is the schedule."""

    def __init__(self, source: int):
        self._source = source

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: Any) -> tuple[int, int]:
        return self._source, int(index)


class MixedStream:
    """Rows of several language-model streams in fixed shares; each stream keeps its own order.

    Of the first n rows, each component has its weight times n to within a row, so shares are exact
    in the long run and every batch has the same shape. An epoch is one of the first component.
    """

    def __init__(self, components: Sequence[tuple[Stream[LmBatch], float]], batch_size: int):
        if not components or any(weight < 0 for _, weight in components):
            raise ValueError("weights of a mixture must not be negative, and one must be positive")
        self._streams = [stream for stream, weight in components if weight > 0]
        weights = [weight for _, weight in components if weight > 0]
        if not self._streams:
            raise ValueError("weights of a mixture must not be negative, and one must be positive")
        self.batch_size = batch_size
        import grain

        markers = [grain.MapDataset.source(_Marker(k)) for k in range(len(weights))]
        self._schedule = grain.MapDataset.mix(markers, weights=weights)

    def _consumed(self, rows: int) -> list[int]:
        """Rows of each component among the first ``rows`` rows of the mixture."""
        seen: dict[int, int] = {}
        row = rows
        while len(seen) < len(self._streams):
            source, index = self._schedule[row]
            seen.setdefault(source, index)
            row += 1
        return [seen[k] for k in range(len(self._streams))]

    def cursors(self, step: int) -> list[int]:
        """Rows taken from each component of positive weight before ``step``."""
        return self._consumed(step * self.batch_size)

    def __call__(self, step: int) -> LmBatch:
        parts = [
            stream.rows(start, stop - start)
            for stream, start, stop in zip(
                self._streams, self.cursors(step), self.cursors(step + 1), strict=True
            )
            if stop > start
        ]
        lengths = sorted({part.weight_BxL.shape[1] for part in parts})
        if len(lengths) > 1:
            raise UserError(f"a mixture needs rows of one length, got {lengths}; set them equal")
        layout, weight_BxL = jax.tree.map(
            lambda *arrays: np.concatenate(arrays), *((p.layout, p.weight_BxL) for p in parts)
        )
        return LmBatch(layout, weight_BxL, scored_slots(weight_BxL))

    @property
    def num_examples(self) -> int:
        return self._streams[0].num_examples

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """As :meth:`Stream.steps_per_epoch`, for the first component."""
        return self._steps_through(epoch + 1) - self._steps_through(epoch)

    def _steps_through(self, epochs: int) -> int:
        rows = self._streams[0].epoch_start(epochs)
        high = 1
        while self.cursors(high)[0] < rows:
            high *= 2
        low = 0
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cursors(middle)[0] >= rows else (middle + 1, high)
        return low


def mix_lm(
    stream_a: Stream[LmBatch], stream_b: Stream[LmBatch], weight_b: float
) -> Stream[LmBatch] | MixedStream:
    """``stream_a`` with a share ``weight_b`` of rows from ``stream_b`` (InstructGPT's RL init: 0.1).

    The batch size is ``stream_a``'s; at 0 the result is ``stream_a`` itself.
    """
    if not 0 <= weight_b < 1:
        raise ValueError(f"weight_b must lie in [0, 1), got {weight_b}")
    if weight_b == 0:
        return stream_a
    return MixedStream([(stream_a, 1 - weight_b), (stream_b, weight_b)], stream_a.batch_size)
