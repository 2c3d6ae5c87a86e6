"""What travels between data, models and steps, and the legend of shapes.

Legend of the letters in names such as ``logp_BxT``:

====  ==============================================================
B     rows of a batch
L     slots of a model row (prompt, responses and padding together)
T     tokens of a response axis
P     tokens of a prompt axis
N     prompts with rankings; K responses of one prompt
V     vocabulary; D model width; H heads; G key-value heads; C head width
====  ==============================================================

Everything here is a frozen pytree of arrays; nothing here computes with a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from instructax import shapes

Array = Any  # jax.Array or numpy.ndarray: batches are made by NumPy and consumed under jit


@dataclass_transform(frozen_default=True)
def pytree(cls):
    """A frozen dataclass that jax treats as a pytree, every field a leaf; a bool is static."""
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    static = [f.name for f in fields if f.type == "bool"]
    return jax.tree_util.register_dataclass(
        cls, data_fields=[f.name for f in fields if f.name not in static], meta_fields=static
    )


@pytree
class Families:
    """Where the prompts of a row and their responses lie; -1 is none.

    A prompt is a segment without a prefix, right-aligned here; a response is a segment with that prefix,
    left-aligned. Every real slot of the row is in exactly one place.
    """

    prompt_BxNxP: Array  # int32, slots of the row
    response_BxNxKxT: Array  # int32, slots of the row


@pytree
class Layout:
    """Which token sits where and what it may see; the one form in which a model reads text.

    Slot i sees slot j iff j <= i, segment_j != 0, and segment_j equals segment_i or prefix_i.
    Segment 0 is padding, prefix 0 means none; one level, not transitive. The tokens of a segment
    are contiguous and ordered. Positions count the tokens a slot sees before itself, so a
    response's positions continue from its prompt's length.
    """

    token_BxL: Array  # int32
    position_BxL: Array  # int32
    segment_BxL: Array  # int32
    prefix_BxL: Array  # int32
    prefixed: bool = True  # static; False promises that prefix_BxL is 0 throughout
    families: Families | None = None  # where it helps to know them; they say what the rest says


@pytree
class LmBatch:
    """Text for the language-model loss; ``weight`` says how much each token's own nll counts."""

    layout: Layout
    weight_BxL: Array  # float32, 0 where a token is context only
    scored_BxM: Array | None = None  # int32, what scored_slots returns: None scores every slot


@pytree
class ComparisonBatch:
    """N ranked prompts laid out in B rows: each prompt once, its K responses behind it.

    The score of response k of prompt n is the scalar at slot ``(row, last)``: its last real token.
    """

    layout: Layout
    row_NxK: Array  # int32, the row of the layout that holds the response
    last_NxK: Array  # int32, the slot of its last real token
    rank_NxK: Array  # int32, lower is better, equal is a tie
    valid_NxK: Array  # bool, False where a prompt has fewer than K responses


@pytree
class PromptBatch:
    """Left-padded prompts for the sampler; ``episode`` is the global index behind the keys."""

    token_BxP: Array  # int32
    mask_BxP: Array  # bool
    episode_B: Array  # int32


@pytree
class Responses:
    """What the sampler returns for a :class:`PromptBatch`."""

    token_BxT: Array  # int32, pad where mask is False
    mask_BxT: Array  # bool, True up to and including the token that ended the response
    logp_BxT: Array  # float32, the sampler's own log-probabilities
    stop_B: Array  # int32: 0 cut by length, 1 ended by EOS, 2 ended by another stop token


@pytree
class Rollout:
    """Scored episodes, frozen: what every PPO update of an iteration reads.

    All arrays are aligned with the slots of ``layout``, so that padded and packed rows are one
    form. ``mask`` marks response tokens. Values are read *before* a token, at its predecessor.
    """

    layout: Layout
    mask_BxL: Array  # bool
    old_logp_BxL: Array  # float32
    old_value_BxL: Array  # float32
    advantage_BxL: Array  # float32, whitened
    return_BxL: Array  # float32
    scored_BxM: Array | None = None  # int32, scored_slots of mask; None scores every slot


def padded_layout(token_BxL: Array, mask_BxL: Array) -> Layout:
    """One segment a row; ``mask`` marks all real tokens, padding may stand on either side.

    Positions count real tokens only (trap T5), so padding never changes what a model computes.

    Args:
      token_BxL: integers, NumPy's or jax's.
      mask_BxL: bool.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name. Floats are refused:
        a float32 holds no id beyond 2^24, and a score in a token's place would be cut to one.
    """
    shapes.int_array("token_BxL", token_BxL, 2)
    shapes.bool_array("mask_BxL", mask_BxL, 2)
    shapes.same_shape(token_BxL=token_BxL, mask_BxL=mask_BxL)
    count_BxL = jnp.cumsum(mask_BxL.astype(jnp.int32), axis=1)
    return Layout(
        token_BxL=jnp.where(mask_BxL, token_BxL, 0).astype(jnp.int32),
        position_BxL=jnp.where(mask_BxL, count_BxL - 1, 0),
        segment_BxL=mask_BxL.astype(jnp.int32),
        prefix_BxL=jnp.zeros(token_BxL.shape, jnp.int32),
        prefixed=False,
    )


