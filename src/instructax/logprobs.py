"""Hidden states x unembedding x tokens -> log-probability and entropy, in chunks, float32.

Logits of shape BxLxV are never held for a whole batch: the slots are walked in chunks whose logits
stay below a budget, and the backward pass computes each chunk's logits again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import shapes

Array = Any

CHUNK_BYTES = 256 * 2**20


def masked_logits(
    x: Array, unembedding_VxD: Array, vocab_size: int, temperature: float | Array = 1.0
) -> Array:
    """Logits x . W^T / temperature in float32 at least; padded vocabulary entries are -inf."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    temperature = shapes.scalar("temperature", temperature, dtype)
    logits = jnp.einsum(
        "...d,vd->...v", x, unembedding_VxD.astype(x.dtype), preferred_element_type=dtype
    )
    logits = logits / temperature
    padded = unembedding_VxD.shape[0]
    if padded == vocab_size:
        return logits
    real = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < vocab_size
    return jnp.where(real, logits, -jnp.inf)


def _statistics(
    x: Array, token: Array, unembedding: Array, vocab_size: int, temperature, with_entropy: bool
) -> tuple[Array, Array]:
    logits = masked_logits(x, unembedding, vocab_size, temperature)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    logp = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - normalizer
    if not with_entropy:
        return logp, jnp.zeros_like(logp)
    # Not normalizer - sum p logit, which loses the digits that large logits have in common.
    logp_V = logits - normalizer[..., None]
    finite_V = jnp.where(jnp.isneginf(logits), 0.0, logp_V)
    return logp, -(jnp.exp(logp_V) * finite_V).sum(axis=-1)


def slots_at_a_time(rows: int, vocabulary: int) -> int:
    """The largest number of slots whose float32 logits stay under CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * rows * vocabulary))


def chunked_token_statistics(
    x_BxLxD: Array,
    token_BxL: Array,
    unembedding_VxD: Array,
    *,
    vocab_size: int,
    temperature: float | Array = 1.0,
    with_entropy: bool = True,
    chunk: int | None = None,
) -> tuple[Array, Array]:
    """(logp_BxL, entropy_BxL) of tokens under softmax(x . W^T / temperature), in nats.

    Args:
      x_BxLxD: floating, the hidden states *before* each token; the product is taken in their
        dtype, everything behind it in float32 (float64 for float64 input).
      token_BxL: integers.
      unembedding_VxD: floating, W; rows from ``vocab_size`` on are padding of the vocabulary.
      chunk: the number of slots walked at a time; none picks what :func:`slots_at_a_time` gives
        for all rows.
      with_entropy: False leaves the entropy at 0.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    # Checked, and left in their own precision.
    shapes.float_array("x_BxLxD", x_BxLxD, 3)
    shapes.int_array("token_BxL", token_BxL, 2)
    shapes.float_array("unembedding_VxD", unembedding_VxD, 2)
    rows, length, width = x_BxLxD.shape
    if token_BxL.shape != (rows, length):
        raise ValueError(f"token_BxL has shape {token_BxL.shape}, but x_BxLxD {x_BxLxD.shape}")
    if unembedding_VxD.shape[1] != width:
        raise ValueError(
            f"unembedding_VxD has shape {unembedding_VxD.shape}, but x_BxLxD {x_BxLxD.shape}"
        )
    if not 1 <= vocab_size <= unembedding_VxD.shape[0]:
        raise ValueError(f"vocab_size must be in [1, {unembedding_VxD.shape[0]}], got {vocab_size}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if chunk is None:
        chunk = slots_at_a_time(rows, unembedding_VxD.shape[0])
    if chunk >= length:
        return _statistics(
            x_BxLxD, token_BxL, unembedding_VxD, vocab_size, temperature, with_entropy
        )
    chunks = -(-length // chunk)
    pad = chunks * chunk - length
    x = jnp.pad(x_BxLxD, ((0, 0), (0, pad), (0, 0))).reshape(rows, chunks, chunk, width)
    token = jnp.pad(token_BxL, ((0, 0), (0, pad))).reshape(rows, chunks, chunk)

    @jax.checkpoint
    def one(x_chunk, token_chunk, unembedding):
        return _statistics(x_chunk, token_chunk, unembedding, vocab_size, temperature, with_entropy)

    logp, entropy = jax.lax.map(
        lambda xt: one(xt[0], xt[1], unembedding_VxD), (x.swapaxes(0, 1), token.swapaxes(0, 1))
    )

    def join(y):
        return y.swapaxes(0, 1).reshape(rows, chunks * chunk)[:, :length]

    return join(logp), join(entropy)
