"""Streams: pure in (seed, step), whole epochs, prefetching that changes nothing."""

from __future__ import annotations

import itertools
import threading
import time

import jax
import numpy as np
import pytest
from streams import equal, lm_stream

from instructax.config import UserError
from instructax.data.pipeline import (
    PlannedUnits,
    SingleUnits,
    derive_seed,
    prefetch,
)

pytest.importorskip("grain")


@pytest.mark.parametrize(
    "make", [lm_stream, lambda **k: lm_stream(packed=True, row_length=16, **k)]
)
def test_a_batch_depends_on_seed_and_step_alone(make):
    stream = make()
    forward = [stream(g) for g in range(9)]
    restarted = make()
    for g in (8, 3, 0, 7, 7):
        assert equal(restarted(g), forward[g])
        assert equal(stream(g), forward[g])
    assert not equal(make(seed=1)(0), forward[0])
    shapes = {tuple(x.shape for x in jax.tree.leaves(batch)) for batch in forward}
    assert len(shapes) == 1


def test_each_epoch_is_a_new_whole_shuffle():
    units = SingleUnits(50, seed=3)
    epochs = [[units[50 * e + i][0] for i in range(50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))
    assert [SingleUnits(3, None)[i] for i in range(5)] == [(0,), (1,), (2,), (0,), (1,)]


def test_planned_units_plan_each_epoch_alone():
    def pairs(order):
        # A number of units that differs between epochs, as packing's may.
        step = 2 if order[0] % 2 else 3
        return [tuple(order[i : i + step]) for i in range(0, len(order), step)]

    units = PlannedUnits(12, 5, pairs)
    starts = [units.epoch_start(e) for e in range(6)]
    assert len(set(np.diff(starts))) == 2
    flat = [units[i] for i in range(starts[-1])]
    for a, b in itertools.pairwise(starts):
        assert sorted(i for unit in flat[a:b] for i in unit) == list(range(12))
    assert PlannedUnits(12, 5, pairs)[starts[4] + 1] == flat[starts[4] + 1]
    assert PlannedUnits(1, 5, pairs)[2] == (0,)


def test_steps_per_epoch_cover_every_example():
    stream = lm_stream(count=13, batch_size=5)
    assert [stream.steps_per_epoch(e) for e in range(5)] == [3, 3, 2, 3, 2]
    seen = np.concatenate([stream.record_indices(g) for g in range(3)])
    assert set(seen.tolist()) == set(range(13)) and len(seen) == 15
    assert stream.num_examples == 13


def test_a_batch_larger_than_the_data_spans_epochs():
    stream = lm_stream(count=3, batch_size=7)
    assert np.bincount(stream.record_indices(0)).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_in_order_is_every_example_once():
    stream = lm_stream(count=13, batch_size=5)
    batches = stream.in_order(4)
    assert len(batches) == len(list(batches)) == 4
    records = np.concatenate([batches.record_indices(i) for i in range(4)])
    assert records.tolist() == list(range(13))
    last = batches[3]
    assert last.weight_BxL.shape == (4, 8)
    assert last.weight_BxL[0].sum() == 3 and last.weight_BxL[1:].sum() == 0
    assert not last.layout.segment_BxL[1:].any()
    with pytest.raises(IndexError):
        batches[4]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="batch_size"):
        lm_stream(batch_size=0)
    with pytest.raises(ValueError, match="counted from 0"):
        lm_stream()(-1)
    with pytest.raises(ValueError, match="depth"):
        next(prefetch(lm_stream(), 0, depth=0))


def test_purposes_have_independent_seeds():
    seeds = {derive_seed(s, p) for s in range(20) for p in ("prompts", "pretraining")}
    assert len(seeds) == 40
    assert derive_seed(1, "prompts") == derive_seed(1, "prompts")


def test_prefetch_yields_the_same_batches_and_ends():
    stream = lm_stream()
    assert all(equal(a, stream(g)) for g, a in zip(range(3, 9), prefetch(stream, 3), strict=False))
    assert len(list(prefetch(stream, 2, stop=6, depth=3))) == 4


def test_prefetch_raises_the_streams_error_at_its_step():
    def stream(step):
        if step == 2:
            raise UserError("broken at 2")
        return step + 10

    batches = prefetch(stream, 0)
    assert [next(batches), next(batches)] == [10, 11]
    with pytest.raises(UserError, match="broken at 2"):
        next(batches)


def test_prefetch_stays_within_its_depth_and_leaves_no_thread():
    made = []
    batches = prefetch(lambda step: made.append(step) or step, 0, depth=2)
    assert next(batches) == 0
    time.sleep(0.2)
    assert len(made) <= 4
    batches.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
