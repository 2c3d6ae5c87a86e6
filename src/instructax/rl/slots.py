"""The sampler without stragglers: S rows decode, and where a response ends, another prompt takes its slot.

One program, no word from the host. Prompts are read in groups, ahead of the slots: a group is read
when nobody of the last one waits any more and a slot is free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instructax.batches import Responses, pytree
from instructax.rl.generate import CUT_BY_LENGTH, Drawing, samples

Array = Any


@pytree
class _Written:
    """What has been drawn so far, by row of the result."""

    token_BxT: Array
    logp_BxT: Array
    length_B: Array
    stop_B: Array

    def add(self, row_S, t_S, token_S, logp_S, stop_S) -> _Written:
        """Token t of some rows; a row outside the result is nobody's."""
        return _Written(
            self.token_BxT.at[row_S, t_S].set(token_S, mode="drop"),
            self.logp_BxT.at[row_S, t_S].set(logp_S, mode="drop"),
            self.length_B.at[row_S].set(t_S + 1, mode="drop"),
            self.stop_B.at[row_S].set(stop_S, mode="drop"),
        )


@pytree
class _Slots:
    """Which row of the result decodes in each slot, and how far it is; the row B where none does."""

    row_S: Array
    token_S: Array  # the last token drawn
    t_S: Array  # its index


def generate_in_slots(
    key: Array,
    episode_M: Array,
    prefill: Callable[[Array], tuple[Array, Any]],
    admit: Callable[[Any, Any, Array, Array], Any],
    decode: Callable[[Array, Any], tuple[Array, Any]],
    carry: Any,
    *,
    slots: int,
    groups: int,
    response_length: int,
    pad_id: int,
    drawing: Drawing,
) -> Responses:
    """:func:`instructax.rl.generate.generate` in ``slots`` rows, with the same result.

    Args:
      key: one typed key, or n keys for n rows a prompt (:func:`samples`).
      episode_M: the prompts' global episode indices.
      prefill: g -> (logits_WxV, read): reads prompts g W to (g + 1) W; beyond the last one anything.
      admit: (carry, read, slot, prompt) -> carry: a prompt of those read takes a slot.
      decode: (token_S, carry) -> (logits_SxV, carry), reading one more token a slot.
      carry: of S slots, nobody in them.
      groups: as many calls of ``prefill`` as the prompts take.
    """
    if response_length < 1 or slots < 1:
        raise ValueError(
            f"response_length and slots must be at least 1, got {response_length} and {slots}"
        )
    copies = key.shape[0] if key.shape else 1
    key, episode_B = samples(key, episode_M)
    rows = episode_B.shape[0]

    def draw(row_S, t_S, logits_SxV):
        row_S = jnp.minimum(row_S, rows - 1)  # what nobody's slot draws is dropped
        return drawing(key[row_S] if key.shape else key, episode_B[row_S], t_S, logits_SxV)

    def read_group(g: Array, state):
        """Read a group, draw the first tokens, and decode until the slots ask for the next group."""
        slot, carry, written = state
        logits_WxV, read = prefill(g)
        size = logits_WxV.shape[0] * copies
        row_E = jnp.arange(size, dtype=jnp.int32) + g * size
        row_E = jnp.where(row_E < rows, row_E, rows)
        first_E = jnp.zeros_like(row_E)
        token_E, logp_E, stop_E = draw(row_E, first_E, jnp.repeat(logits_WxV, copies, axis=0))
        written = written.add(row_E, first_E, token_E, logp_E, stop_E)
        waiting_E = (row_E < rows) & (stop_E == CUT_BY_LENGTH) & (response_length > 1)

        def match(state):
            slot, _, waiting_E = state
            return jnp.any(waiting_E) & jnp.any(slot.row_S == rows)

        def seat(state):
            slot, carry, waiting_E = state
            s, e = jnp.argmax(slot.row_S == rows), jnp.argmax(waiting_E)
            slot = _Slots(
                slot.row_S.at[s].set(row_E[e]),
                slot.token_S.at[s].set(token_E[e]),
                slot.t_S.at[s].set(0),
            )
            return slot, admit(carry, read, s, e // copies), waiting_E.at[e].set(False)

        def decodes(state):
            free_S = state[0].row_S == rows
            # All who wait are seated before this is asked, as far as there are seats.
            return ~jnp.all(free_S) & ~(jnp.any(free_S) & (g + 1 < groups))

        def advance(state):
            slot, carry, waiting_E, written = state
            logits_SxV, carry = decode(slot.token_S, carry)
            t_S = slot.t_S + 1
            token_S, logp_S, stop_S = draw(slot.row_S, t_S, logits_SxV)
            written = written.add(slot.row_S, t_S, token_S, logp_S, stop_S)
            ended_S = (stop_S != CUT_BY_LENGTH) | (t_S + 1 >= response_length)
            slot = _Slots(jnp.where(ended_S, rows, slot.row_S), token_S, t_S)
            slot, carry, waiting_E = jax.lax.while_loop(match, seat, (slot, carry, waiting_E))
            return slot, carry, waiting_E, written

        slot, carry, waiting_E = jax.lax.while_loop(match, seat, (slot, carry, waiting_E))
        slot, carry, _, written = jax.lax.while_loop(
            decodes, advance, (slot, carry, waiting_E, written)
        )
        return slot, carry, written

    nobody_S = jnp.zeros((slots,), jnp.int32)
    written = _Written(
        jnp.full((rows, response_length), pad_id, jnp.int32),
        jnp.zeros((rows, response_length), jnp.float32),
        jnp.zeros((rows,), jnp.int32),
        jnp.full((rows,), CUT_BY_LENGTH, jnp.int32),
    )
    state = (_Slots(nobody_S + rows, nobody_S, nobody_S), carry, written)
    written = jax.lax.fori_loop(0, groups, read_group, state)[-1]
    mask_BxT = jnp.arange(response_length)[None] < written.length_B[:, None]
    return Responses(written.token_BxT, mask_BxT, written.logp_BxT, written.stop_B)
