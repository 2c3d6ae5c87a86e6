"""The value network's loss in PPO."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import masking, shapes


def clipped_value_loss(
    value_BxT: Any,
    old_value_BxT: Any,
    return_BxT: Any,
    mask_BxT: Any,
    clip_range: Any,
    normalizer: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Squared error to the returns, its improvement limited to a range about the old values.

        loss = 0.5 (1/n) sum_t max( (V_t - R_t)^2, (clip(V_t, Vold_t - c, Vold_t + c) - R_t)^2 )

    Source: code of Ziegler et al. 2019, masked. The old values and the returns are of the rollout:
    no gradient goes through them.

    Args:
      value_BxT: floating, V, the value before each response token.
      old_value_BxT: floating, Vold, the same at rollout.
      return_BxT: floating, R = unwhitened advantage + Vold.
      mask_BxT: bool, the response tokens.
      clip_range: c >= 0 (0.2 in Ziegler et al.), or None: no clipping, 0.5 mean (V - R)^2.
      normalizer: n, the count of the whole minibatch where this is a microbatch or a shard of it;
        by default the tokens of this one.

    Returns:
      loss and metrics: ``loss``; ``error`` = mean (V - R)^2; ``clipfrac``, the share of tokens
      where clipping raised the loss; ``vpred``, the mean of V (these four divide by n); ``mean``
      and ``var`` of the old values; ``returns_mean``, ``returns_var``; ``var_explained`` =
      1 - mean (V - R)^2 / var(R) over the tokens given, 0 where var(R) is 0.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    value_BxT = shapes.float_array("value_BxT", value_BxT, 2)
    old_value_BxT = shapes.float_array("old_value_BxT", old_value_BxT, 2)
    return_BxT = shapes.float_array("return_BxT", return_BxT, 2)
    mask_BxT = shapes.bool_array("mask_BxT", mask_BxT, 2)
    shapes.same_shape(
        value_BxT=value_BxT,
        old_value_BxT=old_value_BxT,
        return_BxT=return_BxT,
        mask_BxT=mask_BxT,
    )
    value_BxT = jnp.where(mask_BxT, value_BxT, 0.0)
    old_value_BxT = jax.lax.stop_gradient(jnp.where(mask_BxT, old_value_BxT, 0.0))
    return_BxT = jax.lax.stop_gradient(jnp.where(mask_BxT, return_BxT, 0.0))

    error_BxT = jnp.square(value_BxT - return_BxT)
    if clip_range is None:
        clipped_error_BxT = error_BxT
    else:
        clip_range = shapes.scalar("clip_range", clip_range, error_BxT.dtype)
        near_BxT = jnp.clip(value_BxT, old_value_BxT - clip_range, old_value_BxT + clip_range)
        clipped_error_BxT = jnp.square(near_BxT - return_BxT)

    def mean(x_BxT: jax.Array) -> jax.Array:
        return masking.masked_mean(x_BxT.astype(error_BxT.dtype), mask_BxT, normalizer)

    loss = 0.5 * mean(jnp.maximum(error_BxT, clipped_error_BxT))
    returns_var = masking.masked_var(return_BxT, mask_BxT)
    unexplained = masking.ratio_or_zero(masking.masked_mean(error_BxT, mask_BxT), returns_var)
    metrics = {
        "loss": loss,
        "error": mean(error_BxT),
        "clipfrac": mean(clipped_error_BxT > error_BxT),
        "vpred": mean(value_BxT),
        "mean": masking.masked_mean(old_value_BxT, mask_BxT),
        "var": masking.masked_var(old_value_BxT, mask_BxT),
        "returns_mean": masking.masked_mean(return_BxT, mask_BxT),
        "returns_var": returns_var,
        "var_explained": jnp.where(returns_var == 0, 0.0, 1.0 - unexplained),
    }
    return loss, jax.lax.stop_gradient(metrics)
