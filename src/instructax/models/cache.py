"""Cached decoding with the rollout copy: layers unrolled, one key-value cache per layer.

The training parameters are never used here: :func:`rollout_copy` unstacks them once an iteration,
because slicing stacked layers inside the decoding loop costs twice the time and a second copy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax.batches import Layout, padded_layout, pytree
from instructax.config import ModelConfig
from instructax.models import decoding
from instructax.models.attention import attending, heads_first
from instructax.models.layers import Block, join_qkv, part_qkv
from instructax.models.stored import Stored, heads_joined, like, look, put, store
from instructax.models.transformer import embed, finish
from instructax.partitioning import parts

Array = Any
Params = Any


@pytree
class Cache:
    """Keys and values of what has been read, and of which position they are in every row.

    The slots behind the prompts are a ring, and all rows write the next token into the same slot of
    it, whatever its position: rows that began at other times decode together without a scatter. A
    row must have ended when the ring comes round to its first token.
    """

    key: tuple[Stored, ...]  # one per layer
    value: tuple[Stored, ...]  # one per layer
    position_BxS: Array  # int32, -1 where there is nothing for this row to see
    next_B: Array  # int32, the position of the next token
    slot: Array  # int32 scalar, where it is written
    ring: Array  # int32 scalar, the first slot behind the prompts


def rollout_copy(params: Params, config: ModelConfig) -> Params:
    """Parameters for decoding, where decoding has them: a tuple of layers, in the compute dtype; the unembedding as well.

    Queries, keys and values of a token are one product, and go to the cache together.
    """
    copy = jax.tree.map(lambda p: p.astype(config.compute_dtype), params)
    copy["blocks"]["attn"] = join_qkv(copy["blocks"]["attn"], config)
    copy = decoding.placed(copy, config)
    blocks = copy["blocks"]
    copy["blocks"] = tuple(decoding.layer(blocks, i, config) for i in range(config.num_layers))
    return copy


def _band(config: ModelConfig, layer: int) -> int | None:
    kind = config.attention_pattern[layer % len(config.attention_pattern)]
    return config.band_width if kind == "banded" else None


def _apply(block: Block, params: Params, x: Array, position_BxL: Array, attend: Any) -> Any:
    return block.apply({"params": params}, x, position_BxL, attend)


def _read(copy: Params, config: ModelConfig, layout: Layout) -> tuple[Array, list, list]:
    """(x_RxLxD before the final norm, keys, values), one RxGxLxC a layer."""
    block = Block(config)
    x = embed(copy, config, layout.token_BxL, layout.position_BxL)
    keys: list[Array] = []
    values: list[Array] = []
    for i, params in enumerate(copy["blocks"]):
        of_layer = attending(layout, config, _band(config, i))

        def attend(q, k, v, of_layer=of_layer):
            return of_layer(q, k, v), (heads_first(k), heads_first(v))

        if parts("d_model") > 1:
            # Not before its turn: the kernels of all layers, gathered ahead, would be the whole model.
            params, x = jax.lax.optimization_barrier((params, x))
        # Of many tokens they are three: what is kept of each layer would be the whole product otherwise.
        params = {**params, "attn": part_qkv(params["attn"], config)}
        x, (key, value) = _apply(block, params, x, layout.position_BxL, attend)
        keys.append(key)
        values.append(value)
    return x, keys, values


def _cache(
    config: ModelConfig, keys: list, values: list, mask_BxP: Array, slots: int, dtype: str | None
) -> Cache:
    """A cache of ``slots`` slots that begins with these prompts."""
    length = mask_BxP.shape[1]
    if slots < length:
        raise ValueError(f"slots is {slots}, but the prompts take {length}")
    pad = ((0, 0), (0, 0), (0, slots - length), (0, 0))
    joined = heads_joined(config.kv_heads, config.num_heads // config.kv_heads)
    count_BxP = jnp.cumsum(mask_BxP.astype(jnp.int32), axis=1)
    position_BxP = jnp.where(mask_BxP, count_BxP - 1, -1)
    return Cache(
        key=tuple(store(jnp.pad(key, pad), dtype, joined) for key in keys),
        value=tuple(store(jnp.pad(value, pad), dtype, joined) for value in values),
        position_BxS=jnp.pad(position_BxP, ((0, 0), (0, slots - length)), constant_values=-1),
        next_B=count_BxP[:, -1],
        slot=jnp.asarray(length, jnp.int32),
        ring=jnp.asarray(length, jnp.int32),
    )


def prefill(
    copy: Params,
    config: ModelConfig,
    token_BxP: Array,
    mask_BxP: Array,
    slots: int,
    dtype: str | None = None,
) -> tuple[Array, Cache]:
    """Read left-padded prompts. Returns (hidden_BxD of the last token, cache with ``slots`` slots)."""
    x, keys, values = _read(copy, config, padded_layout(token_BxP, mask_BxP))
    cache = _cache(config, keys, values, mask_BxP, slots, dtype)
    return finish(copy, config, x[:, -1:])[:, 0], cache


def prefill_packed(
    copy: Params,
    config: ModelConfig,
    layout: Layout,
    home_BxP: Array,
    slots: int,
    dtype: str | None = None,
    shards: int = 1,
) -> tuple[Array, Cache]:
    """:func:`prefill` of prompts that lie packed in rows, each a segment of its own.

    Args:
      home_BxP: which slot of the layout, counted through its R rows, holds each slot of the
        left-padded prompts; -1 is padding. Rows may name the same slots: samples of one prompt.
      shards: R and B lie in so many equal parts, and a part's ``home`` names slots of its own
        part, counted from its beginning, so that keys and values stay on their device.
    """
    x, keys, values = _read(copy, config, layout)
    mask_BxP = home_BxP >= 0
    index_BxP = jnp.where(mask_BxP, home_BxP, 0)

    def gather(y_RxLxF: Array, index_BxI: Array) -> Array:
        """Behind a leading axis of shards, so that a mesh need not move anything."""
        width = y_RxLxF.shape[-1]
        found = jnp.take_along_axis(
            y_RxLxF.reshape(shards, -1, width), index_BxI.reshape(shards, -1, 1), axis=1
        )
        return found.reshape(*index_BxI.shape, width)

    def home(y_RxGxLxC: Array) -> Array:
        _, groups, _, width = y_RxGxLxC.shape
        y_RxLxF = heads_first(y_RxGxLxC).reshape(*layout.token_BxL.shape, groups * width)
        return heads_first(gather(y_RxLxF, index_BxP).reshape(*index_BxP.shape, groups, width))

    keys, values = [home(k) for k in keys], [home(v) for v in values]
    cache = _cache(config, keys, values, mask_BxP, slots, dtype)
    return finish(copy, config, gather(x, index_BxP[:, -1:]))[:, 0], cache


def empty(
    config: ModelConfig, rows: int, prompt_slots: int, slots: int, dtype: str | None
) -> Cache:
    """A cache in which nobody sees anything; :func:`admit` fills its rows."""
    nothing = jnp.zeros(
        (rows, config.kv_heads, prompt_slots, config.head_width), config.compute_dtype
    )
    layers = [nothing] * config.num_layers
    nobody = jnp.zeros((rows, prompt_slots), bool)
    return _cache(config, layers, layers, nobody, slots, dtype)


def repeat_rows(cache: Cache, copies: int) -> Cache:
    """Every row ``copies`` times, one behind another: samples of one prompt."""

    def rows(x: Array) -> Array:
        return jnp.repeat(x, copies, axis=0) if x.ndim else x

    return jax.tree.map(rows, cache)


def admit(cache: Cache, prompts: Cache, row: Array, prompt: Array) -> Cache:
    """The cache with a row of ``prompts``, which holds prompts alone, in place of one of its own."""

    def taken(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, prompt, 1)

    def placed(stored: Stored, new: Stored) -> Stored:
        return put(stored, jax.tree.map(taken, new), row, 0)

    position_1xP = taken(prompts.position_BxS)
    ring = cache.position_BxS.shape[1] - position_1xP.shape[1]
    position_1xS = jnp.pad(position_1xP, ((0, 0), (0, ring)), constant_values=-1)
    return Cache(
        key=tuple(map(placed, cache.key, prompts.key)),
        value=tuple(map(placed, cache.value, prompts.value)),
        position_BxS=jax.lax.dynamic_update_slice_in_dim(
            cache.position_BxS, position_1xS, row, axis=0
        ),
        next_B=cache.next_B.at[row].set(prompts.next_B[prompt]),
        slot=cache.slot,
        ring=cache.ring,
    )


def decode(copy: Params, config: ModelConfig, token_B: Array, cache: Cache) -> tuple[Array, Cache]:
    """Read one token a row into the cache's next slot. Returns (hidden_BxD, cache)."""
    slot = cache.slot
    # Rows that have ended go on until the last has: their positions must not leave the table.
    position_Bx1 = jnp.minimum(cache.next_B, config.context_length - 1)[:, None]
    position_BxS = jax.lax.dynamic_update_slice_in_dim(
        cache.position_BxS, position_Bx1, slot, axis=1
    )
    block = Block(config, decoding=True)
    x = decoding.stream(embed(copy, config, token_B[:, None], position_Bx1), config)
    keys, values = [], []
    for i, params in enumerate(copy["blocks"]):
        band = _band(config, i)
        mask = position_BxS >= 0
        if band is not None:
            mask = mask & (position_BxS > position_Bx1 - band)

        def attend(q, k, v, i=i, mask=mask, band=band):
            key, value = cache.key[i], cache.value[i]
            key = put(key, like(heads_first(k), key), 0, slot)
            value = put(value, like(heads_first(v), value), 0, slot)
            return look(q, key, value, mask[:, None], band), (key, value)

        x, (key, value) = _apply(block, params, x, position_Bx1, attend)
        keys.append(key)
        values.append(value)
    following = jnp.where(slot + 1 == position_BxS.shape[1], cache.ring, slot + 1)
    cache = Cache(tuple(keys), tuple(values), position_BxS, cache.next_B + 1, following, cache.ring)
    return finish(copy, config, x)[:, 0], cache
