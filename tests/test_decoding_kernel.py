"""The decoding kernel: what it computes, which blocks it leaves out, where it is taken, and that it compiles for TPUs."""

from __future__ import annotations

import functools

import apart
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax.config import MeshConfig
from instructax.models import decoding_kernel
from instructax.models.stored import look, store
from instructax.runtime.mesh import make_mesh

ROWS, GROUPS, SLOTS, WIDTH = 4, 4, 256, 128
RANGES = ((0, 256), (0, 100), (130, 131), (60, 200))


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (ROWS, 1, 2 * GROUPS, WIDTH))
    return q, *(jax.random.normal(key, (ROWS, GROUPS, SLOTS, WIDTH)) for key in keys[1:])


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(decoding_kernel, "BLOCK", 1)  # of 128 slots: two in these caches


def seen() -> jax.Array:
    slot = np.arange(SLOTS)
    mask = np.stack([(first <= slot) & (slot < end) for first, end in RANGES])
    mask[0, 5:140:3] = False
    return jnp.asarray(mask)


def taken(monkeypatch) -> None:
    """The path of the platform, on this one."""
    monkeypatch.setattr(decoding_kernel, "platform", lambda: "tpu")
    interpreted = functools.partial(decoding_kernel.cached_attention, interpret=True)
    monkeypatch.setattr(decoding_kernel, "cached_attention", interpreted)


@pytest.mark.laws
@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("joined", [1, 2])
def test_a_look_by_the_kernel_is_the_same_look(dtype, joined, inputs, monkeypatch, small_blocks):
    q, k, v = inputs
    key, value = (store(x, dtype, joined) for x in (k, v))
    wanted = look(q, key, value, seen()[:, None])
    taken(monkeypatch)
    found = look(q, key, value, seen()[:, None])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # Able to fail: one slot more is another function.
    other = look(q, key, value, seen().at[2, 132].set(True)[:, None])
    assert np.abs(np.asarray(other - found)).max(axis=(1, 2, 3))[2] > 1e-2


@pytest.mark.laws
def test_a_reach_of_few_slots_in_three_runs(inputs, small_blocks):
    """A prompt's last slots, and a ring's last and first: every block of them, and no more steps than they need."""
    q, *_ = inputs
    keys, slots, reach = jax.random.split(jax.random.key(3)), 1280, 100
    k, v = (jax.random.normal(key, (ROWS, GROUPS, slots, WIDTH)) for key in keys)
    slot = np.arange(slots)
    runs = (
        ((100, 140), (1250, 1280), (245, 265)),
        ((380, 480),),
        ((640, 641),),
        ((0, 60), (700, 740)),
    )
    mask = np.stack([sum((a <= slot) & (slot < b) for a, b in row) > 0 for row in runs])
    assert mask.sum(axis=1).max() <= reach
    found = decoding_kernel.cached_attention(
        q.reshape(ROWS, GROUPS, 2, WIDTH), k, v, jnp.asarray(mask), reach, interpret=True
    )
    wanted = look(q, store(k, None), store(v, None), jnp.asarray(mask)[:, None])
    np.testing.assert_allclose(found.reshape(q.shape), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.laws
def test_blocks_that_a_row_does_not_see_are_not_read(inputs, small_blocks):
    q, k, v = inputs
    q = q.reshape(ROWS, GROUPS, 2, WIDTH)
    mask = jnp.asarray(np.arange(SLOTS)[None] < np.asarray([256, 100, 128, 7])[:, None])
    look_at = functools.partial(decoding_kernel.cached_attention, interpret=True)
    plain = look_at(q, k, v, mask)
    # What is read, even with weight 0, makes nan of the sum.
    spoilt = (x.at[1:, :, 128:].set(jnp.nan) for x in (k, v))
    found = look_at(q, *spoilt, mask)
    np.testing.assert_array_equal(found, plain)
    beside = look_at(q, *(x.at[1, :, 100:].set(jnp.nan) for x in (k, v)), mask)
    assert np.isnan(np.asarray(beside[1])).all(), "its last block is read whole"


def test_every_device_takes_its_own_rows_and_heads(inputs):
    """On a mesh of one device, the wrapping alone."""
    q, k, v = inputs
    q = q.reshape(ROWS, GROUPS, 2, WIDTH)
    look_at = functools.partial(decoding_kernel.cached_attention, interpret=True)
    plain = look_at(q, k, v, seen())
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        wrapped = jax.jit(lambda *x: look_at(*x))(q, k, v, seen())
    np.testing.assert_allclose(wrapped, plain, rtol=1e-6, atol=1e-6)


def test_a_block_fills_its_place_and_divides_the_slots():
    of = (2048, 1024, 2048), (2048, 128, 2048), (768, 1024, 768), (2048, 1024, 256), (100, 128, 100)
    assert [decoding_kernel.block(*x) for x in of] == [256, 1024, 256, 128, 0]
    assert decoding_kernel.block(2048, 8192, 2048) == 128, "no block is smaller"


def test_the_kernel_serves_where_its_platform_and_shapes_are(monkeypatch):
    serves = decoding_kernel.serves
    assert not serves(4, 4, 256, 128)
    monkeypatch.setattr(decoding_kernel, "platform", lambda: "tpu")
    assert serves(4, 4, 256, 128) and not serves(4, 4, 256, 64) and not serves(4, 4, 200, 128)
    mesh = jax.sharding.AbstractMesh((1, 2, 4), ("data", "fsdp", "model"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert serves(4, 4, 256, 128)
        assert not serves(3, 4, 256, 128) and not serves(4, 2, 256, 128)


COMPILED = """
import dataclasses, functools
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from instructax.config import ModelConfig
from instructax.models import functional as model
from instructax.plan import hlo, topology
from instructax.batches import PromptBatch
from instructax.steps.rollout import sample_responses
from instructax.runtime.mesh import abstract_sharded
devices = topology.devices("v5p:2x2x1")
mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3, devices=devices)
at = NamedSharding(mesh, P(("data", "fsdp")))
key_type = jax.eval_shape(lambda: jax.random.key(0)).dtype
for heads, width, cache_dtype in ((16, 64, None), (4, 128, "int8")):
    config = ModelConfig(num_layers=2, d_model=heads * width, num_heads=heads, d_ff=512, vocab_size=512,
                         context_length=512, compute_dtype="bfloat16", attention_pattern=("dense", "banded"),
                         band_width=100)
    listed = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct((4, *shape), dtype, sharding=at)
    prompts = PromptBatch(listed(256), listed(256, dtype=bool), listed())
    sample = functools.partial(sample_responses, model_config=config, response_length=256, temperature=1.0,
                               eos_id=1, pad_id=0, cache_dtype=cache_dtype)
    with jax.set_mesh(mesh):
        params = abstract_sharded(mesh, lambda: model.init(jax.random.key(0), config, "lm"))
        key = jax.ShapeDtypeStruct((), key_type, sharding=NamedSharding(mesh, P()))
        text = jax.jit(sample).lower(params, key, prompts).compile().as_text()
    module = hlo.parse(text)
    found = [i for c in module.computations.values() for i in c.instructions.values() if hlo.is_cache_look(i)]
    assert len(found) == 2, len(found)
print("passed")
"""


@pytest.mark.slow
def test_a_sampler_compiles_with_the_kernel_for_tpus():
    apart.needs_libtpu()
    apart.passes(COMPILED)
