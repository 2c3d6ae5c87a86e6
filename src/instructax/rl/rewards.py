"""What an episode is paid: the reward model's score once, at its end, and the KL at every token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import masking, shapes

MISSING_EOS_RULES = ("replace", "subtract", "none")


def apply_missing_eos(score_B: Any, finished_B: Any, rule: str, value: Any) -> jax.Array:
    """The score of a response that was cut off before its end token.

    ============  =====================  =====================================================
    ``replace``   value                  Ziegler et al. 2019, with value = -1
    ``subtract``  score - value          a penalty: a positive value lowers the score
    ``none``      score                  the value is not used
    ============  =====================  =====================================================

    Args:
      score_B: floating, the reward model's scores.
      finished_B: bool, True where the response ended by EOS or another stop token.
      rule: a name from the table.
      value: a number; what it means depends on the rule.

    Returns:
      score_B, float32 (float64 for float64 input); finished responses keep theirs.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name; another rule.
    """
    score_B = shapes.float_array("score_B", score_B, 1)
    finished_B = shapes.bool_array("finished_B", finished_B, 1)
    shapes.same_shape(score_B=score_B, finished_B=finished_B)
    if rule == "none":
        return score_B
    value = shapes.scalar("value", value, score_B.dtype)
    if rule == "replace":
        return jnp.where(finished_B, score_B, value)
    if rule == "subtract":
        return jnp.where(finished_B, score_B, score_B - value)
    raise ValueError(f"rule must be one of {', '.join(MISSING_EOS_RULES)}, got {rule!r}")


def shaped_reward(score_B: Any, kl_BxT: Any, mask_BxT: Any, kl_coef: Any) -> jax.Array:
    """Per-token reward of Ouyang et al. 2022, eq. 2 (placed as in Ziegler et al. 2019).

        r_t = -beta kl_t + [t is the last real token of the row] score

    Beta acts here and nowhere else; PPO updates reuse these rewards as they are.

    Args:
      score_B: floating, the score of each response, after the missing-EOS rule.
      kl_BxT: floating, the per-token KL at rollout, in nats.
      mask_BxT: bool, the response tokens, contiguous in each row, starting anywhere.
      kl_coef: beta, a number or a traced scalar.

    Returns:
      reward_BxT, float32 (float64 for float64 input), 0 outside the mask. A row without a real
      token gets no reward.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name. Integer scores are
      refused: a buffer of their dtype would cut 0.7 to 0.
    """
    score_B = shapes.float_array("score_B", score_B, 1)
    kl_BxT = shapes.float_array("kl_BxT", kl_BxT, 2)
    mask_BxT = shapes.bool_array("mask_BxT", mask_BxT, 2)
    shapes.same_shape(kl_BxT=kl_BxT, mask_BxT=mask_BxT)
    if score_B.shape[0] != kl_BxT.shape[0]:
        raise ValueError(f"score_B has {score_B.shape[0]} rows, but kl_BxT has {kl_BxT.shape[0]}")
    kl_coef = shapes.scalar("kl_coef", kl_coef, jnp.result_type(score_B, kl_BxT))

    penalty_BxT = -kl_coef * jnp.where(mask_BxT, kl_BxT, 0.0)
    slot_1xT = jnp.arange(mask_BxT.shape[1], dtype=jnp.int32)[None, :]
    is_last_BxT = mask_BxT & (slot_1xT == masking.last_token_index(mask_BxT)[:, None])
    return penalty_BxT + jnp.where(is_last_BxT, score_B[:, None], 0.0)
