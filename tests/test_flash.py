"""The flash kernel path: what it computes, where it is taken, and that it compiles for its platform."""

from __future__ import annotations

import apart
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax.batches import Layout, padded_layout
from instructax.config import MeshConfig
from instructax.models import attention as attention_lib
from instructax.models import flash
from instructax.partitioning import platform
from instructax.runtime.mesh import make_mesh

ROWS, LENGTH, HEADS, GROUPS, WIDTH = 2, 384, 4, 2, 128


def packed() -> Layout:
    """Documents of several lengths, one longer than a block, padding behind and before."""
    segment = np.zeros((ROWS, LENGTH), np.int32)
    segment[0, :200], segment[0, 200:230], segment[0, 230:] = 1, 2, 3
    segment[1, 100:150], segment[1, 150:300] = 1, 2
    position = np.zeros_like(segment)
    for row, seg in zip(position, segment, strict=True):
        for i in range(1, seg.max() + 1):
            row[seg == i] = np.arange((seg == i).sum())
    zero = np.zeros_like(segment)
    return Layout(*map(jnp.asarray, (zero, position, segment, zero)), prefixed=False)


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (ROWS, LENGTH, HEADS, WIDTH))
    k, v = (jax.random.normal(key, (ROWS, LENGTH, GROUPS, WIDTH)) for key in keys[1:3])
    return q, k, v, jax.random.normal(keys[3], q.shape)


@pytest.mark.laws
@pytest.mark.parametrize("band", [None, 70])
def test_the_kernel_has_the_values_and_gradients_of_the_mask(band, inputs):
    q, k, v, weight = inputs
    layout = packed()
    mask = attention_lib.visible(layout, band)

    def dense(q, k, v):
        return attention_lib.attention(
            q, attention_lib.heads_first(k), attention_lib.heads_first(v), mask
        )

    def kernel(q, k, v):
        return flash.flash_attention(q, k, v, layout.segment_BxL, band, interpret=True)

    def total(attend):
        out = attend(q, k, v)
        return out, jax.grad(lambda *x: (attend(*x) * weight).sum(), (0, 1, 2))(q, k, v)

    wanted, found = total(dense), total(kernel)
    assert not np.asarray(found[0][1, 300:]).any(), "padding"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, wanted)
    # Able to fail: with another band it is another function.
    other = attention_lib.attention(
        q,
        attention_lib.heads_first(k),
        attention_lib.heads_first(v),
        attention_lib.visible(layout, 69 if band else 100),
    )
    assert np.abs(np.asarray(other - found[0])).max() > 1e-2


def test_every_device_takes_its_own_rows_and_heads(inputs):
    """On a mesh of one device, the wrapping alone."""
    q, k, v, _ = inputs
    segment = packed().segment_BxL
    plain = flash.flash_attention(q, k, v, segment, interpret=True)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        wrapped = jax.jit(lambda *x: flash.flash_attention(*x, interpret=True))(q, k, v, segment)
    np.testing.assert_allclose(wrapped, plain, rtol=1e-6, atol=1e-6)


