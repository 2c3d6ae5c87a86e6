"""Who sees whom: attention over a Layout, with a dense boolean mask; the semantics and the oracle."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax.batches import Layout

Array = Any


def visible(layout: Layout, band_width: int | None = None) -> Array:
    """mask_BxLxL[b, i, j]: slot i sees slot j.

    j <= i, segment_j != 0, segment_j in {segment_i, prefix_i}; a banded layer also needs
    position_i - position_j < band_width.
    """
    length = layout.segment_BxL.shape[1]
    of_key = layout.segment_BxL[:, None, :]
    own = of_key == layout.segment_BxL[:, :, None]
    prompt = of_key == layout.prefix_BxL[:, :, None]
    causal_LxL = jnp.tril(jnp.ones((length, length), bool))
    mask = (own | prompt) & (of_key != 0) & causal_LxL[None]
    if band_width is not None:
        distance = layout.position_BxL[:, :, None] - layout.position_BxL[:, None, :]
        mask = mask & (distance < band_width)
    return mask


def heads_first(x_BxSxGxC: Array) -> Array:
    """x_BxGxSxC: the form in which a head's keys lie together, so that a cache is read as it lies."""
    return jnp.swapaxes(x_BxSxGxC, 1, 2)


def attention(q_BxLxHxC: Array, k_BxGxSxC: Array, v_BxGxSxC: Array, mask_BxLxS: Array) -> Array:
    """softmax(q k^T / sqrt(C)) v where the mask allows, 0 for a query that sees nothing.

    Heads share keys and values in groups of H / G. Scores and softmax are float32.
    """
    rows, length, heads, width = q_BxLxHxC.shape
    groups = k_BxGxSxC.shape[1]
    q = q_BxLxHxC.reshape(rows, length, groups, heads // groups, width)
    score = jnp.einsum("blgrc,bgsc->bgrls", q, k_BxGxSxC, preferred_element_type=jnp.float32) * (
        width**-0.5
    )
    mask = mask_BxLxS[:, None, None]
    weight = jax.nn.softmax(jnp.where(mask, score, jnp.finfo(jnp.float32).min), axis=-1)
    out = jnp.einsum("bgrls,bgsc->blgrc", weight.astype(v_BxGxSxC.dtype), v_BxGxSxC)
    out = out.reshape(rows, length, heads, width)
    # A query with an empty mask got uniform weights: 0 instead, so that padding cannot leak.
    return jnp.where(mask_BxLxS.any(axis=-1)[:, :, None, None], out, 0.0)
