"""Episodes laid tightly into rows, so that no program pays for padding.

A plan is one array, ``source_RxL``: which slot of the padded episodes, counted through all of them,
lies in each slot of R rows; -1 is padding. It is made on the host, where lengths are known; the
device gathers by it. Rows come in few numbers, so that few programs are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.batches import (
    EPISODE_WIDTHS,
    Layout,
    Rollout,
    first_fit,
    padded_layout,
    scored_slots,
)
from instructax.partitioning import constrain

Array = Any

# Padded slots up to which a row is as long as two of them: more fits, and attention, which looks further, is a small part.
SHORT_PROMPT, SHORT_EPISODE = 512, 1024


def _few(n: int) -> int:
    """n rounded up to 4, 5, 6 or 7 times a power of two: another number of rows is another program."""
    step = 2 ** max(0, n.bit_length() - 3)
    return -(-n // step) * step


def padded_rows(order_UxM: np.ndarray, width: int) -> np.ndarray:
    """source_UxMxL of episodes that keep a row each: the plain form."""
    return order_UxM[:, :, None] * width + np.arange(width, dtype=np.int32)


def packed_rows(
    order_UxM: np.ndarray,
    start_B: np.ndarray,
    length_B: np.ndarray,
    width: int,
    shards: int = 1,
    share: int = 1,
    limit: tuple[np.ndarray, int] | None = None,
) -> np.ndarray:
    """source_UxRxL with the M episodes of each of U groups packed into R <= M rows, longest first.

    Args:
      order_UxM: the episodes of each group; -1 is none.
      start_B: first real slot of each padded episode.
      length_B: its real slots, which are contiguous.
      width: slots of a padded row.
      shards: R is a multiple of it; M must be.
      share: L is as many times ``width``, so that R <= M / share, rounded up, unless ``limit`` takes more.
      limit: slots of each episode's response, and how many such slots a row takes at most.

    Raises:
      ValueError: an episode that leaves its row, or M that ``shards`` does not divide.
    """
    start_B, length_B = np.asarray(start_B), np.asarray(length_B)
    groups, size = order_UxM.shape
    if size % shards:
        raise ValueError(f"order_UxM has {size} episodes a group, not a multiple of {shards}")
    if (start_B < 0).any() or (length_B < 0).any() or (start_B + length_B > width).any():
        raise ValueError(f"start_B and length_B must lie within rows of {width} slots")
    there_UxM = [order_M[order_M >= 0] for order_M in order_UxM]
    longest_first_UxM = [order_M[length_B[order_M].argsort()[::-1]] for order_M in there_UxM]
    capacity, most = share * width, -(-size // share // shards) * shards
    limited_B, limited = limit or (np.zeros_like(length_B), 0)
    size_Bx2 = np.stack([length_B, limited_B], 1)
    plans = [first_fit(size_Bx2[order_M], (capacity, limited)) for order_M in longest_first_UxM]
    needed = -(-max(map(len, plans)) // shards)  # of a shard
    rows = max(needed * shards, min(most, _few(needed) * shards))
    source_UxRxL = np.full((groups, rows, capacity), -1, np.int32)
    for group, (order_M, plan) in enumerate(zip(longest_first_UxM, plans, strict=True)):
        for row, members in enumerate(plan):
            slot = 0
            for episode in order_M[members]:
                first, length = episode * width + start_B[episode], length_B[episode]
                source_UxRxL[group, row, slot : slot + length] = np.arange(first, first + length)
                slot += length
    return source_UxRxL


def episode_rows(
    order_UxM: np.ndarray,
    prompt_mask_BxP: np.ndarray,
    response_length_B: np.ndarray,
    slots: int,
    *,
    packed: bool = True,
    shards: int = 1,
) -> np.ndarray:
    """source_UxRxL of sampled episodes: left-padded prompts of P slots, responses in ``slots`` more.

    Rows of short episodes are two episodes long where that saves anything: were they long only where that is best, lengths
    that drift would change between the two, and each is a program. Responses have as few of a row's slots as take no more
    rows (``EPISODE_WIDTHS``): a row mostly costs more than its logits.
    """
    prompt_slots = prompt_mask_BxP.shape[1]
    width = prompt_slots + slots
    if not packed:
        return padded_rows(order_UxM, width)
    prompt_B = np.asarray(prompt_mask_BxP).sum(axis=1)
    response_B = np.asarray(response_length_B)

    def pack(share: int, responses: int | None = None) -> np.ndarray:
        start_B, length_B = prompt_slots - prompt_B, prompt_B + response_B
        limit = None if responses is None else (response_B, responses)
        return packed_rows(order_UxM, start_B, length_B, width, shards, share, limit)

    share = 2 if width <= SHORT_EPISODE and order_UxM.shape[1] % (2 * shards) == 0 else 1
    plan_UxRxL = pack(share)
    if plan_UxRxL.size == order_UxM.size * width:
        share, plan_UxRxL = 1, pack(1)
    length, (widths, least) = share * width, EPISODE_WIDTHS
    for responses in -(-length // widths) * np.arange(least, widths):
        if slots <= responses < length:
            limited_UxRxL = pack(share, int(responses))
            if limited_UxRxL.shape[1] <= plan_UxRxL.shape[1]:
                return limited_UxRxL
    return plan_UxRxL


def scored_rows(source_UxRxL: np.ndarray, prompt_slots: int, width: int) -> np.ndarray | None:
    """scored_UxRxM: the slots of :func:`episode_rows` that hold a response, -1 behind them; None means all.

    Only there are logits needed.
    """
    is_response_UxRxL = (source_UxRxL >= 0) & (source_UxRxL % width >= prompt_slots)
    scored_NxM = scored_slots(is_response_UxRxL.reshape(-1, source_UxRxL.shape[2]), *EPISODE_WIDTHS)
    return None if scored_NxM is None else scored_NxM.reshape(*source_UxRxL.shape[:2], -1)


def prompt_rows(mask_MxP: np.ndarray, group: int | None = None, shards: int = 1) -> np.ndarray:
    """source_UxRxL of left-padded prompts, packed by shard and, within a shard, by groups to be read one by one.

    Rows are two prompts long where prompts are short: more fits, and attention is a small part there.

    Args:
      group: prompts of a group; None reads all prompts of a shard at once.
      shards: equal parts of the prompts. A plan's slots are counted within its own part.
    """
    mask_MxP = np.asarray(mask_MxP)
    prompts, width = mask_MxP.shape
    if prompts % shards:
        raise ValueError(f"mask_MxP has {prompts} prompts, not a multiple of {shards}")
    part = prompts // shards
    size = part if group is None else min(group, part)
    order = np.arange(-(-part // size) * size, dtype=np.int32)
    order_GxW = np.where(order < part, order, -1).reshape(-1, size)
    order_UxW = np.concatenate(
        [np.where(order_GxW < 0, -1, order_GxW + i * part) for i in range(shards)]
    )
    length_M = mask_MxP.sum(axis=1)
    share = 2 if width <= SHORT_PROMPT else 1
    source_UxRxL = packed_rows(order_UxW, width - length_M, length_M, width, share=share)
    begins_U = np.repeat(np.arange(shards) * part * width, len(order_GxW)).astype(np.int32)
    return np.where(source_UxRxL < 0, -1, source_UxRxL - begins_U[:, None, None])


def read_prompts(
    token_MxP: Array, mask_MxP: Array, source_DxRxL: Array, copies: int = 1
) -> tuple[Layout, Array]:
    """(layout of D R packed rows, home_BxP): a :func:`prompt_rows` plan of a group for each of D parts.

    ``home`` says which slot of its part's rows holds each slot of a prompt, ``copies`` rows a prompt
    one behind another; -1 is padding, and what this plan does not read.
    """
    parts, rows, length = source_DxRxL.shape
    prompts, width = token_MxP.shape
    size = prompts // parts * width
    part_D = jnp.arange(parts, dtype=jnp.int32)
    offset_Dx1x1 = (part_D * size)[:, None, None]
    everywhere_DxRxL = jnp.where(source_DxRxL >= 0, source_DxRxL + offset_Dx1x1, -1)
    layout = take_layout(
        padded_layout(token_MxP, mask_MxP), everywhere_DxRxL.reshape(parts * rows, length)
    )
    slot_DxI = source_DxRxL.reshape(parts, rows * length)
    # One slot more than there are takes what padding writes.
    home_DxJ = jnp.full((parts, size + 1), -1, jnp.int32)
    home_DxJ = home_DxJ.at[part_D[:, None], jnp.where(slot_DxI >= 0, slot_DxI, size)].set(
        jnp.arange(rows * length, dtype=jnp.int32)[None]
    )
    home_MxP = home_DxJ[:, :size].reshape(prompts, width)
    return layout, jnp.repeat(home_MxP, copies, axis=0)


def take(x_BxL: Array, source_RxL: Array) -> Array:
    """The slots that a plan names, 0 where it names none."""
    taken_RxL = jnp.where(source_RxL >= 0, x_BxL.reshape(-1)[source_RxL], 0).astype(x_BxL.dtype)
    return constrain(taken_RxL, "batch", None)


def take_layout(layout: Layout, source_RxL: Array) -> Layout:
    """The rows of a plan as a layout: every episode a segment of its own, its positions kept.

    ``layout`` must hold one episode a row (segments 0 and 1, no prefixes).
    """
    length = layout.token_BxL.shape[1]
    real_RxL = take(layout.segment_BxL, source_RxL) > 0
    episode_RxL = jnp.where(real_RxL, source_RxL // length, -1)
    left_RxL = jnp.pad(episode_RxL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    begins_RxL = real_RxL & (episode_RxL != left_RxL)
    segment_RxL = jnp.where(real_RxL, jnp.cumsum(begins_RxL.astype(jnp.int32), axis=1), 0)
    return Layout(
        token_BxL=take(layout.token_BxL, source_RxL),
        position_BxL=take(layout.position_BxL, source_RxL),
        segment_BxL=segment_RxL,
        prefix_BxL=jnp.zeros_like(segment_RxL),
        prefixed=False,
    )


def take_rollout(rollout: Rollout, source_RxL: Array, scored_RxM: Array | None = None) -> Rollout:
    """A minibatch of frozen episodes: what PPO froze travels with the tokens."""
    return Rollout(
        layout=take_layout(rollout.layout, source_RxL),
        mask_BxL=take(rollout.mask_BxL, source_RxL),
        old_logp_BxL=take(rollout.old_logp_BxL, source_RxL),
        old_value_BxL=take(rollout.old_value_BxL, source_RxL),
        advantage_BxL=take(rollout.advantage_BxL, source_RxL),
        return_BxL=take(rollout.return_BxL, source_RxL),
        scored_BxM=None if scored_RxM is None else constrain(scored_RxM, "batch", None),
    )


def on_rows(evaluate: Callable[[Layout], Any], layout: Layout, source_RxL: Array | None) -> Any:
    """evaluate(layout), a pytree of BxL arrays, computed on a plan's rows and brought home.

    None computes on the padded rows. Slots that no plan names come back as 0.
    """
    if source_RxL is None:
        return evaluate(layout)
    shape = layout.token_BxL.shape
    slots = shape[0] * shape[1]
    flat = source_RxL.reshape(-1)
    # One slot more than there are takes what padding writes.
    home = jnp.full((slots + 1,), -1, jnp.int32)
    home = home.at[jnp.where(flat >= 0, flat, slots)].set(jnp.arange(flat.size, dtype=jnp.int32))
    home_BxL = home[:slots].reshape(shape)
    packed = evaluate(take_layout(layout, source_RxL))
    return jax.tree.map(lambda x_RxL: take(x_RxL, home_BxL), packed)
