"""Laws of the transformer: causality, inert padding, packed = separate, cached = uncached, chunked = dense."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax import logprobs
from instructax.batches import Layout, padded_layout, predecessor, scored_slots
from instructax.config import ModelConfig
from instructax.models import attention as attention_lib
from instructax.models import functional as model
from instructax.models import transformer
from instructax.models.attention import visible
from instructax.models.layers import dropout, keep_masks
from instructax.models.presets import PRESETS, llama

SMALL = ModelConfig(
    num_layers=2,
    d_model=16,
    num_heads=4,
    vocab_size=29,
    vocab_multiple=16,
    context_length=24,
    init_std=0.3,
)
FAMILIES = {
    "gpt1": dataclasses.replace(SMALL, norm_position="post"),
    "gpt2": SMALL,
    "gpt3": dataclasses.replace(
        SMALL, attention_pattern=("dense", "banded"), band_width=3, tie_embeddings=False
    ),
    "llama": dataclasses.replace(
        llama(2, 16, 4, 24, 29, 24, num_kv_heads=2), init_std=0.3, vocab_multiple=16, qk_norm=True
    ),
}


@functools.cache
def started(config: ModelConfig):
    """Parameters drawn by NumPy, which compiles nothing; biases and norms are not at their neutral values."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + config.init_std * rng.normal(size=leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config, "lm"))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    config = FAMILIES[request.param]
    return config, started(config)


# Compiled once for each config and shape; running operation by operation costs ten times as much.
token_logprobs = jax.jit(model.token_logprobs, static_argnames=("model_config", "temperature"))
token_statistics = jax.jit(model.token_statistics, static_argnames=("model_config", "temperature"))
scalars = jax.jit(model.scalars, static_argnames="model_config")
prefill = jax.jit(model.prefill, static_argnames=("model_config", "slots"))
decode = jax.jit(model.decode, static_argnames="model_config")


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 29, (rows, length)).astype(np.int32)


@pytest.mark.laws
def test_a_token_depends_on_nothing_behind_it(family):
    """Causality by gradients: d logp_t / d embedding_s = 0 for s > t, and not 0 for s < t."""
    config, params = family
    layout = padded_layout(tokens(1, 6), np.ones((1, 6), bool))

    def logp_of_inputs(x_1xLxD):
        def embed(params, config, token, position):
            return x_1xLxD

        original, transformer.embed = transformer.embed, embed
        try:
            return model.token_logprobs(params, config, layout)[0]
        finally:
            transformer.embed = original

    x = transformer.embed(params, config, layout.token_BxL, layout.position_BxL)
    jacobian_LxL = np.abs(jax.jit(jax.jacrev(logp_of_inputs))(x)).sum(axis=(1, 3))
    upper = np.triu(np.ones((6, 6), bool))
    assert np.all(jacobian_LxL[upper] == 0.0)
    assert np.all(jacobian_LxL[np.tril(np.ones((6, 6), bool), -1)][-1] > 0.0)


@pytest.mark.laws
def test_padding_on_either_side_is_inert(family):
    """Seven tokens, padded in three ways, against the same at the head of a row without padding."""
    config, params = family
    full = np.tile(tokens(1, 14), (3, 1))
    plain = token_logprobs(params, config, padded_layout(full, np.ones((3, 14), bool)))[0, :7]
    token, mask = np.full((3, 14), 28, np.int32), np.zeros((3, 14), bool)
    for row, left in enumerate((0, 7, 3)):
        token[row, left : left + 7], mask[row, left : left + 7] = full[0, :7], True
    logp = np.asarray(token_logprobs(params, config, padded_layout(token, mask)))
    for row in range(3):
        np.testing.assert_allclose(logp[row][mask[row]], plain, atol=2e-6)
    assert np.all(logp[~mask] == 0.0)


def shared_prompt_layout() -> tuple[Layout, list[tuple[slice, slice]]]:
    """One row: prompt A (4), two responses; prompt B (3), one response; padding in between."""
    segments = [1] * 4 + [2] * 3 + [3] * 5 + [0] * 2 + [4] * 3 + [5] * 2
    prefixes = [0] * 4 + [1] * 3 + [1] * 5 + [0] * 2 + [0] * 3 + [4] * 2
    positions = [*range(4), *range(4, 7), *range(4, 9), 0, 0, *range(3), *range(3, 5)]
    row = np.asarray([positions, segments, prefixes], np.int32)[:, None, :]
    token = tokens(1, len(segments), seed=3)
    pairs = [
        (slice(0, 4), slice(4, 7)),
        (slice(0, 4), slice(7, 12)),
        (slice(14, 17), slice(17, 19)),
    ]
    return Layout(token, row[0], row[1], row[2]), pairs


