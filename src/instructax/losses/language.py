"""The language-model loss: SFT's, pretraining's, and the ptx term's of PPO-ptx."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import masking, shapes


def masked_nll(
    logp_BxT: Any, mask_BxT: Any, normalizer: Any = None, *, weight_BxT: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood of the tokens in the mask.

        loss = -(1/n) sum_{b,t} mask_bt w_bt logp_bt

    The mean over tokens by default. The sum over each sequence, averaged over sequences (the other
    reading of the ptx term in Ouyang et al. 2022, eq. 2), is ``normalizer`` = number of sequences.

    Args:
      logp_BxT: floating, log-probability of each token, in nats.
      mask_BxT: bool, the tokens that count.
      normalizer: n, the count of the whole batch where this is a microbatch or a shard of it; by
        default sum mask * w of this one.
      weight_BxT: floating, w; 1 by default (for example a smaller weight on prompt tokens).

    Returns:
      loss, in nats a token, and metrics: ``loss``; ``nll``, the unweighted mean over the mask's
      own tokens whatever ``normalizer`` and ``weight`` are; ``tokens``, their number. All 0 for an
      empty mask.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    logp_BxT = shapes.float_array("logp_BxT", logp_BxT, 2)
    mask_BxT = shapes.bool_array("mask_BxT", mask_BxT, 2)
    shapes.same_shape(logp_BxT=logp_BxT, mask_BxT=mask_BxT)

    nll_BxT = -logp_BxT
    if weight_BxT is None:
        loss = masking.masked_mean(nll_BxT, mask_BxT, normalizer)
    else:
        weight_BxT = shapes.float_array("weight_BxT", weight_BxT, 2)
        shapes.same_shape(logp_BxT=logp_BxT, weight_BxT=weight_BxT)
        # A weight of 0 takes a token out, whatever its log-probability: 0 * inf is NaN.
        counts_BxT = mask_BxT & (weight_BxT != 0)
        weighted_BxT = jnp.where(counts_BxT, nll_BxT, 0.0) * jnp.where(counts_BxT, weight_BxT, 0.0)
        if normalizer is None:
            normalizer = masking.masked_sum(weight_BxT, counts_BxT)
        loss = masking.masked_mean(weighted_BxT, counts_BxT, normalizer)

    metrics = {
        "loss": loss,
        "nll": masking.masked_mean(nll_BxT, mask_BxT),
        "tokens": jnp.sum(mask_BxT, dtype=loss.dtype),
    }
    return loss, jax.lax.stop_gradient(metrics)
