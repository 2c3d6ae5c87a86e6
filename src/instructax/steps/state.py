"""What a stage carries from step to step, and saves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from instructax.batches import pytree

Array = Any
Params = Any


@pytree
class TrainState:
    """One network in training: float32 parameters, optimizer state, updates done."""

    params: Params
    opt_state: Any
    step: Array  # int32


@pytree
class PpoState:
    """All that PPO needs to go on as if nothing had happened; the random key derives from the seed."""

    policy: TrainState
    value: TrainState
    ema: Params  # float32 average of the policy's parameters
    kl_coef: Array  # float32, moved by the adaptive controller only
    iteration: Array  # int32


def by_network(policy: Any, value: Any) -> PpoState:
    """One thing for all of the policy and one for all of the value network, in the state's places."""
    return PpoState(policy=policy, value=value, ema=policy, kl_coef=policy, iteration=policy)


def create(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)


def move_average(ema: Params, params: Params, decay: float) -> Params:
    """ema <- decay * ema + (1 - decay) * params, in float32: .992 vanishes in bfloat16 (trap T20)."""
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)


def global_norm(tree: Params) -> Array:
    return optax.tree_utils.tree_norm(tree)
