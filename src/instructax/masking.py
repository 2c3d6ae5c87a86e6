"""Reductions over the real entries of padded arrays, shared by losses and RL arithmetic.

Every function replaces the entries outside the mask *before* it computes with them. A ``where``
after the arithmetic would hide a NaN from the result but not from the gradient, since 0 * NaN is
NaN. A NaN inside the mask is never hidden. An empty mask gives 0.

Under ``jit`` over a mesh the arrays are global, and so are all sums here.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import shapes

LOG_RATIO_LIMIT = 20.0
"""Bound on a log-ratio before any exp: exp(20) = 4.9e8 is already no number to train on."""

WHITEN_EPSILON = 1e-8
"""Added to the variance in :func:`whiten`, as in the code of Ziegler et al. 2019."""


def masked_sum(x: Any, mask: Any) -> jax.Array:
    """sum_i mask_i x_i over all axes.

    Args:
      x: floating array of any shape.
      mask: bool array of the same shape.

    Returns:
      A float32 scalar (float64 for float64 input); 0 for an empty mask.
    """
    return jnp.sum(_real_entries(x, mask))


def masked_mean(x: Any, mask: Any, normalizer: Any = None) -> jax.Array:
    """sum_i mask_i x_i / n, over all axes.

    Args:
      x: floating array of any shape.
      mask: bool array of the same shape.
      normalizer: n; by default the number of entries in the mask. Give the count of the whole
        batch to a microbatch or shard, and the results of all of them add up to its mean.

    Returns:
      A float32 scalar (float64 for float64 input); 0 where n is 0.
    """
    total = masked_sum(x, mask)
    count = jnp.sum(mask, dtype=total.dtype) if normalizer is None else normalizer
    return ratio_or_zero(total, shapes.scalar("normalizer", count, total.dtype))


def masked_var(x: Any, mask: Any) -> jax.Array:
    """sum_i mask_i (x_i - mean)^2 / sum_i mask_i: the biased variance; 0 for an empty mask."""
    x = _real_entries(x, mask)
    return masked_mean(jnp.square(x - masked_mean(x, mask)), mask)


def whiten(x: Any, mask: Any, shift_mean: bool = True) -> jax.Array:
    """(x - mean) * rsqrt(var + 1e-8), over all real entries of the array; 0 outside the mask.

    The variance is the biased one. Rewards keep their mean, advantages do not. Call it with the
    whole global batch: whitening shards or minibatches on their own is another algorithm.
    Source: code of Ziegler et al. 2019; masked as in Huang et al. 2024 (N+ details).

    Args:
      x: floating array of any shape.
      mask: bool array of the same shape.
      shift_mean: whether the result has mean 0; if not, the mean is added back.

    Returns:
      float32 (float64 for float64 input), the shape of x.
    """
    x = _real_entries(x, mask)
    mean = masked_mean(x, mask)
    whitened = (x - mean) * jax.lax.rsqrt(masked_var(x, mask) + WHITEN_EPSILON)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def last_token_index(mask_BxT: Any) -> jax.Array:
    """Index of the last real token of each row, int32; 0 for a row without one.

    It reads the mask, never token ids: where pad is eos, ids cannot tell the end of a response.

    Args:
      mask_BxT: bool, contiguous in each row, starting anywhere.
    """
    mask_BxT = shapes.bool_array("mask_BxT", mask_BxT, 2)
    slot_1xT = jnp.arange(mask_BxT.shape[1], dtype=jnp.int32)[None, :]
    return jnp.max(jnp.where(mask_BxT, slot_1xT, 0), axis=1, initial=0)


def ratio_or_zero(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """numerator / denominator, and 0 with a zero gradient where the denominator is exactly 0."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0.0, numerator / jnp.where(is_zero, 1.0, denominator))


def _real_entries(x: Any, mask: Any) -> jax.Array:
    x, mask = shapes.float_array("x", x), shapes.bool_array("mask", mask)
    shapes.same_shape(x=x, mask=mask)
    return jnp.where(mask, x, 0.0)
