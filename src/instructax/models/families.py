"""Attention over prompts with their responses, of which only what is seen is computed.

A row's mask shows a response its prompt and itself. A product over whole rows computes everything else in
vain; here prompts and responses are laid side by side instead (:class:`instructax.batches.Families`),
so that a response meets its prompt's keys and its own and no others. :func:`instructax.models.attention.visible`
is the semantics, and this equals it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.batches import Families
from instructax.models.flash import LANES, flash_attention, serves_lengths
from instructax.partitioning import platform

Array = Any
Pair = tuple[Array, Array]  # of prompts Nx1xP..., of responses NxKxT...


def tile() -> int:
    """What the lengths of prompts and responses should be multiples of where the program will run."""
    return LANES if platform() == "tpu" else 8


def row_scores(length: int) -> int:
    """Scores that a row with prefixes costs without families: its triangle, or all where blocks are walked."""
    return length**2 if platform() == "tpu" else length**2 // 2


def family_attention(
    q_BxLxHxC: Array, k_BxLxGxC: Array, v_BxLxGxC: Array, families: Families, band_width: int | None
) -> Array:
    """softmax(q k^T / sqrt(C)) v over a segment and its prefix, 0 at slots that are in no family.

    Scores and softmax are float32. Prompts are right-aligned, so that slots apart are positions apart.
    """
    rows, length, heads, width = q_BxLxHxC.shape
    groups = k_BxLxGxC.shape[2]
    _, prompts, P = families.prompt_BxNxP.shape
    K, T = families.response_BxNxKxT.shape[2:]
    there_BxM = jnp.concatenate(
        [families.prompt_BxNxP.reshape(rows, -1), families.response_BxNxKxT.reshape(rows, -1)],
        axis=1,
    )
    home_BxL = _inverse(there_BxM, length)

    def split(x_BxLxGxC: Array) -> tuple[Array, Array]:
        x_BxMxF = rearranged(x_BxLxGxC.reshape(rows, length, -1), there_BxM, home_BxL)
        of_prompts, of_responses = jnp.split(x_BxMxF, [prompts * P], axis=1)
        heads_shape = x_BxLxGxC.shape[2:]
        return (
            of_prompts.reshape(rows * prompts, 1, P, *heads_shape),
            of_responses.reshape(rows * prompts, K, T, *heads_shape),
        )

    q, k, v = split(q_BxLxHxC), split(k_BxLxGxC), split(v_BxLxGxC)
    real = (
        families.prompt_BxNxP.reshape(rows * prompts, 1, P) >= 0,
        families.response_BxNxKxT.reshape(rows * prompts, K, T) >= 0,
    )
    serves = serves_lengths(rows, (P, T), heads, groups, width)
    prompt, response = (_by_kernel if serves else _by_products)(q, k, v, real, band_width)
    out_BxMxF = jnp.concatenate(
        [x.reshape(rows, -1, heads * width) for x in (prompt, response)], axis=1
    )
    return rearranged(out_BxMxF, home_BxL, there_BxM).reshape(q_BxLxHxC.shape)


def _by_kernel(
    q: Pair, k: Pair, v: Pair, real: Pair, band_width: int | None, interpret: bool = False
) -> Pair:
    """Each response's keys and values stand behind its prompt's, of which the gradients add up over K."""
    attend = functools.partial(flash_attention, band_width=band_width, interpret=interpret)

    def rows(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])

    def behind(x: Pair) -> Array:
        of_prompt, of_responses = x
        shape = (*of_responses.shape[:2], *of_prompt.shape[2:])
        return rows(jnp.concatenate([jnp.broadcast_to(of_prompt, shape), of_responses], axis=2))

    segment = (real[0].astype(jnp.int32), real[1].astype(jnp.int32))
    prompt = attend(rows(q[0]), rows(k[0]), rows(v[0]), rows(segment[0]))
    response = attend(
        rows(q[1]), behind(k), behind(v), rows(segment[1]), key_segment_BxS=behind(segment)
    )
    return prompt.reshape(q[0].shape), response.reshape(q[1].shape)


def _by_products(q: Pair, k: Pair, v: Pair, real: Pair, band_width: int | None) -> Pair:
    groups, slots = k[0].shape[3], q[0].shape[2]

    def grouped(x_NxKxTxHxC: Array) -> Array:
        *shape, heads, width = x_NxKxTxHxC.shape
        return x_NxKxTxHxC.reshape(*shape, groups, heads // groups, width) * width**-0.5

    q_p, q_r = map(grouped, q)
    scores = functools.partial(_scores, band_width=band_width)
    prompt = _softmax([(scores(q_p, k[0], real[0], 0), v[0])])
    response = _softmax(
        [(scores(q_r, k[0], real[0], slots), v[0]), (scores(q_r, k[1], real[1], 0), v[1])]
    )
    return prompt, response


def _scores(q: Array, k: Array, real: Array, before: int, *, band_width: int | None) -> Array:
    """score_NxKxGxRxTxS of queries NxKxTxGxRxC and keys NxKxSxGxC, or Nx1xSxGxC shared by K; -inf where not seen.

    The first query stands ``before`` slots behind the first key.
    """
    shared = k.shape[1] < q.shape[1]
    if shared:
        # One product for the responses of a prompt.
        score = jnp.einsum("nktgrc,nsgc->ngrkts", q, k[:, 0], preferred_element_type=jnp.float32)
        score = jnp.moveaxis(score, 3, 1)
    else:
        score = jnp.einsum("nktgrc,nksgc->nkgrts", q, k, preferred_element_type=jnp.float32)
    distance_TxS = before + np.arange(q.shape[2])[:, None] - np.arange(k.shape[2])
    seen_TxS = distance_TxS >= 0
    if band_width is not None:
        seen_TxS = seen_TxS & (distance_TxS < band_width)
    seen = seen_TxS[None, None, None, None] & real[:, :, None, None, None, :]
    return jnp.where(seen, score, -jnp.inf)


def _softmax(parts: list[tuple[Array, Array]]) -> Array:
    """sum softmax(scores) values, NxKxTxGxRxC, the softmax over all parts together; 0 where nothing is seen."""
    top = functools.reduce(jnp.maximum, [score.max(axis=-1) for score, _ in parts])
    top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0.0, top))
    total: Array = 0.0
    out: Array = 0.0
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    for score, value in parts:
        weight = jnp.exp(score - top[..., None])
        total = total + weight.sum(axis=-1)
        weight = weight.astype(value.dtype)
        if value.shape[1] < weight.shape[1]:
            out = out + product("nkgrts,nsgc->nktgrc", weight, value[:, 0])
        else:
            out = out + product("nkgrts,nksgc->nktgrc", weight, value)
    total = jnp.moveaxis(jnp.where(total > 0, total, 1.0), 4, 2)
    return (out / total[..., None]).astype(parts[0][1].dtype)


@jax.custom_vjp
def rearranged(x_BxLxF: Array, there_BxM: Array, home_BxL: Array) -> Array:
    """y_BxMxF with y[b, m] = x[b, there[b, m]], 0 where ``there`` is -1; ``home`` is its inverse.

    No slot is taken twice, so the gradient is a gather as well, by ``home``: a sum into slots, which is what
    the gradient of a gather is otherwise, runs one slot after the other on CPUs and TPUs.
    """
    y = jnp.take_along_axis(x_BxLxF, jnp.maximum(there_BxM, 0)[:, :, None], axis=1)
    return jnp.where(there_BxM[:, :, None] >= 0, y, 0)


def _forward(x, there, home):
    return rearranged(x, there, home), (there, home)


def _backward(kept, dy):
    there, home = kept
    return rearranged(dy, home, there), None, None


rearranged.defvjp(_forward, _backward)


def _inverse(there_BxM: Array, length: int) -> Array:
    """home_BxL with home[there[m]] = m, -1 for slots that are named nowhere."""
    index_M = jnp.arange(there_BxM.shape[1], dtype=jnp.int32)

    def of_row(there_M: Array) -> Array:
        # One slot more than there are takes what is named nowhere.
        home = jnp.full((length + 1,), -1, jnp.int32)
        return home.at[jnp.where(there_M >= 0, there_M, length)].set(index_M)[:length]

    return jax.vmap(of_row)(there_BxM)