def test_a_kernel_serves_where_its_platform_and_shapes_are(monkeypatch):
    layout = packed()
    sizes = (HEADS, GROUPS, WIDTH)
    assert not flash.serves(layout, *sizes)
    monkeypatch.setattr(flash, "platform", lambda: "tpu")
    assert flash.serves(layout, *sizes)
    assert not flash.serves(layout, HEADS, GROUPS, 64)
    arrays = (layout.token_BxL, layout.position_BxL, layout.segment_BxL, layout.prefix_BxL)
    assert not flash.serves(Layout(*arrays), *sizes), "it may have shared prompts"
    short = padded_layout(np.ones((2, 100), np.int32), np.ones((2, 100), bool))
    assert not short.prefixed and not flash.serves(short, *sizes)
    mesh = jax.sharding.AbstractMesh((1, 2, 4), ("data", "fsdp", "model"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert not flash.serves(layout, *sizes), "two groups of keys on four devices"
        assert flash.serves(layout, HEADS, 4, WIDTH)


def test_the_platform_is_that_of_the_mesh():
    assert platform() == jax.default_backend()
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        found = jax.jit(lambda x: x + (platform() == jax.default_backend()))(jnp.zeros(()))
    assert found == 1


def test_pairs_are_those_of_blocks_with_something_to_see():
    assert flash.block(384) == 128 and flash.block(1024) == 512 and flash.block(768) == 256
    assert flash.pairs(384, None) == 6 * 128**2
    # A band of one block's width reaches one block back, of one slot none.
    assert flash.pairs(384, 128) == 5 * 128**2 and flash.pairs(384, 1) == 3 * 128**2
    # The first query of a block sees with a band of 2 the last key of the block before.
    assert flash.pairs(384, 2) == 5 * 128**2 and flash.pairs(384, 130) == 6 * 128**2
    # Of a mask the blocks with anything in them.
    seen = np.zeros((384, 384), bool)
    seen[0, 0] = seen[383, 127] = seen[383, 128] = True
    assert flash.pairs(384, None, seen) == 3 * 128**2


COMPILED = """
import re
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from instructax.config import MeshConfig, ModelConfig
from instructax.models import functional as model
from instructax.batches import Families, Layout
from instructax.plan import hlo, topology
from instructax.runtime.mesh import abstract_sharded
devices = topology.devices("v5p:2x2x1")
mesh = jax.make_mesh((1, 2, 2), ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3, devices=devices)
config = ModelConfig(num_layers=2, d_model=512, num_heads=4, d_ff=512, vocab_size=512, context_length=1024,
                     compute_dtype="bfloat16", attention_pattern=("dense", "banded"), band_width=100)
rows, length = 4, 1024
slots = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
layout = Layout(slots, slots, slots, slots, prefixed=False)
def compiled(layout, head, read):
    with jax.set_mesh(mesh):
        params = abstract_sharded(mesh, lambda: model.init(jax.random.key(0), config, head))
        loss = lambda p, layout: read(p, config, layout).sum()
        text = jax.jit(jax.grad(loss)).lower(params, layout).compile().as_text()
    module = hlo.parse(text)
    found = [i for c in module.computations.values() for i in c.instructions.values() if hlo.is_flash(i)]
    return text, module, found
text, module, found = compiled(layout, "lm", model.token_logprobs)
kernels = sorted(i.op_name.rsplit("splash_mha_")[1].split("_")[0] for i in found)
assert set(kernels) == {"fwd", "dq", "dkv"}, kernels
flops = {}
for c in module.computations.values():
    for i in c.instructions.values():
        if hlo.is_flash(i) and "dkv" in i.op_name:
            flops[hlo.product_flops(i, c)] = 1
# 2 rows and 2 heads a chip, blocks of 512: 3 of 4 in a dense layer, as many in one with a band of 100.
assert list(flops) == [2 * 4 * 3 * 512**2 * 2 * 2 * 128], flops
assert not any("f32[2,2,1024,1024]" in line or "f32[2,2,1,1024,1024]" in line for line in text.splitlines())
# A prompt of 512 slots and two responses of 128 behind it in every row.
def listed(*shape):
    return jax.ShapeDtypeStruct((rows, *shape), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
families = Families(listed(1, 512), listed(1, 2, 128))
text, _, found = compiled(Layout(slots, slots, slots, slots, families=families), "scalar", model.scalars)
seen = {re.search(r"flash_pairs_(\\d+)", i.op_name)[1] for i in found}
# A prompt's two blocks of 256 see three; the responses are one that sees both and itself, within a band one of them.
assert seen == {str(6 * 256**2), str(5 * 256**2)}, seen
assert not any("f32[2,2,1024,1024]" in line for line in text.splitlines())
print("passed")
"""


@pytest.mark.slow
def test_a_model_compiles_with_the_kernel_for_tpus():
    apart.needs_libtpu()
    apart.passes(COMPILED)


def test_layouts_of_whole_texts_promise_that_nothing_is_shared():
    mask = np.ones((2, 6), bool)
    layout = padded_layout(np.ones((2, 6), np.int32), mask)
    assert not layout.prefixed and not np.asarray(layout.prefix_BxL).any()
