"""The model's doors: shapes of the legend come out, another rank or dtype is refused by name.

Nothing is computed: shapes are traced, and a refusal comes before any arithmetic.
"""

from __future__ import annotations

import dataclasses
import functools

import apart
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from instructax.batches import Layout
from instructax.models import functional as model

B, L, P, SLOTS = 3, 6, 4, 7
VOCAB = tiny.MODEL.padded_vocab_size
FIELDS = [f.name for f in dataclasses.fields(Layout) if f.name.endswith("_BxL")]
I_BxL, I_BxP = np.ones((B, L), np.int32), np.ones((B, P), np.int32)
M_BxP, I_B = np.ones((B, P), bool), np.ones((B,), np.int32)
LAYOUT = Layout(*[I_BxL] * 4)


@functools.cache
def params(head: str):
    return jax.eval_shape(lambda key: model.init(key, tiny.MODEL, head), jax.random.key(0))


@functools.cache
def copy():
    return jax.eval_shape(lambda p: model.rollout_copy(p, tiny.MODEL), params("lm"))


@functools.cache
def cache():
    return traced(model.prefill, copy(), token_BxP=I_BxP, mask_BxP=M_BxP, slots=SLOTS)[1]


def traced(function, tree, *arguments, **others):
    """The shapes that come out; everything but the parameters is as it would be outside of jit."""
    return jax.eval_shape(lambda tree: function(tree, tiny.MODEL, *arguments, **others), tree)


READERS = {
    "token_logprobs": (model.token_logprobs, "lm"),
    "token_statistics": (model.token_statistics, "lm"),
    "scalars": (model.scalars, "scalar"),
}


def read(name, layout=LAYOUT, **options):
    function, head = READERS[name]
    return traced(function, params(head), layout, **options)


def prefill(**changes):
    good = {"token_BxP": I_BxP, "mask_BxP": M_BxP, "slots": SLOTS}
    return traced(model.prefill, copy(), **{**good, **changes})


def decode(token_B=I_B, **changes):
    if changes:
        return traced(model.decode, copy(), token_B, **changes)
    trees = {"copy": copy(), "cache": cache()}
    return jax.eval_shape(lambda t: model.decode(t["copy"], tiny.MODEL, token_B, t["cache"]), trees)


def refused(error, call, *arguments, **options) -> str:
    with pytest.raises(error) as refusal:
        call(*arguments, **options)
    return str(refusal.value)


WRONG_INTEGERS = (np.float32, jnp.bfloat16, np.bool_)


@pytest.mark.parametrize("name", READERS)
def test_readers_give_one_float32_a_slot(name):
    for layout in (
        LAYOUT,
        jax.tree.map(jnp.asarray, LAYOUT),
        Layout(*[I_BxL.astype(np.int16)] * 4),
    ):
        for leaf in jax.tree.leaves(read(name, layout)):
            assert leaf.shape == (B, L) and leaf.dtype == jnp.float32


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("field", FIELDS)
def test_a_layouts_arrays_are_integers_of_rank_2_and_one_shape(name, field):
    def with_field(array):
        return dataclasses.replace(LAYOUT, **{field: array})

    for dtype in WRONG_INTEGERS:
        message = refused(TypeError, read, name, with_field(I_BxL.astype(dtype)))
        assert message == f"layout.{field} must be integer, got {np.dtype(dtype)}"
    message = refused(TypeError, read, name, with_field(I_BxL.tolist()))
    assert message == f"layout.{field} must be an array, got list"
    for other in (I_BxL[0], I_BxL[None]):
        message = refused(ValueError, read, name, with_field(other))
        assert message == f"layout.{field} must have rank 2, got shape {other.shape}"
    for other in (I_BxL[:1], I_BxL[:, :1]):  # never broadcast
        message = refused(ValueError, read, name, with_field(other))
        assert f"layout.{field} has shape" in message


@pytest.mark.parametrize("name", READERS)
def test_a_layout_is_a_layout_and_a_dropout_key_one_typed_key(name):
    assert refused(TypeError, read, name, I_BxL) == "layout must be a Layout, got ndarray"
    message = refused(TypeError, read, name, dropout_key=jax.random.PRNGKey(0))
    assert message.startswith("dropout_key must be a typed random key")
    message = refused(ValueError, read, name, dropout_key=jax.random.split(jax.random.key(0), 2))
    assert message == "dropout_key must have rank 0, got shape (2,)"


@pytest.mark.parametrize("name", [name for name, (_, head) in READERS.items() if head == "lm"])
def test_a_temperature_is_a_real_scalar(name):
    for good in (1, 0.7, np.float32(0.7), jnp.float32(0.7)):
        assert jax.tree.leaves(read(name, temperature=good))[0].dtype == jnp.float32
    message = refused(TypeError, read, name, temperature="0.7")
    assert message == "temperature must be a real number, got str"
    message = refused(ValueError, read, name, temperature=np.ones((B,), np.float32))
    assert message == "temperature must be a scalar, got shape (3,)"


def test_prefill_gives_logits_a_row_and_a_cache_of_the_slots_asked_for():
    logits, got = prefill()
    assert logits.shape == (B, VOCAB) and logits.dtype == jnp.float32
    assert {(x.data.shape[0], x.data.shape[2]) for x in (*got.key, *got.value)} == {(B, SLOTS)}
    assert got.next_B.shape == (B,) and got.next_B.dtype == jnp.int32


