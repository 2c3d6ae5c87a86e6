"""The KL penalty to the reference policy: its per-token estimators and the adaptive coefficient.

Report the KL as the mean over sequences of the *sum* over a sequence's tokens, in nats. Beta is
``kl_coef`` throughout.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import masking, shapes

ESTIMATORS = ("k1", "k2", "k3", "abs", "max0")
ADAPTIVE_ERROR_LIMIT = 0.2


def per_token_kl(
    logp_BxT: Any, ref_logp_BxT: Any, mask_BxT: Any, estimator: str = "k1"
) -> jax.Array:
    """Estimate of KL(pi || pi_ref) from each sampled token, d = logp - ref_logp.

    ========  ======================  ==========================================================
    ``k1``    d                       the reward's own in Ouyang et al. 2022, eq. 2: signed,
                                      unbiased, and its sum is the sequence's log-ratio
    ``k2``    d^2 / 2                 biased, low variance
    ``k3``    exp(-d) - 1 + d         unbiased, never negative; d is clamped to +-20 in the exp
    ``abs``   |d|                     no estimate of the KL: another penalty
    ``max0``  max(d, 0)               no estimate of the KL: another penalty
    ========  ======================  ==========================================================

    As a penalty in the reward each has another optimum; only k1's is the KL-regularised one. The
    k's are Schulman's (2020, "Approximating KL divergence").

    Args:
      logp_BxT, ref_logp_BxT: floating, log-probabilities in nats, both at the same temperature.
      mask_BxT: bool, the response tokens.
      estimator: a name from the table.

    Returns:
      kl_BxT in nats, float32 (float64 for float64 input), 0 outside the mask.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name; another estimator.
    """
    logp_BxT = shapes.float_array("logp_BxT", logp_BxT, 2)
    ref_logp_BxT = shapes.float_array("ref_logp_BxT", ref_logp_BxT, 2)
    mask_BxT = shapes.bool_array("mask_BxT", mask_BxT, 2)
    shapes.same_shape(logp_BxT=logp_BxT, ref_logp_BxT=ref_logp_BxT, mask_BxT=mask_BxT)
    # Each estimator is 0 at d = 0, so the mask needs applying only here.
    d_BxT = jnp.where(mask_BxT, logp_BxT - ref_logp_BxT, 0.0)
    if estimator == "k1":
        return d_BxT
    if estimator == "k2":
        return 0.5 * jnp.square(d_BxT)
    if estimator == "k3":
        limit = masking.LOG_RATIO_LIMIT
        return jnp.expm1(jnp.clip(-d_BxT, -limit, limit)) + d_BxT
    if estimator == "abs":
        return jnp.abs(d_BxT)
    if estimator == "max0":
        return jnp.maximum(d_BxT, 0.0)
    raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")


def adaptive_kl_update(
    kl_coef: Any, observed_kl: Any, target: Any, n_episodes: Any, horizon: Any
) -> jax.Array:
    """The controller of Ziegler et al. 2019, 2.2: beta grows where the KL exceeds its target.

        e = clip(KL / target - 1, -0.2, 0.2);   beta <- beta (1 + e n_episodes / horizon)

    Args:
      kl_coef: beta before.
      observed_kl: mean over sequences of the summed k1, in nats a sequence (not a token).
      target: nats a sequence, above 0; 6 in Ziegler et al.
      n_episodes: episodes since the last update.
      horizon: episodes over which beta adapts; 10,000 in Ziegler et al.

    Returns:
      beta after, a float32 scalar (float64 if kl_coef is). A beta of 0 stays 0.
    """
    # A Python float has no precision to keep; an array of float64 has.
    is_double = hasattr(kl_coef, "dtype") and jnp.asarray(kl_coef).dtype == jnp.float64
    dtype = jnp.float64 if is_double else jnp.float32
    kl_coef = shapes.scalar("kl_coef", kl_coef, dtype)
    observed_kl = shapes.scalar("observed_kl", observed_kl, dtype)
    target = shapes.scalar("target", target, dtype)
    n_episodes = shapes.scalar("n_episodes", n_episodes, dtype)
    horizon = shapes.scalar("horizon", horizon, dtype)
    error = jnp.clip(observed_kl / target - 1.0, -ADAPTIVE_ERROR_LIMIT, ADAPTIVE_ERROR_LIMIT)
    return kl_coef * (1.0 + error * n_episodes / horizon)
