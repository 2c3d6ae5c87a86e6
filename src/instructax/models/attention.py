"""Who sees whom: attention over a Layout, with a dense boolean mask; the semantics and the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instructax.batches import Layout
from instructax.config import ModelConfig
from instructax.models.families import family_attention
from instructax.models.flash import flash_attention, serves
from instructax.partitioning import parts

Array = Any

# Queries that are taken together: enough for an efficient product, few enough that little is computed in vain.
QUERY_BLOCK = 128
# Scores of one layer that are kept for the backward pass.
SCORE_BYTES = 2**30


def visible(layout: Layout, band_width: int | None = None) -> Array:
    """mask_BxLxL[b, i, j]: slot i sees slot j.

    j <= i, segment_j != 0, segment_j in {segment_i, prefix_i}; a banded layer also needs
    position_i - position_j < band_width.
    """
    length = layout.segment_BxL.shape[1]
    of_key = layout.segment_BxL[:, None, :]
    mask = of_key == layout.segment_BxL[:, :, None]
    if layout.prefixed:
        mask = mask | (of_key == layout.prefix_BxL[:, :, None])
    causal_LxL = jnp.tril(jnp.ones((length, length), bool))
    mask = mask & (of_key != 0) & causal_LxL[None]
    if band_width is not None:
        distance = layout.position_BxL[:, :, None] - layout.position_BxL[:, None, :]
        mask = mask & (distance < band_width)
    return mask


def attending(
    layout: Layout, config: ModelConfig, band_width: int | None
) -> Callable[[Array, Array, Array], Array]:
    """(q_BxLxHxC, k_BxLxGxC, v_BxLxGxC) -> out_BxLxHxC under :func:`visible`, by the cheapest way there is."""
    if layout.families is not None:
        families = layout.families
        return lambda q, k, v: family_attention(q, k, v, families, band_width)
    if serves(layout, config.num_heads, config.kv_heads, config.head_width):
        return lambda q, k, v: flash_attention(q, k, v, layout.segment_BxL, band_width)
    mask = visible(layout, band_width)
    return lambda q, k, v: causal_attention(q, heads_first(k), heads_first(v), mask)


def heads_first(x_BxSxGxC: Array) -> Array:
    """x_BxGxSxC: the form in which a head's keys lie together, so that a cache is read as it lies."""
    return jnp.swapaxes(x_BxSxGxC, 1, 2)


def attention(
    q_BxLxHxC: Array,
    k_BxGxSxC: Array,
    v_BxGxSxC: Array,
    mask_BxLxS: Array,
    width: int | None = None,
    key_scale_BxHxS: Array | None = None,
    value_scale_BxHxS: Array | None = None,
) -> Array:
    """softmax(q k^T / sqrt(width)) v where the mask allows, 0 for a query that sees nothing.

    Heads share keys and values in groups of H / G. Scores and softmax are float32. ``width`` is C unless
    given; the scales are factors of keys and values that are not spelt out.
    """
    rows, length, heads, across = q_BxLxHxC.shape
    groups = k_BxGxSxC.shape[1]
    shape = (rows, groups, heads // groups)
    q = q_BxLxHxC.reshape(rows, length, *shape[1:], across)
    score = jnp.einsum("blgrc,bgsc->bgrls", q, k_BxGxSxC, preferred_element_type=jnp.float32)
    score = score * (across if width is None else width) ** -0.5
    if key_scale_BxHxS is not None:
        score = score * key_scale_BxHxS.reshape(*shape, 1, -1)
    mask = mask_BxLxS[:, None, None]
    weight = jax.nn.softmax(jnp.where(mask, score, jnp.finfo(jnp.float32).min), axis=-1)
    if value_scale_BxHxS is not None:
        weight = weight * value_scale_BxHxS.reshape(*shape, 1, -1)
    out = jnp.einsum("bgrls,bgsc->blgrc", weight.astype(v_BxGxSxC.dtype), v_BxGxSxC)
    out = out.reshape(rows, length, heads, across)
    # A query with an empty mask got uniform weights: 0 instead, so that padding cannot leak.
    return jnp.where(mask_BxLxS.any(axis=-1)[:, :, None, None], out, 0.0)


def causal_attention(
    q_BxLxHxC: Array, k_BxGxLxC: Array, v_BxGxLxC: Array, mask_BxLxL: Array
) -> Array:
    """:func:`attention` under a mask that shows no query a later key.

    A block of queries reads the keys up to its own end alone, so that half of the scores are never
    computed. Where what is left would take more than SCORE_BYTES on one device, blocks are walked one
    after the other instead, each over all keys, and the backward pass computes its scores again: twice
    the products for the memory of one block.
    """
    rows, length, heads, _ = q_BxLxHxC.shape
    if not _scores_fit(rows, heads, length):
        return _walked(q_BxLxHxC, k_BxGxLxC, v_BxGxLxC, mask_BxLxL)
    outs = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        keys, values = k_BxGxLxC[:, :, :stop], v_BxGxLxC[:, :, :stop]
        mask = mask_BxLxL[:, start:stop, :stop]
        outs.append(attention(q_BxLxHxC[:, start:stop], keys, values, mask))
    return jnp.concatenate(outs, axis=1)


def _scores_fit(rows: int, heads: int, length: int) -> bool:
    of_device = max(1, rows // parts("batch")) * max(1, heads // parts("heads"))
    pairs = length * length // 2
    return 4 * of_device * pairs <= SCORE_BYTES


def _walked(q_BxLxHxC: Array, k_BxGxLxC: Array, v_BxGxLxC: Array, mask_BxLxL: Array) -> Array:
    rows, length, heads, width = q_BxLxHxC.shape
    blocks = -(-length // QUERY_BLOCK)

    def split(x_BxLxZ: Array) -> Array:
        more = blocks * QUERY_BLOCK - length
        x = jnp.pad(x_BxLxZ, ((0, 0), (0, more)) + ((0, 0),) * (x_BxLxZ.ndim - 2))
        return jnp.swapaxes(x.reshape((rows, blocks, QUERY_BLOCK) + x.shape[2:]), 0, 1)

    one = jax.checkpoint(attention)
    out = jax.lax.map(
        lambda q_mask: one(q_mask[0], k_BxGxLxC, v_BxGxLxC, q_mask[1]),
        (split(q_BxLxHxC), split(mask_BxLxL)),
    )
    return jnp.swapaxes(out, 0, 1).reshape(rows, -1, heads, width)[:, :length]
