"""Reward-model losses on K-way rankings, and the preferred pairs behind them.

Ranks are integers, lower is better; equal ranks are a tie, and a tie says nothing. K varies by
prompt through ``valid_BxK``. All pairs of a prompt are one batch element: pairs of one prompt are
correlated, and shuffled over batches they are overfitted in one pass (Ouyang et al. 2022, 3.5).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import masking, shapes


def pairwise_logistic_loss(
    score_BxK: Any, rank_BxK: Any, valid_BxK: Any, *, normalizer: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pairwise logistic loss over all preferred pairs of each prompt (Ouyang et al. 2022, eq. 1).

        loss = mean_prompts  -(1/n_pairs) sum_{(w,l)} log sigmoid(r_w - r_l)

    over the pairs whose rank_w < rank_l. n_pairs counts the pairs that are left when ties are
    dropped, C(K,2) where there are none; the outer mean is over the prompts that have a pair.

    Args:
      score_BxK: floating, r.
      rank_BxK: any integers, lower is better.
      valid_BxK: bool, False where a prompt has fewer than K responses.
      normalizer: the number of prompts with a pair in the whole batch, where this is a microbatch
        or a shard of it; by default that of this one.

    Returns:
      loss, in nats a pair, 0 where no prompt has a pair, and metrics: ``loss``; ``accuracy``, the
      share of preferred pairs that the scores order rightly, equal scores counted half;
      ``margin``, the mean of r_w - r_l over pairs; ``pairs``; ``prompts`` that have one. Weight
      accuracy and margin by ``pairs`` to combine them over batches.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    _, margin_BxKxK, preferred_BxKxK = _margins(score_BxK, rank_BxK, valid_BxK)
    pairs_B = jnp.sum(preferred_BxKxK, axis=(1, 2), dtype=margin_BxKxK.dtype)
    nll_BxKxK = jnp.where(preferred_BxKxK, -jax.nn.log_sigmoid(margin_BxKxK), 0.0)
    loss_B = masking.ratio_or_zero(jnp.sum(nll_BxKxK, axis=(1, 2)), pairs_B)
    loss = masking.masked_mean(loss_B, pairs_B > 0, normalizer)
    right_BxKxK = jnp.heaviside(margin_BxKxK, 0.5)
    metrics = {
        "loss": loss,
        "accuracy": masking.masked_mean(right_BxKxK, preferred_BxKxK),
        "margin": masking.masked_mean(margin_BxKxK, preferred_BxKxK),
        "pairs": jnp.sum(pairs_B),
        "prompts": jnp.sum(pairs_B > 0, dtype=loss.dtype),
    }
    return loss, jax.lax.stop_gradient(metrics)


def best_of_k_loss(
    score_BxK: Any, rank_BxK: Any, valid_BxK: Any, *, normalizer: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Softmax cross-entropy on the best response, the baseline of Ziegler et al. 2019, eq. 1.

        loss = mean_prompts  -(1/|best|) sum_{i in best} log( exp r_i / sum_j exp r_j )

    Where several responses share the lowest rank, each is as likely to be the labeler's pick. For
    K = 2 it is :func:`pairwise_logistic_loss`. Prompts without a preferred pair say nothing.

    Args:
      score_BxK, rank_BxK, valid_BxK, normalizer: as for :func:`pairwise_logistic_loss`.

    Returns:
      loss, in nats a prompt, 0 where no prompt has a pair, and metrics: ``loss``; ``accuracy``,
      the share of prompts whose highest score is a best response's (a draw shared out evenly);
      ``prompts`` that have a pair.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    score_BxK, _, preferred_BxKxK = _margins(score_BxK, rank_BxK, valid_BxK)
    has_pair_B = jnp.any(preferred_BxKxK, axis=(1, 2))
    best_BxK = valid_BxK & ~jnp.any(preferred_BxKxK, axis=1)

    # A finite floor, as a row without any response has no finite logsumexp over -inf.
    score_BxK = jnp.where(valid_BxK, score_BxK, jnp.finfo(score_BxK.dtype).min)
    logp_BxK = jax.nn.log_softmax(score_BxK, axis=1)
    loss_B = -_mean_over_row(logp_BxK, best_BxK)
    loss = masking.masked_mean(loss_B, has_pair_B, normalizer)

    top_BxK = valid_BxK & (score_BxK == jnp.max(score_BxK, axis=1, keepdims=True))
    hit_B = _mean_over_row(best_BxK.astype(loss.dtype), top_BxK)
    metrics = {
        "loss": loss,
        "accuracy": masking.masked_mean(hit_B, has_pair_B),
        "prompts": jnp.sum(has_pair_B, dtype=loss.dtype),
    }
    return loss, jax.lax.stop_gradient(metrics)


def ranked_pairs(score_BxK: Any, rank_BxK: Any, valid_BxK: Any) -> tuple[jax.Array, jax.Array]:
    """What the scores say of each preferred pair, for accuracy and calibration.

        p_bwl = sigmoid(r_w - r_l)  where response w is preferred to response l

    Args:
      score_BxK, rank_BxK, valid_BxK: as for :func:`pairwise_logistic_loss`.

    Returns:
      p_BxKxK, 0 where there is no preference, and preferred_BxKxK, bool, True at [b, w, l]. Each
      untied pair appears once, winner first.
    """
    _, margin_BxKxK, preferred_BxKxK = _margins(score_BxK, rank_BxK, valid_BxK)
    return jnp.where(preferred_BxKxK, jax.nn.sigmoid(margin_BxKxK), 0.0), preferred_BxKxK


def _margins(
    score_BxK: Any, rank_BxK: Any, valid_BxK: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(r, r_w - r_l at [b, w, l] where w is preferred to l, else 0; where that is), checked."""
    score_BxK = shapes.float_array("score_BxK", score_BxK, 2)
    rank_BxK = shapes.int_array("rank_BxK", rank_BxK, 2)
    valid_BxK = shapes.bool_array("valid_BxK", valid_BxK, 2)
    shapes.same_shape(score_BxK=score_BxK, rank_BxK=rank_BxK, valid_BxK=valid_BxK)
    preferred_BxKxK = (
        (rank_BxK[:, :, None] < rank_BxK[:, None, :])
        & valid_BxK[:, :, None]
        & valid_BxK[:, None, :]
    )
    # Subtraction is linear, so one where keeps a NaN out of the gradient too.
    margin_BxKxK = score_BxK[:, :, None] - score_BxK[:, None, :]
    return score_BxK, jnp.where(preferred_BxKxK, margin_BxKxK, 0.0), preferred_BxKxK


def _mean_over_row(x_BxK: jax.Array, mask_BxK: jax.Array) -> jax.Array:
    total_B = jnp.sum(jnp.where(mask_BxK, x_BxK, 0.0), axis=1)
    return masking.ratio_or_zero(total_B, jnp.sum(mask_BxK, axis=1, dtype=total_B.dtype))
