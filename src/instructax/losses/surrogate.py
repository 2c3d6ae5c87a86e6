"""PPO's policy loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import masking, shapes


def clipped_policy_loss(
    logp_BxT: Any,
    old_logp_BxT: Any,
    advantage_BxT: Any,
    mask_BxT: Any,
    clip_range: Any,
    normalizer: Any = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The clipped surrogate of Schulman et al. 2017, eq. 7, negated, over the response tokens.

        rho_t = exp(clip(logp_t - old_logp_t, -20, 20))
        loss  = (1/n) sum_t max( -A_t rho_t, -A_t clip(rho_t, 1 - c, 1 + c) )

    ``old_logp`` and the advantage are of the rollout: no gradient goes through them. Where the
    log-ratio is clamped the token has no gradient either; the clamped share is a metric.

    Args:
      logp_BxT, old_logp_BxT: floating, log-probabilities in nats of logits / temperature.
      advantage_BxT: floating, A, whitened beforehand if at all.
      mask_BxT: bool, the response tokens.
      clip_range: c >= 0; 0.2 in Ouyang et al. 2022.
      normalizer: n, the count of the whole minibatch where this is a microbatch or a shard of it;
        by default the tokens of this one.

    Returns:
      loss and metrics: ``loss``; ``approxkl`` = 0.5 mean (logp - old_logp)^2, not clamped;
      ``clipfrac``, the share of tokens where clipping raised the loss; ``ratio``, its mean;
      ``logratio_clamped_fraction`` (these five divide by n); ``ratio_var``;
      ``ratio_max_deviation`` = max |rho - 1|, which is about 0 at the first minibatch of an
      iteration if rollout and update agree. All 0 for an empty mask.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    logp_BxT = shapes.float_array("logp_BxT", logp_BxT, 2)
    old_logp_BxT = shapes.float_array("old_logp_BxT", old_logp_BxT, 2)
    advantage_BxT = shapes.float_array("advantage_BxT", advantage_BxT, 2)
    mask_BxT = shapes.bool_array("mask_BxT", mask_BxT, 2)
    shapes.same_shape(
        logp_BxT=logp_BxT,
        old_logp_BxT=old_logp_BxT,
        advantage_BxT=advantage_BxT,
        mask_BxT=mask_BxT,
    )
    log_ratio_BxT = jnp.where(mask_BxT, logp_BxT - jax.lax.stop_gradient(old_logp_BxT), 0.0)
    advantage_BxT = jax.lax.stop_gradient(jnp.where(mask_BxT, advantage_BxT, 0.0))
    clip_range = shapes.scalar("clip_range", clip_range, log_ratio_BxT.dtype)

    limit = masking.LOG_RATIO_LIMIT
    ratio_BxT = jnp.exp(jnp.clip(log_ratio_BxT, -limit, limit))
    free_BxT = -advantage_BxT * ratio_BxT
    clipped_BxT = -advantage_BxT * jnp.clip(ratio_BxT, 1.0 - clip_range, 1.0 + clip_range)

    def mean(x_BxT: jax.Array) -> jax.Array:
        return masking.masked_mean(x_BxT.astype(log_ratio_BxT.dtype), mask_BxT, normalizer)

    loss = mean(jnp.maximum(free_BxT, clipped_BxT))
    metrics = {
        "loss": loss,
        "approxkl": 0.5 * mean(jnp.square(log_ratio_BxT)),
        "clipfrac": mean(clipped_BxT > free_BxT),
        "ratio": mean(ratio_BxT),
        "ratio_var": masking.masked_var(ratio_BxT, mask_BxT),
        "ratio_max_deviation": jnp.max(jnp.abs(ratio_BxT - 1.0), initial=0.0),
        "logratio_clamped_fraction": mean(jnp.abs(log_ratio_BxT) > limit),
    }
    return loss, jax.lax.stop_gradient(metrics)
