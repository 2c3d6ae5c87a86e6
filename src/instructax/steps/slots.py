"""Sampling in fewer rows than responses, apart on every batch shard."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax.batches import PromptBatch, Responses
from instructax.config import ModelConfig
from instructax.models import functional as model
from instructax.partitioning import by_batch_shard, parts
from instructax.rl.generate import Drawing
from instructax.rl.packing import read_prompts
from instructax.rl.slots import generate_in_slots

Array = Any
Params = Any


def group_size(prompts: int, copies: int, slots: int) -> int:
    """Prompts that are read at a time: as many as their responses fill all slots."""
    return min(prompts, max(1, slots // copies))


def sample_in_slots(
    copy: Params,
    key: Array,
    prompts: PromptBatch,
    source_UxRxL: Array | None,
    *,
    model_config: ModelConfig,
    slots: int,
    response_length: int,
    pad_id: int,
    drawing: Drawing,
    cache_dtype: str | None,
) -> Responses:
    """:func:`instructax.steps.rollout.sample_responses` in ``slots`` rows over all shards.

    A shard's slots take that shard's prompts; it waits for no other until all have ended.
    """
    shards = parts("batch")
    if slots % shards:
        raise ValueError(f"slots is {slots}, not a multiple of the {shards} batch shards")
    slots = slots // shards
    copies = key.shape[0] if key.shape else 1
    part = prompts.episode_B.shape[0] // shards
    size = group_size(part, copies, slots)
    groups = -(-part // size)
    if source_UxRxL is not None and source_UxRxL.shape[0] != shards * groups:
        raise ValueError(
            f"source_UxRxL has {source_UxRxL.shape[0]} groups, but {shards} shards of {part} prompts "
            f"in groups of {size} have {shards * groups}"
        )

    def sample(copy: Params, key: Array, prompts: PromptBatch, *source: Array) -> Responses:
        width = prompts.token_BxP.shape[1]
        # Rows beyond the last prompt read the first one again.
        index_I = jnp.arange(groups * size)
        index_I = jnp.where(index_I < part, index_I, 0)
        token_IxP, mask_IxP = prompts.token_BxP[index_I], prompts.mask_BxP[index_I]

        def prefill(g: Array) -> tuple[Array, Any]:
            token_WxP = jax.lax.dynamic_slice_in_dim(token_IxP, g * size, size)
            mask_WxP = jax.lax.dynamic_slice_in_dim(mask_IxP, g * size, size)
            if not source:
                return model.prefill(copy, model_config, token_WxP, mask_WxP, width, cache_dtype)
            source_RxL = source[0][g]
            # Of the shard's prompts the group's alone: its slots are counted from the group's first.
            begins = g * size * width
            source_RxL = jnp.where(source_RxL >= 0, source_RxL - begins, -1)
            layout, home_WxP = read_prompts(token_WxP, mask_WxP, source_RxL[None])
            return model.prefill_packed(copy, model_config, layout, home_WxP, width, cache_dtype)

        return generate_in_slots(
            key,
            prompts.episode_B,
            prefill,
            model.admit,
            lambda token_S, cache: model.decode(copy, model_config, token_S, cache),
            model.empty_cache(model_config, slots, width, width + response_length, cache_dtype),
            slots=slots,
            groups=groups,
            response_length=response_length,
            pad_id=pad_id,
            drawing=drawing,
        )

    source = () if source_UxRxL is None else (source_UxRxL,)
    return by_batch_shard(sample, whole=2)(copy, key, prompts, *source)