@pytest.mark.laws
def test_responses_behind_a_shared_prompt_equal_separate_sequences(family):
    """Values and gradients; the prompt's tokens are computed once."""
    config, params = family
    layout, pairs = shared_prompt_layout()

    # Each prompt with each of its responses in a row of its own; both forms have one shape.
    shape = (len(pairs), layout.token_BxL.shape[1])
    token, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    weight, shared_weight = np.zeros((2, *shape), np.float32)
    for row, (prompt, response) in enumerate(pairs):
        own = np.concatenate([layout.token_BxL[0, prompt], layout.token_BxL[0, response]])
        token[row, : own.size], mask[row, : own.size] = own, True
        counts = np.arange(1.0, response.stop - response.start + 1)
        weight[row, own.size - counts.size : own.size] = counts
        shared_weight[0, response] = counts
    empty_rows = ((0, len(pairs) - 1), (0, 0))
    shared = jax.tree.map(lambda x: np.pad(x, empty_rows), layout)

    @jax.jit
    def of(layout, weight):
        def loss(params):
            logp = model.token_logprobs(params, config, layout)
            return (weight * logp).sum(), logp

        return jax.grad(loss, has_aux=True)(params)

    grads, logp = of(shared, shared_weight)
    expected_grads, expected = of(padded_layout(token, mask), weight)
    for row, (_, response) in enumerate(pairs):
        np.testing.assert_allclose(logp[0, response], expected[row][weight[row] > 0], atol=3e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), grads, expected_grads)


def test_predecessor_of_a_response_is_the_last_token_of_its_prompt():
    layout, _ = shared_prompt_layout()
    index, exists = predecessor(layout)
    assert index[0, 4] == 3 and index[0, 7] == 3 and index[0, 17] == 16 and index[0, 9] == 8
    assert not exists[0, 0] and not exists[0, 12] and not exists[0, 14] and exists[0, 18]


def test_prefix_is_one_level_and_not_transitive():
    segment = np.asarray([[1, 2, 3]], np.int32)
    prefix = np.asarray([[0, 1, 2]], np.int32)
    mask = visible(Layout(segment, segment, segment, prefix))[0]
    assert mask[2, 1] and not mask[2, 0] and mask[1, 0]


@pytest.mark.laws
def test_cached_decoding_equals_the_training_program(family):
    """Prompts of three lengths, left-padded; the text that follows is given, not sampled."""
    config, params = family
    length, prompt = 14, 8
    token, mask = tokens(3, length, seed=5), np.ones((3, length), bool)
    for row, left in enumerate((0, 3, 5)):
        token[row, :left], mask[row, :left] = 0, False
    expected = token_logprobs(params, config, padded_layout(token, mask))
    copy = model.rollout_copy(params, config)
    logits, cache = prefill(copy, config, token[:, :prompt], mask[:, :prompt], length)
    for t in range(prompt, length):
        logp = jax.nn.log_softmax(logits)[np.arange(3), token[:, t]]
        np.testing.assert_allclose(logp, expected[:, t], atol=3e-6)
        logits, cache = decode(copy, config, token[:, t], cache)


def test_padded_vocabulary_never_enters_a_logsumexp():
    params = started(SMALL)
    assert params["embed"]["token"].shape == (32, 16)
    loud = params | {
        "embed": params["embed"] | {"token": params["embed"]["token"].at[29:].set(50.0)}
    }
    layout = padded_layout(tokens(2, 6), np.ones((2, 6), bool))
    for name, value in token_statistics(params, SMALL, layout).items():
        other = token_statistics(loud, SMALL, layout)[name]
        np.testing.assert_array_equal(value, other)


def test_statistics_match_a_dense_softmax_at_any_temperature():
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(2, 7, 5)), rng.normal(size=(16, 5))
    token = rng.integers(0, 13, (2, 7))
    logits = x @ table[:13].T / 0.7
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    logp, entropy = logprobs.chunked_token_statistics(
        jnp.asarray(x, jnp.float32), token, jnp.asarray(table, jnp.float32),
        vocab_size=13, temperature=0.7,
    )  # fmt: skip
    np.testing.assert_allclose(
        logp, np.log(np.take_along_axis(p, token[..., None], -1))[..., 0], atol=1e-5
    )
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), atol=1e-5)


