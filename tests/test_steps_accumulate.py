"""Microbatches: which rows they hold, what they sum, and that a mesh changes neither."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import apart
import jax
import numpy as np
import pytest
import tiny

from instructax.steps.accumulate import gradient, join_rows, measure, outputs_of, split_rows
from instructax.steps.sft import lm_objective

ROOT = Path(__file__).parent.parent


def test_rows_are_dealt_out_and_come_back():
    batch = {"a": np.arange(24).reshape(12, 2), "b": np.arange(12)}
    parts = split_rows(batch, 3)
    np.testing.assert_array_equal(parts["b"], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]])
    assert parts["a"].shape == (3, 4, 2)
    tiny.assert_equal(join_rows(parts), batch)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="7 rows is not divided by 2 microbatches"):
        split_rows(np.zeros((7, 3)), 2)


def test_outputs_are_of_their_own_rows_and_measured_without_a_gradient():
    objective = lm_objective(tiny.MODEL)

    @jax.jit
    def found(params, batch):
        both = [(outputs_of(objective.network, params, batch, n),
                 measure(objective, params, batch, n)) for n in (1, 4)]  # fmt: skip
        return both, gradient(objective, params, batch, 4)[1]

    (whole, parts), metrics = found(tiny.params(), tiny.text(8, 6))
    tiny.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    tiny.assert_close(metrics, whole[1], rtol=1e-5)


def test_each_microbatch_draws_its_own_dropout():
    """Equal rows in different microbatches; the same draw would give them equal outputs."""
    objective = lm_objective(dataclasses.replace(tiny.MODEL, dropout=0.5))

    def shown(outputs, batch, normalizer):
        loss, metrics = objective.loss(outputs, batch, normalizer)
        return loss, metrics | {"logp": outputs}

    showing = dataclasses.replace(objective, loss=shown)
    batch = tiny.rows_of(tiny.text(1, 6), [0, 0])

    @jax.jit
    def logp(key):
        return gradient(showing, tiny.params(), batch, 2, key)[1]["logp"]

    first, second = logp(jax.random.key(0))
    assert np.abs(first - second).max() > 1e-2
    np.testing.assert_array_equal(logp(jax.random.key(0)), [first, second])
    assert np.abs(logp(jax.random.key(1))[0] - first).max() > 1e-2
    first, second = logp(None)
    np.testing.assert_allclose(first, second, atol=1e-6)


MESH = """
import functools
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
import re
import numpy as np
import on_mesh
import tiny
from jax.sharding import PartitionSpec
from instructax.batches import LmBatch
from instructax.runtime import mesh
from instructax.steps.accumulate import gradient, split_rows
from instructax.steps.sft import lm_objective

text, rng = tiny.text(16, 12), np.random.default_rng(0)
# From all of its tokens to none, so that microbatches and devices have very different counts.
weight = text.weight_BxL * (rng.random((16, 12)) < np.linspace(1, 0, 16)[:, None] ** 2)
host = LmBatch(jax.device_get(text.layout), weight.astype("f4"))
seen = []
for shape, parts in (((1, 1, 1), 1), ((4, 1, 1), 4), ((1, 2, 2), 2)):
    run = on_mesh.open_run(shape)
    with jax.set_mesh(run.mesh):
        batch = mesh.put_batch(run.mesh, host)
        params = mesh.init_sharded(
            run.mesh, lambda: on_mesh.model.init(jax.random.key(3), on_mesh.MODEL, "lm")
        )
        of = functools.partial(gradient, lm_objective(on_mesh.MODEL), microbatches=parts)
        seen.append(jax.device_get(jax.jit(of)(params, batch)))
        split = jax.jit(functools.partial(split_rows, parts=parts)).lower(batch).compile()
        moves = re.findall("all-gather|all-to-all|collective-permute|all-reduce", split.as_text())
        assert not moves, moves
for other in seen[1:]:
    tiny.assert_close(other, seen[0], rtol=1e-5, atol=1e-6)
assert max(np.abs(x).max() for x in jax.tree.leaves(seen[0][0])) > 1e-2
print("passed")
"""


@pytest.mark.laws
def test_microbatches_on_a_mesh_are_the_full_batch_and_move_no_rows():
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-processes"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    apart.passes(MESH, **cache)
