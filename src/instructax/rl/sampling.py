"""Drawing a token from logits, and the keys it is drawn with.

One key a sequence, from the episode's global index and the token's index: a slot in the batch, a
device or a process never enters, so the same run samples the same tokens on any of them.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from instructax import shapes


def episode_keys(key: Any, episode_B: Any, t: Any) -> jax.Array:
    """key_B = fold_in(fold_in(key, episode_b), t).

    Args:
      key: one typed key (of the run, folded with the iteration), or one a row.
      episode_B: integers, the global episode indices.
      t: the index of the token within its response: a number, a traced scalar, or one a row.
    """
    episode_B = jnp.asarray(shapes.int_array("episode_B", episode_B, 1))
    key = shapes.key_array("key", key, min(jnp.ndim(key), 1))
    t = jnp.asarray(t)

    def one(key, episode, t):
        return jax.random.fold_in(jax.random.fold_in(key, episode), t)

    rows_of = (0 if key.ndim else None, 0, 0 if t.ndim else None)
    return jax.vmap(one, in_axes=rows_of)(key, episode_B, t)


def sample_tokens(
    key_B: Any,
    logits_BxV: Any,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    valid_vocab: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One token a row from softmax(logits / temperature), and its log-probability.

    ``top_k`` keeps the k likeliest ids, then ``top_p`` the fewest of them whose mass reaches p;
    the rest is renormalised, and the log-probability is that of the renormalised distribution.
    PPO uses neither: they sort the vocabulary, and its three log-probabilities would all have to
    be renormalised alike. All options are static.

    Args:
      key_B: typed keys, one a row, as from :func:`episode_keys`.
      logits_BxV: floating.
      temperature: at 0 the likeliest id is taken (the lowest of equals); its log-probability is
        then the one at temperature 1.
      top_k: at least 1, or None.
      top_p: in (0, 1], or None.
      valid_vocab: ids from here on are padding of the vocabulary: never sampled, and no part of
        any sum. None: all are real.

    Returns:
      (token_B int32, logp_B float32, or float64 for float64 logits).

    Raises:
      TypeError, ValueError: an argument of the wrong dtype, shape or range, by name.
    """
    key_B = shapes.key_array("key_B", key_B, 1)
    logits_BxV = shapes.float_array("logits_BxV", logits_BxV, 2)
    rows, vocab = logits_BxV.shape
    if key_B.shape[0] != rows:
        raise ValueError(f"key_B has {key_B.shape[0]} rows, but logits_BxV has {rows}")
    shapes.scalar("temperature", temperature, logits_BxV.dtype)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if valid_vocab is not None and not 1 <= valid_vocab <= vocab:
        raise ValueError(f"valid_vocab must be in [1, {vocab}], got {valid_vocab}")

    logits_BxV = logits_BxV[:, :valid_vocab]
    if temperature == 0:
        token_B = jnp.argmax(logits_BxV, axis=1).astype(jnp.int32)
        return token_B, _take(logits_BxV, token_B) - jax.nn.logsumexp(logits_BxV, axis=1)

    scaled_BxV = logits_BxV / float(temperature)
    if top_k is None and top_p is None:
        return _draw(key_B, scaled_BxV)
    kept = min(top_k, scaled_BxV.shape[1]) if top_k is not None else scaled_BxV.shape[1]
    scaled_BxN, id_BxN = jax.lax.top_k(scaled_BxV, kept)
    if top_p is not None:
        p_BxN = jax.nn.softmax(scaled_BxN, axis=1)
        mass_before_BxN = jnp.cumsum(p_BxN, axis=1) - p_BxN
        # The first id is kept by name: its "mass before" is 0 only up to rounding.
        first_1xN = (jnp.arange(kept) == 0)[None, :]
        scaled_BxN = jnp.where((mass_before_BxN < top_p) | first_1xN, scaled_BxN, -jnp.inf)
    choice_B, logp_B = _draw(key_B, scaled_BxN)
    return _take(id_BxN, choice_B), logp_B


def _draw(key_B: jax.Array, scaled_BxV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Inverse CDF in two levels: a block of ids by its mass, then an id by its mass in the block.

    Exact by the chain rule. Against Gumbel noise it needs two uniforms a row, not V; against one
    level, no cumulative sum over V. The second level has a uniform of its own, so that ids far
    rarer than a float32 uniform's spacing (2^-23) keep their probability.
    """
    rows, vocab = scaled_BxV.shape
    width = math.isqrt(vocab - 1) + 1
    blocks = -(-vocab // width)
    top_Bx1 = jnp.max(scaled_BxV, axis=1, keepdims=True)
    scaled_BxMxW = jnp.pad(
        scaled_BxV, ((0, 0), (0, blocks * width - vocab)), constant_values=-jnp.inf
    ).reshape(rows, blocks, width)
    uniform_Bx2 = jax.vmap(lambda key: jax.random.uniform(key, (2,), scaled_BxV.dtype))(key_B)

    # The block's own weights are computed again rather than all of them stored.
    weight_BxM = jnp.sum(jnp.exp(scaled_BxMxW - top_Bx1[:, :, None]), axis=2)
    block_B = _invert_cdf(weight_BxM, uniform_Bx2[:, 0])
    scaled_BxW = jnp.take_along_axis(scaled_BxMxW, block_B[:, None, None], axis=1)[:, 0]
    weight_BxW = jnp.exp(scaled_BxW - top_Bx1)
    token_B = block_B * width + _invert_cdf(weight_BxW, uniform_Bx2[:, 1])

    log_total_B = top_Bx1[:, 0] + jnp.log(jnp.sum(weight_BxM, axis=1))
    return token_B, _take(scaled_BxV, token_B) - log_total_B


def _invert_cdf(weight_BxN: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds uniform * total; its weight is never 0."""
    cumulative_BxN = jnp.cumsum(weight_BxN, axis=1)
    # A cumulative sum in parallel may rise by rounding where the weight is 0: leave those out.
    cumulative_BxN = jnp.where(weight_BxN > 0, cumulative_BxN, 0.0)
    target_B = uniform_B * jnp.max(cumulative_BxN, axis=1)
    return jnp.argmax(cumulative_BxN > target_B[:, None], axis=1).astype(jnp.int32)


def _take(x_BxV: jax.Array, index_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BxV, index_B[:, None], axis=1)[:, 0]
