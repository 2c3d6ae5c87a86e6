"""Chunks of the log-probabilities: how large they are, and the ends of what is taken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax import logprobs

B, L, D, V = 2, 7, 3, 8
rng = np.random.default_rng(0)
X = rng.normal(size=(B, L, D)).astype(np.float32)
TABLE = rng.normal(size=(V, D)).astype(np.float32)
TOKEN = rng.integers(0, 5, (B, L))


@pytest.mark.parametrize("slots, bytes_over", [(1, 0), (3, 0), (3, 1), (1, -1), (6, 0)])
def test_a_chunk_is_the_largest_whose_float32_logits_fit(monkeypatch, slots, bytes_over):
    """And one slot where not even that fits."""
    seen = set()

    def spy(x, token, *others, real=logprobs._statistics):
        seen.add((x.shape, token.shape))
        return real(x, token, *others)

    monkeypatch.setattr(logprobs, "_statistics", spy)
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * B * V * slots + bytes_over)
    jax.eval_shape(lambda x: logprobs.chunked_token_statistics(x, TOKEN, TABLE, vocab_size=V), X)
    assert seen == {((B, slots, D), (B, slots))}


def test_one_real_id_is_certain():
    token = np.zeros((B, L), np.int32)
    for out in logprobs.chunked_token_statistics(X, token, TABLE, vocab_size=1):
        np.testing.assert_array_equal(out, np.zeros((B, L)))


@pytest.mark.parametrize("chunk", [None, 2])
def test_without_entropy_it_is_zero_and_the_rest_the_same(chunk):
    options = {"vocab_size": 5, "chunk": chunk, "temperature": 0.7}
    logp, entropy = logprobs.chunked_token_statistics(X, TOKEN, TABLE, **options)
    alone, nothing = logprobs.chunked_token_statistics(
        X, TOKEN, TABLE, with_entropy=False, **options
    )
    np.testing.assert_array_equal(alone, logp)
    assert not np.any(nothing) and nothing.shape == entropy.shape and np.all(entropy > 0.1)


def test_products_are_those_of_the_hidden_states_dtype_summed_in_float32():
    x, table = X.astype(jnp.bfloat16), TABLE.astype(np.float32)
    logits = logprobs.masked_logits(x, table, 5)
    assert logits.dtype == jnp.float32 and logits.shape == (B, L, V)
    rounded = table.astype(jnp.bfloat16).astype(np.float64)
    expected = x.astype(np.float64) @ rounded.T
    np.testing.assert_allclose(logits[..., :5], expected[..., :5], rtol=1e-5, atol=1e-6)
    assert np.all(np.isneginf(logits[..., 5:]))


def test_the_vocabulary_is_told_by_the_table_and_not_by_its_width():
    """As many real ids as the model is wide: what the table has beyond them is padding all the same."""
    logits = np.asarray(logprobs.masked_logits(X, TABLE, D))
    assert np.isneginf(logits[..., D:]).all() and np.isfinite(logits[..., :D]).all()


def test_the_temperature_is_1_where_none_is_given():
    given = logprobs.chunked_token_statistics(X, TOKEN, TABLE, vocab_size=V, temperature=1.0)
    for out, wanted in zip(
        logprobs.chunked_token_statistics(X, TOKEN, TABLE, vocab_size=V), given, strict=True
    ):
        np.testing.assert_array_equal(out, wanted)
