"""The sampler: prefill, then one token at a time until every row is done. No model in sight.

It is given two functions, so that the same loop serves any model and any cache. All rows begin
together here; in :mod:`instructax.rl.slots` prompts take the places of responses that have ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instructax import shapes
from instructax.batches import PromptBatch, Responses
from instructax.rl.sampling import episode_keys, sample_tokens

Array = Any

CUT_BY_LENGTH, ENDED_BY_EOS, ENDED_BY_STOP = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How a token is drawn, and which tokens end a response. Static."""

    temperature: float
    eos_id: int
    vocab_size: int
    stop_ids: tuple[int, ...] = ()
    top_k: int | None = None
    top_p: float | None = None

    def __call__(
        self, key: Array, episode_B: Array, t: Array, logits_BxV: Array
    ) -> tuple[Array, Array, Array]:
        """(token_B, logp_B, stop_B) of token t, a number or one a row; CUT_BY_LENGTH where it ends nothing."""
        token_B, logp_B = sample_tokens(
            episode_keys(key, episode_B, t),
            logits_BxV,
            self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            valid_vocab=self.vocab_size,
        )
        stop_B = jnp.full_like(token_B, CUT_BY_LENGTH)
        for stop in self.stop_ids:
            stop_B = jnp.where(token_B == stop, ENDED_BY_STOP, stop_B)
        stop_B = jnp.where(token_B == self.eos_id, ENDED_BY_EOS, stop_B)
        return token_B, logp_B.astype(jnp.float32), stop_B


def samples(key: Array, episode_M: Array) -> tuple[Array, Array]:
    """(key of every row, or the one key; episode_B) of the rows of M prompts.

    One key gives every prompt a row. n keys give it n rows, prompt by prompt, sample k by key k: the
    response that key k alone would give.
    """
    key = shapes.key_array("key", key, min(jnp.ndim(key), 1))
    if not key.shape:
        return key, jnp.asarray(episode_M)
    return jnp.tile(key, episode_M.shape[0]), jnp.repeat(jnp.asarray(episode_M), key.shape[0])


def generate(
    key: Array,
    prompts: PromptBatch,
    prefill: Callable[[Array, Array], tuple[Array, Any]],
    decode: Callable[[Array, Any], tuple[Array, Any]],
    *,
    response_length: int,
    temperature: float,
    eos_id: int,
    pad_id: int,
    vocab_size: int,
    stop_ids: tuple[int, ...] = (),
    top_k: int | None = None,
    top_p: float | None = None,
) -> Responses:
    """Sample one response a row: y_t ~ softmax(logits_t / temperature), until EOS, a stop token or length.

    Args:
      key: one typed key; token t of episode e is drawn with fold_in(fold_in(key, e), t), so a
        response depends on its episode alone, never on its slot, its batch or its process. Or n
        keys, for n rows a prompt (:func:`samples`).
      prompts: left-padded; every row needs at least one real token.
      prefill: (token_MxP, mask_MxP) -> (logits_BxV, carry), with n rows a prompt.
      decode: (token_B, carry) -> (logits_BxV, carry), reading one more token a row.
      response_length: T, the longest response; the token that ends one belongs to it.

    Returns:
      :class:`Responses`; tokens behind a response's end are ``pad_id`` and outside its mask.
    """
    if response_length < 1:
        raise ValueError(f"response_length must be at least 1, got {response_length}")
    drawing = Drawing(temperature, eos_id, vocab_size, stop_ids, top_k, top_p)
    key, episode_B = samples(key, prompts.episode_B)
    rows = episode_B.shape[0]
    logits_BxV, carry = prefill(prompts.token_BxP, prompts.mask_BxP)
    token_BxT = jnp.full((rows, response_length), pad_id, jnp.int32)
    mask_BxT = jnp.zeros((rows, response_length), bool)
    logp_BxT = jnp.zeros((rows, response_length), jnp.float32)

    def draw(t, logits_BxV, token_BxT, mask_BxT, logp_BxT, stop_B, done_B):
        token_B, logp_B, ends_B = drawing(key, episode_B, t, logits_BxV)
        token_B = jnp.where(done_B, pad_id, token_B)
        token_BxT = token_BxT.at[:, t].set(token_B)
        mask_BxT = mask_BxT.at[:, t].set(~done_B)
        logp_BxT = logp_BxT.at[:, t].set(jnp.where(done_B, 0.0, logp_B))
        stop_B = jnp.where(done_B, stop_B, ends_B)
        return token_B, token_BxT, mask_BxT, logp_BxT, stop_B, done_B | (ends_B != CUT_BY_LENGTH)

    stop_B = jnp.full((rows,), CUT_BY_LENGTH, jnp.int32)
    done_B = jnp.zeros((rows,), bool)
    token_B, *written = draw(0, logits_BxV, token_BxT, mask_BxT, logp_BxT, stop_B, done_B)

    def unfinished(state):
        t, _, _, written = state
        return (t < response_length) & ~jnp.all(written[-1])

    def advance(state):
        t, token_B, carry, written = state
        logits_BxV, carry = decode(token_B, carry)
        token_B, *written = draw(t, logits_BxV, *written)
        return t + 1, token_B, carry, tuple(written)

    state = (jnp.asarray(1, jnp.int32), token_B, carry, tuple(written))
    token_BxT, mask_BxT, logp_BxT, stop_B, _ = jax.lax.while_loop(unfinished, advance, state)[-1]
    return Responses(token_BxT, mask_BxT, logp_BxT, stop_B)