@pytest.mark.laws
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_logprobs_equal_dense_values_and_gradients(chunk):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 7, 5)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(16, 5)), jnp.float32)
    token = rng.integers(0, 13, (2, 7))

    def total(x, table, chunk):
        logp, entropy = logprobs.chunked_token_statistics(
            x, token, table, vocab_size=13, chunk=chunk
        )
        return (logp * jnp.arange(7.0)[None]).sum() + entropy.sum()

    value_and_grad = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
    dense, chunked = value_and_grad(x, table, 7), value_and_grad(x, table, chunk)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), dense, chunked
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt3"])
def test_scan_and_remat_change_nothing(name):
    config = FAMILIES[name]
    layout = padded_layout(tokens(2, 6), np.ones((2, 6), bool))
    params = started(config)

    def loss(params, remat):
        of = dataclasses.replace(config, remat=remat)
        return model.token_logprobs(params, of, layout).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    wanted = grad(params, "none")
    for remat in ("block", "wide", "offload"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grad(params, remat), wanted
        )


def test_remat_keeps_the_stream_before_each_block_and_no_copy_of_the_parameters():
    """What the backward pass is given, beyond the parameters themselves and the layout."""
    config = dataclasses.replace(FAMILIES["gpt3"], num_layers=8, d_ff=256, d_model=32)
    layout = padded_layout(tokens(2, 16), np.ones((2, 16), bool))
    params = started(config)

    def kept(params):
        _, back = jax.vjp(lambda p: transformer.hidden(p, config, layout), params)
        return back

    stream = 2 * 16 * config.d_model
    size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(kept, params)))
    blocks = model.num_parameters(params["blocks"])
    masks = 2 * 2 * 16 * 16
    # Before every block, behind the last one, and a few for the final norm.
    assert (
        size < blocks + (config.num_layers + 8) * stream + masks + 4 * params["embed"]["token"].size
    )


def test_dropout_acts_only_where_a_key_is_given():
    config = dataclasses.replace(SMALL, dropout=0.5)
    params = started(config)
    layout = padded_layout(tokens(2, 6), np.ones((2, 6), bool))
    still = token_logprobs(params, config, layout)
    np.testing.assert_array_equal(still, token_logprobs(params, SMALL, layout))
    key = jax.random.key(1)
    moved = token_logprobs(params, config, layout, dropout_key=key)
    assert np.abs(moved - still).max() > 1e-3
    np.testing.assert_array_equal(moved, token_logprobs(params, config, layout, dropout_key=key))


@pytest.mark.laws
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.75])
def test_dropout_drops_its_share_and_draws_every_element_for_itself(rate):
    x = jnp.full((512, 255), 3.0)
    masks = keep_masks(jax.random.key(0), x.shape, rate)
    kept, other = (np.asarray(dropout(x, mask, rate)) != 0.0 for mask in masks)
    for one in (kept, other):
        n = one.size
        # Three standard deviations of a share of n draws.
        assert abs(1 - one.mean() - rate) < 3 * (rate * (1 - rate) / n) ** 0.5
    for one, beside in ((kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept, other)):
        correlation = np.corrcoef(one.ravel(), beside.ravel())[0, 1]
        assert abs(correlation) < 4 / one.size**0.5, correlation


@pytest.mark.laws
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.75, 0.99999])
def test_what_dropout_keeps_is_scaled_by_what_its_masks_drop(rate):
    """Of all 65,536 halves of a word, so that the mean is exact and not the rate's to sixteen bits."""
    x = np.asarray(dropout(jnp.ones(2), jnp.array([True, False]), rate))
    below = round(rate * 2**16)
    np.testing.assert_allclose(x, [2**16 / (2**16 - below), 0.0], rtol=1e-6)
    assert abs(below / 2**16 - rate) <= 2**-17
    np.testing.assert_allclose(1 / x[0], 1 - rate, rtol=1e-6, atol=2**-17)


def test_scalar_head_starts_as_the_paper_says_and_shifts():
    config = dataclasses.replace(SMALL, d_model=256, num_heads=4)
    lm = started(config)
    params = model.replace_head(jax.random.key(1), lm, config)
    kernel = np.asarray(params["value_head"]["kernel"])
    assert abs(kernel.var() * 257 - 1) < 0.4 and params["value_head"]["bias"] == 0.0
    layout = padded_layout(tokens(1, 6), np.asarray([[True] * 5 + [False]]))
    before = scalars(params, config, layout)
    after = scalars(model.shift_scalars(params, -1.5), config, layout)
    np.testing.assert_allclose(after[:, :5], before[:, :5] - 1.5, atol=1e-6)
    assert after[0, 5] == 0.0


