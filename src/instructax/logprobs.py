"""Hidden states x unembedding x tokens -> log-probability and entropy, in chunks, float32.

Logits of shape BxLxV are never held for a whole batch: the slots are walked in chunks whose logits
stay below a budget, and the backward pass computes each chunk's logits again.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = Any

CHUNK_BYTES = 256 * 2**20


def masked_logits(
    x: Array, unembedding_VxD: Array, vocab_size: int, temperature: float | Array = 1.0
) -> Array:
    """float32 logits x . W^T / temperature; padded vocabulary entries are -inf."""
    logits = jnp.einsum(
        "...d,vd->...v", x, unembedding_VxD.astype(x.dtype), preferred_element_type=jnp.float32
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
    finite = jnp.where(jnp.isneginf(logits), 0.0, logits)
    probability = jnp.exp(logits - normalizer[..., None])
    return logp, normalizer - (probability * finite).sum(axis=-1)


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
    """(logp_BxL, entropy_BxL) of tokens under softmax(x . W^T / temperature), float32.

    x_BxLxD are the hidden states *before* each token. ``chunk`` is the number of slots walked at
    a time; none picks the largest whose logits stay under CHUNK_BYTES. Entropy is 0 where
    ``with_entropy`` is False.
    """
    rows, length, width = x_BxLxD.shape
    if chunk is None:
        chunk = max(1, CHUNK_BYTES // (4 * rows * unembedding_VxD.shape[0]))
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
