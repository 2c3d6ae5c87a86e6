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

from instructax.batches import Layout, Rollout, first_fit
from instructax.partitioning import constrain

Array = Any

# Numbers of rows to choose from: another number is another program, so they are few.
PARTS = 6


def padded_rows(order_UxM: np.ndarray, width: int) -> np.ndarray:
    """source_UxMxL of episodes that keep a row each: the plain form."""
    return order_UxM[:, :, None] * width + np.arange(width, dtype=np.int32)


def packed_rows(
    order_UxM: np.ndarray, start_B: np.ndarray, length_B: np.ndarray, width: int, shards: int = 1
) -> np.ndarray:
    """source_UxRxL with the M episodes of each of U groups packed into R <= M rows, longest first.

    Args:
      order_UxM: the episodes of each group.
      start_B: first real slot of each padded episode.
      length_B: its real slots, which are contiguous.
      width: slots of a row, padded or packed.
      shards: R is a multiple of it; M must be.

    Raises:
      ValueError: an episode that leaves its row, or M that ``shards`` does not divide.
    """
    start_B, length_B = np.asarray(start_B), np.asarray(length_B)
    groups, size = order_UxM.shape
    if size % shards:
        raise ValueError(f"order_UxM has {size} episodes a group, not a multiple of {shards}")
    if (start_B < 0).any() or (length_B < 0).any() or (start_B + length_B > width).any():
        raise ValueError(f"start_B and length_B must lie within rows of {width} slots")
    longest_first_UxM = [order_M[length_B[order_M].argsort()[::-1]] for order_M in order_UxM]
    plans = [first_fit(length_B[order_M].tolist(), width) for order_M in longest_first_UxM]
    needed = max(map(len, plans))
    step = -(-size // PARTS // shards) * shards if size >= PARTS * shards else shards
    rows = min(size, -(-needed // step) * step)
    source_UxRxL = np.full((groups, rows, width), -1, np.int32)
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
    """source_UxRxL of sampled episodes: left-padded prompts of P slots, responses in ``slots`` more."""
    prompt_slots = prompt_mask_BxP.shape[1]
    if not packed:
        return padded_rows(order_UxM, prompt_slots + slots)
    prompt_B = np.asarray(prompt_mask_BxP).sum(axis=1)
    return packed_rows(
        order_UxM,
        prompt_slots - prompt_B,
        prompt_B + np.asarray(response_length_B),
        prompt_slots + slots,
        shards,
    )


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
    )


def take_rollout(rollout: Rollout, source_RxL: Array) -> Rollout:
    """A minibatch of frozen episodes: what PPO froze travels with the tokens."""
    return Rollout(
        layout=take_layout(rollout.layout, source_RxL),
        mask_BxL=take(rollout.mask_BxL, source_RxL),
        old_logp_BxL=take(rollout.old_logp_BxL, source_RxL),
        old_value_BxL=take(rollout.old_value_BxL, source_RxL),
        advantage_BxL=take(rollout.advantage_BxL, source_RxL),
        return_BxL=take(rollout.return_BxL, source_RxL),
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
