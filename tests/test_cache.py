"""What a cache keeps: in int8 within half a step, in a ring of slots, and rows that others had before."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from instructax.batches import padded_layout
from instructax.models import cache as cache_lib
from instructax.models import functional as model
from instructax.models import stored
from instructax.models.attention import attention
from instructax.models.stored import heads_joined, like, look, put, store
from instructax.steps.rollout import episode_layout, sample_responses

BANDED = dataclasses.replace(
    tiny.MODEL, num_layers=2, attention_pattern=("dense", "banded"), band_width=4, positions="rope"
)


def test_int8_is_within_half_a_step_of_every_head_and_slot():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5, 8)) * 10.0 ** jnp.arange(5)[
        None, None, :, None
    ].repeat(2, 0).repeat(3, 1).repeat(8, 3)
    x = x.at[0, 0, 0].set(0.0)
    kept = store(x, "int8")
    assert kept.data.dtype == jnp.int8
    error = np.abs(kept.data * kept.scale[..., None] - x).max(axis=-1)
    assert np.all(error <= np.asarray(kept.scale) / 2 * 1.0001)
    assert np.all(error[0, 0, 0] == 0.0)


def test_another_dtype_is_kept_as_it_is():
    x = jax.random.normal(jax.random.key(0), (1, 1, 2, 4))
    np.testing.assert_array_equal(store(x, None).data, x)
    assert store(x, "bfloat16").data.dtype == jnp.bfloat16 and store(x, "bfloat16").scale is None


@pytest.mark.laws
def test_looking_at_int8_is_attention_to_what_it_stands_for():
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (2, 1, 4, 8))
    k, v = (jax.random.normal(key, (2, 2, 6, 8)) for key in keys[1:])
    mask = jnp.arange(6)[None, None] < jnp.asarray([4, 6])[:, None, None]
    key, value = store(k, "int8"), store(v, "int8")
    meant = attention(q, *(x.data * x.scale[..., None] for x in (key, value)), mask)
    np.testing.assert_allclose(look(q, key, value, mask), meant, atol=1e-5)
    assert np.abs(meant - attention(q, k, v, mask)).max() < 0.05


@pytest.mark.laws
@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("joined", [2, 4])
def test_heads_side_by_side_are_the_same_look(dtype, joined):
    keys = jax.random.split(jax.random.key(2), 4)
    q = jax.random.normal(keys[0], (2, 3, 8, 5))
    k, v, new = (
        jax.random.normal(key, (2, 4, n, 5)) for key, n in zip(keys[1:], (6, 6, 1), strict=True)
    )
    mask = jnp.arange(6)[None, None] < jnp.asarray([4, 6])[:, None, None]

    def looked(joined):
        key, value = (store(x, dtype, joined) for x in (k, v))
        assert key.data.shape == (2, 4 // joined, 6, 5 * joined)
        key, value = (put(x, like(new, x), 0, 2) for x in (key, value))
        return look(q, key, value, mask)

    np.testing.assert_allclose(looked(joined), looked(1), atol=1e-6)


def test_heads_are_joined_where_a_matrix_unit_would_be_idle(monkeypatch):
    assert heads_joined(32, 1) == 1
    monkeypatch.setattr(stored, "platform", lambda: "tpu")
    found = [heads_joined(*of) for of in ((32, 1), (12, 1), (25, 1), (8, 4), (8, 8), (8, 16))]
    assert found == [8, 4, 1, 2, 1, 1]


def test_put_writes_rows_and_slots_scales_too():
    whole = store(jnp.ones((2, 1, 4, 3)), "int8")
    new = store(jnp.full((1, 1, 2, 3), 5.0), "int8")
    put_ = put(whole, new, 1, 2)
    np.testing.assert_allclose(
        np.asarray(put_.data * put_.scale[..., None])[:, 0, :, 0], [[1, 1, 1, 1], [1, 1, 5, 5]]
    )


@pytest.mark.laws
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(tiny.MODEL, id="learned", marks=pytest.mark.slow),
        pytest.param(BANDED, id="rope, banded"),
    ],
)
def test_a_row_that_takes_anothers_place_reads_as_if_alone(config):
    """Rows begin at other times, the ring comes round, and nothing of the row before is seen."""
    width, ring = 4, 5
    token = tiny.tokens(2, width + 2 * ring, seed=4)
    mask = np.asarray([[True] * width, [False, False, True, True]])
    copy = model.rollout_copy(tiny.params(config=config), config)
    expected = jax.jit(functools.partial(model.token_logprobs, model_config=config))

    @functools.partial(jax.jit, static_argnames="slots")
    def read(token, mask, slots):
        return model.prefill(copy, config, token, mask, slots)

    decode = jax.jit(lambda token, cache: model.decode(copy, config, token, cache))
    admit = jax.jit(model.admit)
    token = np.where(np.pad(mask, ((0, 0), (0, 2 * ring)), constant_values=True), token, 0)
    _, prompts = read(token[:, :width], mask, width)
    cache = model.empty_cache(config, 2, width, width + ring, None)

    def check(row, source, first, logits):
        """Next token of a row that has read ``first`` tokens of its response."""
        real = np.pad(mask[source : source + 1], ((0, 0), (0, first + 1)), constant_values=True)
        layout = padded_layout(token[source : source + 1, : width + first + 1], real)
        logp = jax.nn.log_softmax(logits[row])[token[source, width + first]]
        whole = expected(tiny.params(config=config), layout=layout)
        np.testing.assert_allclose(logp, whole[0, -1], atol=3e-6)

    cache = admit(cache, prompts, 0, 0)
    count = {0: (0, 0)}  # slot -> (prompt, tokens of the response read)
    for step in range(9):
        if step == 2:
            cache, count[1] = admit(cache, prompts, 1, 1), (1, 0)
        if step == 4:  # the first ends, the second's prompt follows it
            cache, count[0] = admit(cache, prompts, 0, 1), (1, 0)
        if step == 6:
            cache, count[1] = admit(cache, prompts, 1, 0), (0, 0)
        tokens = [token[p, width + n] for p, n in (count.get(s, (0, 0)) for s in range(2))]
        logits, cache = decode(jnp.asarray(tokens, jnp.int32), cache)
        for slot, (prompt, n) in count.items():
            count[slot] = prompt, n + 1
            if step in (1, 5, 8):
                check(slot, prompt, n + 1, logits)
    assert int(cache.slot) != int(cache.ring)


@pytest.mark.parametrize(("dtype", "worst"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_a_smaller_cache_moves_log_probabilities_a_little(dtype, worst):
    """The sampler's own against the training program's: the gap that every rollout logs."""
    prompts = tiny.prompts((6, 3, 1, 4), 6)
    sample = functools.partial(
        sample_responses, model_config=tiny.MODEL, response_length=7, temperature=1.0, eos_id=-1,
        pad_id=tiny.PAD, cache_dtype=dtype,
    )  # fmt: skip
    responses = jax.jit(sample)(tiny.params(), jax.random.key(3), prompts)
    layout, _ = episode_layout(prompts, responses)
    logp = jax.jit(functools.partial(model.token_logprobs, model_config=tiny.MODEL))(
        tiny.params(), layout=layout
    )
    gap = np.abs(np.asarray(responses.logp_BxT) - logp[:, 6:])
    assert 1e-5 < gap[:, 1:].max() < worst
    assert gap[:, 0].max() < 1e-5, "the first token is drawn before anything is kept"


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match="slots is 3, but the prompts take 4"):
        cache_lib.empty(tiny.MODEL, 1, 4, 3, None)
