"""Laws of the transformer: causality, inert padding, packed = separate, cached = uncached, chunked = dense."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax import logprobs
from instructax.batches import Layout, padded_layout, predecessor
from instructax.config import ModelConfig
from instructax.models import functional as model
from instructax.models import transformer
from instructax.models.attention import visible
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


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    config = FAMILIES[request.param]
    params = model.init(jax.random.key(0), config, "lm")
    return config, params


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 29, (rows, length)).astype(np.int32)


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
    jacobian_LxL = np.abs(jax.jacobian(logp_of_inputs)(x)).sum(axis=(1, 3))
    upper = np.triu(np.ones((6, 6), bool))
    assert np.all(jacobian_LxL[upper] == 0.0)
    assert np.all(jacobian_LxL[np.tril(np.ones((6, 6), bool), -1)][-1] > 0.0)


def test_padding_on_either_side_is_inert(family):
    config, params = family
    token = tokens(1, 7)
    plain = model.token_logprobs(params, config, padded_layout(token, np.ones((1, 7), bool)))
    for left, right in [(0, 5), (5, 0), (3, 4)]:
        padded = np.pad(token, ((0, 0), (left, right)), constant_values=28)
        mask = np.pad(np.ones((1, 7), bool), ((0, 0), (left, right)))
        logp = model.token_logprobs(params, config, padded_layout(padded, mask))
        np.testing.assert_allclose(logp[:, left : left + 7], plain, atol=2e-6)
        assert np.all(np.asarray(logp)[~mask] == 0.0)


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


def test_responses_behind_a_shared_prompt_equal_separate_sequences(family):
    """Values and gradients; the prompt's tokens are computed once."""
    config, params = family
    layout, pairs = shared_prompt_layout()

    def shared(params):
        return model.token_logprobs(params, config, layout)[0]

    def separate(params):
        out = []
        for prompt, response in pairs:
            token = np.concatenate([layout.token_BxL[0, prompt], layout.token_BxL[0, response]])
            row = padded_layout(token[None], np.ones((1, token.size), bool))
            out.append(model.token_logprobs(params, config, row)[0, prompt.stop - prompt.start :])
        return out

    def total(of):
        def loss(params):
            parts = of(params)
            if of is shared:
                parts = [parts[response] for _, response in pairs]
            return sum((jnp.arange(p.size) + 1.0) @ p for p in parts)

        return loss

    for (_, response), expected in zip(pairs, separate(params), strict=True):
        np.testing.assert_allclose(shared(params)[response], expected, atol=3e-6)
    grads = jax.grad(total(shared))(params), jax.grad(total(separate))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), *grads)


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


@pytest.mark.parametrize("left", [0, 3])
def test_cached_decoding_equals_the_training_program(family, left):
    config, params = family
    length, prompt = 11, 5
    token = tokens(2, length, seed=5)
    mask = np.ones((2, length), bool)
    mask[1, :2] = False  # a shorter prompt, left-padded
    token = np.pad(token, ((0, 0), (left, 0)))
    mask = np.pad(mask, ((0, 0), (left, 0)))
    expected = model.token_logprobs(params, config, padded_layout(token, mask))
    copy = model.rollout_copy(params, config)
    end = left + prompt
    logits, cache = model.prefill(copy, config, token[:, :end], mask[:, :end], left + length)
    for t in range(end, left + length):
        logp = jax.nn.log_softmax(logits)[np.arange(2), token[:, t]]
        np.testing.assert_allclose(logp, expected[:, t], atol=3e-6)
        logits, cache = model.decode(copy, config, token[:, t], cache)


def test_padded_vocabulary_never_enters_a_logsumexp():
    params = model.init(jax.random.key(0), SMALL, "lm")
    assert params["embed"]["token"].shape == (32, 16)
    loud = params | {
        "embed": params["embed"] | {"token": params["embed"]["token"].at[29:].set(50.0)}
    }
    layout = padded_layout(tokens(2, 6), np.ones((2, 6), bool))
    for name, value in model.token_statistics(params, SMALL, layout).items():
        other = model.token_statistics(loud, SMALL, layout)[name]
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

    dense = jax.value_and_grad(total, (0, 1))(x, table, 7)
    chunked = jax.value_and_grad(total, (0, 1))(x, table, chunk)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), dense, chunked
    )


def test_scan_and_remat_change_nothing():
    layout = padded_layout(tokens(2, 6), np.ones((2, 6), bool))
    params = model.init(jax.random.key(0), SMALL, "lm")

    def loss(params, remat):
        config = dataclasses.replace(SMALL, remat=remat)
        return model.token_logprobs(params, config, layout).sum()

    a, b = jax.grad(loss)(params, "block"), jax.grad(loss)(params, "none")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def test_dropout_acts_only_where_a_key_is_given():
    config = dataclasses.replace(SMALL, dropout=0.5)
    params = model.init(jax.random.key(0), config, "lm")
    layout = padded_layout(tokens(2, 6), np.ones((2, 6), bool))
    still = model.token_logprobs(params, config, layout)
    np.testing.assert_array_equal(still, model.token_logprobs(params, SMALL, layout))
    key = jax.random.key(1)
    moved = model.token_logprobs(params, config, layout, dropout_key=key)
    assert np.abs(moved - still).max() > 1e-3
    np.testing.assert_array_equal(
        moved, model.token_logprobs(params, config, layout, dropout_key=key)
    )


def test_scalar_head_starts_as_the_paper_says_and_shifts():
    config = dataclasses.replace(SMALL, d_model=256, num_heads=4)
    lm = model.init(jax.random.key(0), config, "lm")
    params = model.replace_head(jax.random.key(1), lm, config)
    kernel = np.asarray(params["value_head"]["kernel"])
    assert abs(kernel.var() * 257 - 1) < 0.4 and params["value_head"]["bias"] == 0.0
    layout = padded_layout(tokens(1, 6), np.asarray([[True] * 5 + [False]]))
    before = model.scalars(params, config, layout)
    after = model.scalars(model.shift_scalars(params, -1.5), config, layout)
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
