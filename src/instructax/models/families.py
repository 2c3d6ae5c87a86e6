"""Attention over prompts with their responses, of which only what is seen is computed.

A row's mask shows a response its prompt and itself. A product over whole rows computes everything else in
vain; here a prompt and its responses are laid side by side instead (:class:`instructax.batches.Families`),
so that who sees whom does not depend on the data: products of a response meet its prompt's keys and its own and
no others, and a kernel leaves out the blocks in between. :func:`instructax.models.attention.visible` is the
semantics, and this equals it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.batches import Families
from instructax.models.flash import LANES, flash_attention, serves_rows
from instructax.partitioning import platform

Array = Any
# P, K, T: a family's M slots are a prompt's P and K responses' T, and for the kernel some behind them that are nobody's.
Sizes = tuple[int, int, int]
Pair = tuple[Array, Array]  # of prompts Nx1xP..., of responses NxKxT...

# A family's slots are a multiple, so that the kernel's blocks are not smaller.
KERNEL_BLOCK = 256


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
    own_BxNxM = jnp.concatenate(
        [families.prompt_BxNxP, families.response_BxNxKxT.reshape(rows, prompts, K * T)], axis=2
    )
    serves = serves_rows(rows, KERNEL_BLOCK, heads, groups, width)
    if serves:
        more = -own_BxNxM.shape[2] % KERNEL_BLOCK
        own_BxNxM = jnp.pad(own_BxNxM, ((0, 0), (0, 0), (0, more)), constant_values=-1)
    there_BxM = own_BxNxM.reshape(rows, -1)
    home_BxL = _inverse(there_BxM, length)

    def by_family(x_BxLxGxC: Array) -> Array:
        x_BxMxF = rearranged(x_BxLxGxC.reshape(rows, length, -1), there_BxM, home_BxL)
        return x_BxMxF.reshape(rows * prompts, -1, *x_BxLxGxC.shape[2:])

    q, k, v = by_family(q_BxLxHxC), by_family(k_BxLxGxC), by_family(v_BxLxGxC)
    real_NxM = own_BxNxM.reshape(rows * prompts, -1) >= 0
    attend = _by_kernel if serves else _by_products
    out_NxMxHxC = attend(q, k, v, real_NxM, (P, K, T), band_width)
    out_BxMxF = out_NxMxHxC.reshape(rows, -1, heads * width)
    return rearranged(out_BxMxF, home_BxL, there_BxM).reshape(q_BxLxHxC.shape)


def _by_kernel(
    q_NxMxHxC: Array,
    k_NxMxGxC: Array,
    v_NxMxGxC: Array,
    real_NxM: Array,
    sizes: Sizes,
    band_width: int | None,
    interpret: bool = False,
) -> Array:
    """A family is one row of the kernel, and which of its blocks are computed is known beforehand."""
    seen_MxM = _seen(q_NxMxHxC.shape[1], sizes, band_width)
    # Real slots are one segment, the others another.
    return flash_attention(
        q_NxMxHxC,
        k_NxMxGxC,
        v_NxMxGxC,
        real_NxM.astype(jnp.int32),
        seen_LxL=seen_MxM,
        interpret=interpret,
    )


def _seen(slots: int, sizes: Sizes, band_width: int | None) -> np.ndarray:
    """seen_MxM[i, j]: slot i of a family would see slot j, were both real."""
    P, _, T = sizes
    index = np.arange(slots)
    text = np.where(index < P, 0, 1 + (index - P) // T)  # 0 is the prompt
    position = np.where(index < P, index, P + (index - P) % T)
    distance = position[:, None] - position
    seen = (distance >= 0) & ((text == 0) | (text == text[:, None]))
    return seen if band_width is None else seen & (distance < band_width)


def _by_products(
    q_NxMxHxC: Array,
    k_NxMxGxC: Array,
    v_NxMxGxC: Array,
    real_NxM: Array,
    sizes: Sizes,
    band_width: int | None,
) -> Array:
    P, K, T = sizes

    def split(x_NxMx: Array) -> Pair:
        of_prompt, of_responses = jnp.split(x_NxMx, [P], axis=1)
        return of_prompt[:, None], of_responses.reshape(-1, K, T, *x_NxMx.shape[2:])

    q, k, v, real = split(q_NxMxHxC), split(k_NxMxGxC), split(v_NxMxGxC), split(real_NxM)
    groups = k_NxMxGxC.shape[2]

    def grouped(x_NxKxTxHxC: Array) -> Array:
        *shape, heads, width = x_NxKxTxHxC.shape
        return x_NxKxTxHxC.reshape(*shape, groups, heads // groups, width) * width**-0.5

    q_p, q_r = map(grouped, q)
    scores = functools.partial(_scores, band_width=band_width)
    prompt = _softmax([(scores(q_p, k[0], real[0], 0), v[0])])
    response = _softmax(
        [(scores(q_r, k[0], real[0], P), v[0]), (scores(q_r, k[1], real[1], 0), v[1])]
    )
    out = [x.reshape(q_NxMxHxC.shape[0], -1, *q_NxMxHxC.shape[2:]) for x in (prompt, response)]
    return jnp.concatenate(out, axis=1)


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
