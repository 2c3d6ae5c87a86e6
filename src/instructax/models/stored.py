"""Keys and values as they lie in a cache, and a query's look at them, in whatever dtype they are kept."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax.batches import pytree
from instructax.models.attention import attention

Array = Any


@pytree
class Stored:
    """x_BxGxSxC = data * scale; a scale for every slot and head where data are int8, none elsewhere."""

    data: Array  # BxGxSxC
    scale: Array | None  # BxGxS, float32


def store(x_BxGxSxC: Array, dtype: str | None) -> Stored:
    """x as it is kept. int8 keeps x / (max over C of |x| / 127), rounded; None keeps x's own dtype."""
    if dtype != "int8":
        return Stored(x_BxGxSxC.astype(x_BxGxSxC.dtype if dtype is None else dtype), None)
    x = x_BxGxSxC.astype(jnp.float32)
    scale_BxGxS = jnp.max(jnp.abs(x), axis=-1) / 127.0
    divisor_BxGxS = jnp.where(scale_BxGxS > 0, scale_BxGxS, 1.0)
    return Stored(jnp.round(x / divisor_BxGxS[..., None]).astype(jnp.int8), scale_BxGxS)


def like(new_BxGxSxC: Array, stored: Stored) -> Stored:
    """``new`` in the form of ``stored``."""
    return store(new_BxGxSxC, stored.data.dtype.name)


def put(stored: Stored, new: Stored, row: Array | int, slot: Array | int) -> Stored:
    """``new`` written over ``stored``, from a row and a slot on."""
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice(x, y, (row, 0, slot, 0)[: x.ndim]),
        stored,
        new,
    )


def look(q_BxLxHxC: Array, key: Stored, value: Stored, mask_BxLxS: Array) -> Array:
    """:func:`attention`, of which int8 is never spelt out: a slot's scales leave both products."""
    dtype = q_BxLxHxC.dtype
    k, v = key.data.astype(dtype), value.data.astype(dtype)
    if key.scale is None or value.scale is None:
        return attention(q_BxLxHxC, k, v, mask_BxLxS)
    rows, length, heads, width = q_BxLxHxC.shape
    groups = k.shape[1]
    q = q_BxLxHxC.reshape(rows, length, groups, heads // groups, width)
    score = jnp.einsum("blgrc,bgsc->bgrls", q, k, preferred_element_type=jnp.float32)
    score = score * key.scale[:, :, None, None] * width**-0.5
    score = jnp.where(mask_BxLxS[:, None, None], score, jnp.finfo(jnp.float32).min)
    weight = jax.nn.softmax(score, axis=-1) * value.scale[:, :, None, None]
    out = jnp.einsum("bgrls,bgsc->blgrc", weight.astype(dtype), v)
    return out.reshape(rows, length, heads, width)
