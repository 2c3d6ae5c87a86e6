"""Keys and values as they lie in a cache, and a query's look at them, in whatever dtype they are kept.

A cache is BxGxSxC, or Bx(G/J)xSx(JC) with J heads side by side. A matrix unit takes 8 rows at the price of
one, so J queries, each with zeros in the places of the others' heads, are one product of 8 rows and JC inputs.
By a TPU compiler's cycles one look at 2,048 slots of 32 rows and 32 heads is then 2.2 times as fast.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.batches import pytree
from instructax.models import decoding_kernel
from instructax.models.attention import attention
from instructax.partitioning import parts, platform

Array = Any

TILE_ROWS = 8  # of what a TPU's matrix unit multiplies at a time


@pytree
class Stored:
    """x = data * scale; a scale for every slot and head where data are int8, none elsewhere."""

    data: Array  # Bx(G/J)xSx(JC)
    scale: Array | None  # BxGxS, float32


def heads_joined(groups: int, queries: int) -> int:
    """J for so many key-value heads with so many queries each; 1 where the platform gains nothing by it."""
    if platform() != "tpu":
        return 1
    return math.gcd(groups // parts("kv_heads"), max(1, TILE_ROWS // queries))


def store(x_BxGxSxC: Array, dtype: str | None, joined: int = 1) -> Stored:
    """x as it is kept, ``joined`` heads side by side.

    int8 keeps x / (max over C of |x| / 127), rounded; None keeps x's own dtype.
    """
    if dtype != "int8":
        return Stored(
            _join(x_BxGxSxC.astype(x_BxGxSxC.dtype if dtype is None else dtype), joined), None
        )
    x = x_BxGxSxC.astype(jnp.float32)
    scale_BxGxS = jnp.max(jnp.abs(x), axis=-1) / 127.0
    divisor_BxGxS = jnp.where(scale_BxGxS > 0, scale_BxGxS, 1.0)
    data = jnp.round(x / divisor_BxGxS[..., None]).astype(jnp.int8)
    return Stored(_join(data, joined), scale_BxGxS)


def _join(x_BxGxSxC: Array, joined: int) -> Array:
    if joined == 1:
        return x_BxGxSxC
    rows, groups, slots, width = x_BxGxSxC.shape
    x = x_BxGxSxC.reshape(rows, groups // joined, joined, slots, width)
    return jnp.swapaxes(x, 2, 3).reshape(rows, groups // joined, slots, joined * width)


def like(new_BxGxSxC: Array, stored: Stored) -> Stored:
    """``new`` in the form of ``stored``."""
    joined = stored.data.shape[-1] // new_BxGxSxC.shape[-1]
    return store(new_BxGxSxC, stored.data.dtype.name, joined)


def put(stored: Stored, new: Stored, row: Array | int, slot: Array | int) -> Stored:
    """``new`` written over ``stored``, from a row and a slot on."""
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_slice(x, y, (row, 0, slot, 0)[: x.ndim]),
        stored,
        new,
    )


def look(
    q_BxLxHxC: Array, key: Stored, value: Stored, mask_BxLxS: Array, reach: int | None = None
) -> Array:
    """:func:`attention`, of which int8 is never spelt out: a slot's scales leave both products.

    ``reach``: a query sees at most so many slots; None: it may see all.
    """
    rows, length, heads, width = q_BxLxHxC.shape
    groups, slots, joined_width = key.data.shape[1:]
    joined = joined_width // width
    queries = heads // (groups * joined)  # of a key-value head
    scales = [_of_queries(stored, queries) for stored in (key, value)]
    if length == 1 and decoding_kernel.serves(rows, groups, slots, joined_width):
        apart = (rows, groups, heads // groups)
        return decoding_kernel.cached_attention(
            q_BxLxHxC.reshape(*apart, width),
            key.data,
            value.data,
            mask_BxLxS[:, 0],
            reach,
            *(None if scale is None else scale.reshape(*apart, slots) for scale in scales),
        ).reshape(q_BxLxHxC.shape)
    # Whether a head's keys lie at a place: a query has zeros at all others, and leaves their values.
    place_HxJ = np.arange(heads)[:, None] // queries % joined == np.arange(joined)
    own = np.asarray(place_HxJ, q_BxLxHxC.dtype)[None, None, :, :, None]
    q = (q_BxLxHxC[:, :, :, None] * own).reshape(rows, length, heads, joined_width)
    k, v = (stored.data.astype(q.dtype) for stored in (key, value))
    out = attention(q, k, v, mask_BxLxS, width, *scales)
    return (out.reshape(rows, length, heads, joined, width) * own).sum(axis=3)


def _of_queries(stored: Stored, queries: int) -> Array | None:
    """scale_BxHxS."""
    return None if stored.scale is None else jnp.repeat(stored.scale, queries, axis=1)