def check_layout(layout: Layout) -> None:
    """Raises TypeError or ValueError unless ``layout`` holds four BxL arrays of integers.

    The message names the array. Nothing is computed: under ``jit`` it costs tracing alone.
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {type(layout).__name__}")
    names = ("token_BxL", "position_BxL", "segment_BxL", "prefix_BxL")
    arrays = {f"layout.{name}": getattr(layout, name) for name in names}
    for name, array in arrays.items():
        shapes.int_array(name, array, 2)
    shapes.same_shape(**arrays)
    if layout.families is not None:
        shapes.int_array("layout.families.prompt_BxNxP", layout.families.prompt_BxNxP, 3)
        shapes.int_array("layout.families.response_BxNxKxT", layout.families.response_BxNxKxT, 4)


# What scored_slots is told of episodes: a half of a row, three quarters or all of it.
EPISODE_WIDTHS = (4, 2)


def scored_width(length: int, needed: int, widths: int, least: int) -> int | None:
    """M, ``needed`` of ``length`` slots rounded up to a ``widths``-th, ``least`` of these at least; None where that is all.

    Another width is another program, so they are few.
    """
    step = -(-length // widths)
    width = step * max(least, -(-needed // step))
    return width if width < length else None


def scored_slots(weight_BxL: np.ndarray, widths: int = 8, least: int = 1) -> np.ndarray | None:
    """scored_BxM: the slots of each row whose weight is not 0, in order, -1 behind them.

    Only there are logits needed. M is the :func:`scored_width` of the fullest row; None where that is all of L.
    """
    counted_BxL = np.asarray(weight_BxL) != 0
    most = int(counted_BxL.sum(axis=1).max(initial=0))
    width = scored_width(weight_BxL.shape[1], most, widths, least)
    if width is None:
        return None
    first_BxL = np.argsort(~counted_BxL, axis=1, kind="stable").astype(np.int32)
    return np.where(np.take_along_axis(counted_BxL, first_BxL, axis=1), first_BxL, -1)[:, :width]


def first_fit(
    size_n: Sequence[int] | np.ndarray,
    capacity: int | Sequence[int],
    max_rows: int | None = None,
) -> list[list[int]]:
    """First-fit bin packing: each item, in order, goes to the first row with room.

    Items may have several sizes, n x D, each with a capacity of its own. Returns the items of each row. With
    ``max_rows`` the packing stops before the first item that finds no room; later items are then in no row.
    ValueError where an item exceeds ``capacity``.
    """
    rows: list[list[int]] = []
    size_nxD = np.asarray(size_n, np.int64)
    size_nxD = size_nxD[:, None] if size_nxD.ndim == 1 else size_nxD
    room = np.zeros((max(1, len(size_n)), size_nxD.shape[1]), np.int64)
    for item, size in enumerate(size_nxD):
        if (size > capacity).any():
            shown = size[0] if size.size == 1 else size.tolist()
            raise ValueError(f"size_n[{item}] is {shown}, more than the capacity {capacity}")
        fits = (room[: len(rows)] >= size).all(axis=1)
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            if max_rows is not None and row == max_rows:
                return rows
            rows.append([])
            room[row] = capacity
        rows[row].append(item)
        room[row] -= size
    return rows


def predecessor(layout: Layout) -> tuple[Array, Array]:
    """Slot of the token that stands before each token, and whether there is one.

    Within a segment it is the slot to the left; for a response's first token it is the last token
    of its prompt, wherever that lies in the row. Returns (index_BxL int32, exists_BxL bool); the
    index is 0 where nothing precedes.
    """
    segment_BxL, prefix_BxL = layout.segment_BxL, layout.prefix_BxL
    length = segment_BxL.shape[1]
    slot_L = jnp.arange(length, dtype=jnp.int32)

    def last_slot(segment_L):
        # Segment ids of a row are at most its length; slot 0 of the table stays "none".
        return jnp.full((length + 1,), -1, jnp.int32).at[segment_L].max(slot_L)

    last_BxS = jax.vmap(last_slot)(segment_BxL)
    of_prefix_BxL = jnp.take_along_axis(last_BxS, prefix_BxL, axis=1)
    left_BxL = jnp.pad(segment_BxL[:, :-1], ((0, 0), (1, 0)))
    continues_BxL = left_BxL == segment_BxL
    index_BxL = jnp.where(
        continues_BxL, slot_L[None] - 1, jnp.where(prefix_BxL > 0, of_prefix_BxL, -1)
    )
    exists_BxL = (index_BxL >= 0) & (segment_BxL > 0)
    return jnp.where(exists_BxL, index_BxL, 0), exists_BxL
