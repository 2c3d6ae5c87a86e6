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
from instructax.models.attention import attention, heads_first, visible
from instructax.models.layers import Block
from instructax.models.transformer import embed, finish

Array = Any
Params = Any


@pytree
class Cache:
    """Keys and values of what has been read. Slot s of row b holds position s - start_b."""

    key: tuple[Array, ...]  # one per layer, BxGxSxC
    value: tuple[Array, ...]  # one per layer, BxGxSxC
    start_B: Array  # int32, the first real slot: prompts are left-padded
    length: Array  # int32 scalar, slots written so far


def rollout_copy(params: Params, config: ModelConfig) -> Params:
    """Parameters for decoding: a tuple of layers, in the compute dtype; the unembedding as well."""
    copy = jax.tree.map(lambda p: p.astype(config.compute_dtype), params)
    copy["blocks"] = tuple(
        jax.tree.map(lambda p, i=i: p[i], copy["blocks"]) for i in range(config.num_layers)
    )
    return copy


def _band(config: ModelConfig, layer: int) -> int | None:
    kind = config.attention_pattern[layer % len(config.attention_pattern)]
    return config.band_width if kind == "banded" else None


def _apply(block: Block, params: Params, x: Array, position_BxL: Array, attend: Any) -> Any:
    return block.apply({"params": params}, x, position_BxL, attend)


def prefill(
    copy: Params, config: ModelConfig, token_BxP: Array, mask_BxP: Array, slots: int
) -> tuple[Array, Cache]:
    """Read left-padded prompts. Returns (hidden_BxD of the last token, cache with ``slots`` slots)."""
    length = token_BxP.shape[1]
    if slots < length:
        raise ValueError(f"slots is {slots}, but the prompts take {length}")
    layout: Layout = padded_layout(token_BxP, mask_BxP)
    block = Block(config)
    x = embed(copy, config, layout.token_BxL, layout.position_BxL)
    pad = ((0, 0), (0, 0), (0, slots - length), (0, 0))
    keys: list[Array] = []
    values: list[Array] = []
    for i, params in enumerate(copy["blocks"]):
        mask = visible(layout, _band(config, i))

        def attend(q, k, v, mask=mask):
            k, v = heads_first(k), heads_first(v)
            return attention(q, k, v, mask), (k, v)

        x, (key, value) = _apply(block, params, x, layout.position_BxL, attend)
        key, value = jnp.pad(key, pad), jnp.pad(value, pad)
        keys.append(key)
        values.append(value)
    cache = Cache(
        key=tuple(keys),
        value=tuple(values),
        start_B=length - mask_BxP.astype(jnp.int32).sum(axis=1),
        length=jnp.asarray(length, jnp.int32),
    )
    return finish(copy, config, x[:, -1:])[:, 0], cache


def decode(copy: Params, config: ModelConfig, token_B: Array, cache: Cache) -> tuple[Array, Cache]:
    """Read one token a row at the cache's next slot. Returns (hidden_BxD, cache)."""
    slot = cache.length
    slot_S = jnp.arange(cache.key[0].shape[2], dtype=jnp.int32)
    position_Bx1 = (slot - cache.start_B)[:, None]
    seen_BxS = (slot_S[None] >= cache.start_B[:, None]) & (slot_S[None] <= slot)
    block = Block(config)
    x = embed(copy, config, token_B[:, None], position_Bx1)
    keys, values = [], []
    for i, params in enumerate(copy["blocks"]):
        band = _band(config, i)
        mask = seen_BxS if band is None else seen_BxS & (slot_S[None] > slot - band)

        def attend(q, k, v, i=i, mask=mask):
            k, v = heads_first(k), heads_first(v)
            key = jax.lax.dynamic_update_slice_in_dim(cache.key[i], k, slot, axis=2)
            value = jax.lax.dynamic_update_slice_in_dim(cache.value[i], v, slot, axis=2)
            return attention(q, key, value, mask[:, None]), (key, value)

        x, (key, value) = _apply(block, params, x, position_Bx1, attend)
        keys.append(key)
        values.append(value)
    cache = Cache(tuple(keys), tuple(values), cache.start_B, slot + 1)
    return finish(copy, config, x)[:, 0], cache