PAPER_PARAMETERS = {  # millions, as the papers print them
    "gpt1": 117, "gpt2-124m": 124, "gpt2-355m": 355, "gpt2-774m": 774, "gpt2-1.5b": 1558,
    "gpt3-125m": 125, "gpt3-350m": 356, "gpt3-760m": 760, "gpt3-1.3b": 1315, "gpt3-2.7b": 2650,
    "gpt3-6.7b": 6658, "gpt3-13b": 12850, "gpt3-175b": 174600,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_the_papers_size(name):
    config = PRESETS[name]
    assert config.head_width * config.num_heads == config.d_model
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), config, "lm"))
    assert model.num_parameters(shapes) / 1e6 == pytest.approx(PAPER_PARAMETERS[name], rel=0.02)


@pytest.mark.laws
@pytest.mark.parametrize("budget", [2**30, 0], ids=["kept", "computed again"])
def test_attention_in_blocks_of_queries_equals_the_whole(budget, monkeypatch):
    """Values and gradients, with a last block that is not full, shared prompts and grouped keys."""
    layout, _ = shared_prompt_layout()
    mask = visible(layout)
    rows, length = layout.token_BxL.shape
    assert length % 5 and length > 10
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (rows, length, 4, 8))
    k, v = (jax.random.normal(key, (rows, 2, length, 8)) for key in keys[1:3])
    weight = jax.random.normal(keys[3], q.shape)
    monkeypatch.setattr(attention_lib, "QUERY_BLOCK", 5)
    monkeypatch.setattr(attention_lib, "SCORE_BYTES", budget)

    def total(attend):
        return jax.value_and_grad(
            lambda q, k, v: (attend(q, k, v, mask) * weight).sum(), argnums=(0, 1, 2)
        )(q, k, v)

    whole = total(attention_lib.attention)
    in_blocks = total(attention_lib.causal_attention)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), in_blocks, whole
    )
    if not budget:
        return
    # It reads no key behind a block: what stands there may be anything.
    poisoned = k.at[:, :, 5:].set(jnp.nan)
    out = attention_lib.causal_attention(q, poisoned, v, mask)[:, :5]
    np.testing.assert_allclose(
        out, attention_lib.attention(q, k, v, mask)[:, :5], rtol=1e-5, atol=1e-5
    )


@pytest.mark.laws
def test_scored_slots_have_the_values_and_gradients_of_all(family):
    """A loss over some slots needs no logits of the others."""
    config, params = family
    layout, _ = shared_prompt_layout()
    weight = (np.random.default_rng(5).random(layout.token_BxL.shape) < 0.4).astype(np.float32)
    scored = scored_slots(weight)
    assert scored is not None and scored.shape[1] < weight.shape[1]

    def total(params, scored):
        logp = model.token_logprobs(params, config, layout, scored_BxM=scored)
        return (logp * weight).sum(), logp

    graded = jax.jit(jax.value_and_grad(total, has_aux=True))
    (every, logp), grads = graded(params, None)
    (some, logp_some), grads_some = graded(params, scored)
    np.testing.assert_allclose(some, every, rtol=1e-5)
    np.testing.assert_allclose(logp_some, np.where(weight != 0, logp, 0.0), rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads_some, grads
    )


def test_scores_that_fit_one_device_are_kept_for_the_backward_pass(monkeypatch):
    """2 rows, 4 heads and half of 8 x 8 pairs are 1024 bytes in float32."""
    monkeypatch.setattr(attention_lib, "SCORE_BYTES", 1024)
    assert attention_lib._scores_fit(2, 4, 8) and not attention_lib._scores_fit(2, 4, 16)
    mesh = jax.sharding.AbstractMesh((1, 2, 2), ("data", "fsdp", "model"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention_lib._scores_fit(2, 4, 16) and not attention_lib._scores_fit(4, 4, 16)


def test_the_backward_pass_of_a_long_attention_holds_the_scores_of_one_block(monkeypatch):
    rows, length, heads = 2, 512, 4
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(0), 3),
            [(rows, length, heads, 8), *[(rows, heads, length, 8)] * 2],
            strict=True,
        )
    )
    mask = jnp.tril(jnp.ones((rows, length, length), bool))

    def bytes_with(budget: int) -> int:
        monkeypatch.setattr(attention_lib, "SCORE_BYTES", budget)
        monkeypatch.setattr(attention_lib, "QUERY_BLOCK", 32)
        total = jax.grad(
            lambda *x: (attention_lib.causal_attention(*x, mask) ** 2).sum(), (0, 1, 2)
        )
        return jax.jit(total).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    half = 4 * rows * heads * length * length // 2
    assert bytes_with(2**30) > half > bytes_with(0)
