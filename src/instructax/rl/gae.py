"""Generalized advantage estimation over masked responses."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import shapes


def generalized_advantage(
    reward_BxT: Any, value_BxT: Any, mask_BxT: Any, discount: Any, gae_lambda: Any
) -> tuple[jax.Array, jax.Array]:
    """Advantages and returns (Schulman et al. 2016, eq. 16, over a finite episode).

        delta_t = r_t + discount V_{t+1} - V_t
        A_t     = delta_t + discount lambda A_{t+1}
        R_t     = A_t + V_t

    V and A are 0 past the end of each *row's* mask, not of the buffer. The advantages are not
    whitened, so that the returns are in the units of the reward; whiten afterwards.

    Args:
      reward_BxT: floating.
      value_BxT: floating, V_t, the value before token t.
      mask_BxT: bool, the response tokens, contiguous in each row, starting anywhere.
      discount: 1 in Ouyang et al. 2022 (the gamma of RL, not of ptx).
      gae_lambda: lambda; 0.95 in Ziegler et al. 2019.

    Returns:
      (advantage_BxT, return_BxT), float32 (float64 for float64 input), 0 outside the mask.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    reward_BxT = shapes.float_array("reward_BxT", reward_BxT, 2)
    value_BxT = shapes.float_array("value_BxT", value_BxT, 2)
    mask_BxT = shapes.bool_array("mask_BxT", mask_BxT, 2)
    shapes.same_shape(reward_BxT=reward_BxT, value_BxT=value_BxT, mask_BxT=mask_BxT)
    dtype = jnp.result_type(reward_BxT, value_BxT)
    discount = shapes.scalar("discount", discount, dtype)
    gae_lambda = shapes.scalar("gae_lambda", gae_lambda, dtype)

    reward_BxT = jnp.where(mask_BxT, reward_BxT, 0.0).astype(dtype)
    value_BxT = jnp.where(mask_BxT, value_BxT, 0.0).astype(dtype)
    next_value_BxT = jnp.pad(value_BxT[:, 1:], ((0, 0), (0, min(1, value_BxT.shape[1]))))
    delta_BxT = reward_BxT + discount * next_value_BxT - value_BxT

    def backward(
        next_advantage_B: jax.Array, step: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        delta_B, mask_B = step
        advantage_B = jnp.where(mask_B, delta_B + discount * gae_lambda * next_advantage_B, 0.0)
        return advantage_B, advantage_B

    nothing_B = jnp.zeros(delta_BxT.shape[:1], dtype)
    _, advantage_TxB = jax.lax.scan(backward, nothing_B, (delta_BxT.T, mask_BxT.T), reverse=True)
    advantage_BxT = advantage_TxB.T
    return advantage_BxT, advantage_BxT + value_BxT