def test_prefill_refuses_tokens_and_masks_by_their_own_names():
    for dtype in WRONG_INTEGERS:
        message = refused(TypeError, prefill, token_BxP=I_BxP.astype(dtype))
        assert message == f"token_BxP must be integer, got {np.dtype(dtype)}"
    for dtype in (np.int32, np.float32):
        message = refused(TypeError, prefill, mask_BxP=M_BxP.astype(dtype))
        assert message == f"mask_BxP must be bool, got {np.dtype(dtype)}"
    for name, array in (("token_BxP", I_BxP), ("mask_BxP", M_BxP)):
        for other in (array[0], array[None]):
            message = refused(ValueError, prefill, **{name: other})
            assert message == f"{name} must have rank 2, got shape {other.shape}"
        assert "mask_BxP has shape" in refused(ValueError, prefill, **{name: array[:1]})
    message = refused(ValueError, prefill, slots=P - 1)
    assert message == "slots is 3, but the prompts take 4"


def test_decode_gives_logits_a_row_and_the_cache_back():
    logits, got = decode()
    assert logits.shape == (B, VOCAB) and logits.dtype == jnp.float32
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cache()
    )


def test_decode_refuses_tokens_and_caches_by_name():
    for dtype in WRONG_INTEGERS:
        message = refused(TypeError, decode, I_B.astype(dtype))
        assert message == f"token_B must be integer, got {np.dtype(dtype)}"
    for other in (I_B[0], I_B[None], I_B[:, None]):
        message = refused(ValueError, decode, other)
        assert message == f"token_B must have rank 1, got shape {other.shape}"
    message = refused(ValueError, decode, I_B[:2])
    assert message == "token_B has shape (2,), but cache.next_B has shape (3,)"
    assert refused(TypeError, decode, I_B, cache=()) == "cache must be a Cache, got tuple"


@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_init_and_replace_head_want_one_typed_key(head):
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params(head)))
    assert params("scalar")["value_head"]["kernel"].shape == (tiny.MODEL.d_model, 1)
    for call in (
        lambda key: model.init(key, tiny.MODEL, head),
        lambda key: model.replace_head(key, params("lm"), tiny.MODEL),
    ):
        message = refused(TypeError, call, jax.random.PRNGKey(0))
        assert message == "key must be a typed random key (jax.random.key), got uint32"
        message = refused(ValueError, call, jax.random.split(jax.random.key(0), 2))
        assert message == "key must have rank 0, got shape (2,)"
    message = refused(ValueError, model.init, jax.random.key(0), tiny.MODEL, "value")
    assert message == 'head must be "lm" or "scalar", got \'value\''


def test_a_shift_is_one_real_number_and_zero_is_one():
    start = {"value_head": {"kernel": np.ones((4, 1), np.float32), "bias": np.ones(1, np.float32)}}
    with jax.enable_x64(True):
        for shift in (0, -1.5, np.float64(2.0), jnp.float32(0.5)):
            bias = model.shift_scalars(start, shift)["value_head"]["bias"]
            assert bias.shape == (1,) and bias.dtype == jnp.float32 and bias[0] == 1 + shift
    message = refused(TypeError, model.shift_scalars, start, "1")
    assert message == "shift must be a real number, got str"
    message = refused(ValueError, model.shift_scalars, start, np.ones(3, np.float32))
    assert message == "shift must be a scalar, got shape (3,)"


def test_a_door_leaves_no_trace_in_the_compiled_program(monkeypatch):
    """The checks read shapes and dtypes alone: no operation of the program is theirs."""
    lm = params("lm")

    def program():
        def run(p, *arrays):
            return model.token_logprobs(p, tiny.MODEL, Layout(*arrays), temperature=0.7)

        return str(jax.make_jaxpr(run)(lm, *[I_BxL] * 4))

    with_checks = program()
    monkeypatch.setattr(model, "check_layout", lambda layout: None)
    assert program() == with_checks


CHUNKED = """
import functools
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
import numpy as np
import on_mesh
import tiny
from instructax import logprobs
from instructax.plan import chips, timing
from instructax.runtime import mesh
from instructax.steps.accumulate import gradient
from instructax.steps.sft import lm_objective

text, found, moved = tiny.text(16, 12), [], {}
for shape, numbers in (((1, 1, 1), (1,)), ((1, 4, 1), (1, 6)), ((1, 2, 2), (6,))):
    run = on_mesh.open_run(shape)
    for chunks in numbers:
        logprobs.CHUNK_BYTES = 4 * 16 * on_mesh.MODEL.padded_vocab_size * 12 // (shape[0] * shape[1] * chunks)
        with jax.set_mesh(run.mesh):
            params = mesh.init_sharded(
                run.mesh, lambda: on_mesh.model.init(jax.random.key(3), on_mesh.MODEL, "lm")
            )
            of = jax.jit(functools.partial(gradient, lm_objective(on_mesh.MODEL), microbatches=1))
            compiled = of.lower(params, mesh.put_batch(run.mesh, text)).compile()
            found.append(jax.device_get(compiled(params, mesh.put_batch(run.mesh, text))))
        cost = timing.analyse(compiled.as_text(), chips.cpu(), [None] * run.mesh.size)
        moved[shape, chunks] = sum(sent.wire for sent in cost.collectives.values())
for other in found[1:]:
    tiny.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
assert moved[(1, 1, 1), 1] == 0 < moved[(1, 4, 1), 1]
assert moved[(1, 4, 1), 6] == moved[(1, 4, 1), 1], moved
print("passed")
"""


@pytest.mark.laws
def test_on_a_mesh_the_stream_does_not_travel_with_every_chunk_of_logits():
    # Nearly all of its time is compilation.
    apart.passes(CHUNKED, XLA_FLAGS="--xla_backend_optimization_level=0")
