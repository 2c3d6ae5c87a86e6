"""The PPO-ptx update: one iteration's minibatches and epochs as one program.

Loss descended (InstructGPT eq. 2, negated): E[clipped surrogate] + gamma * pretraining NLL, as the
sum of two gradients before one optimizer update (trap T17). beta is not here: it acted once, at
rollout. The value network is separate and has its own optimizer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from instructax.batches import LmBatch, Rollout
from instructax.config import ModelConfig, PpoConfig
from instructax.losses.language import masked_nll
from instructax.losses.ppo_ptx import combine_gradients
from instructax.losses.surrogate import clipped_policy_loss
from instructax.losses.value import clipped_value_loss
from instructax.masking import masked_mean
from instructax.models import functional as model
from instructax.rl.kl import adaptive_kl_update
from instructax.rl.packing import take_rollout
from instructax.steps.accumulate import Objective, gradient, measure
from instructax.steps.rollout import values_before
from instructax.steps.state import PpoState, TrainState, apply_gradients, global_norm, move_average

Array = Any
Params = Any


def value_from_reward(reward: Params, config: PpoConfig, gain: float, bias: float) -> Params:
    """The value network's start: the reward model, its scalars as the rewards will be, gain * r + bias (trap T4).

    In the control it predicts 0 at first: from the reward model GAE would hand on what shuffled scores no
    longer say.
    """
    if config.score_control != "none":
        gain, bias = 0.0, 0.0
    head = jax.tree.map(lambda x: x * gain, reward["value_head"])
    return model.shift_scalars(reward | {"value_head": head}, bias)


def policy_objective(model_config: ModelConfig, config: PpoConfig) -> Objective:
    """The clipped surrogate on a minibatch. Dropout is off, as it was at rollout (trap T7)."""

    def network(params: Params, minibatch: Rollout, _: None) -> dict[str, Array]:
        how: dict[str, Any] = {"temperature": config.temperature}
        # Not passed as None, so that a model without this choice can stand in for ours.
        if minibatch.scored_BxM is not None:
            how["scored_BxM"] = minibatch.scored_BxM
        return model.token_statistics(params, model_config, minibatch.layout, **how)

    def loss(statistics: dict[str, Array], minibatch: Rollout, normalizer: Array | None):
        loss, metrics = clipped_policy_loss(
            statistics["logp"],
            minibatch.old_logp_BxL,
            minibatch.advantage_BxL,
            minibatch.mask_BxL,
            config.clip_range,
            normalizer,
        )
        entropy = masked_mean(jax.lax.stop_gradient(statistics["entropy"]), minibatch.mask_BxL)
        return loss, metrics | {"entropy": entropy}

    return Objective(network, loss, _response_tokens)


def value_objective(reward_config: ModelConfig, config: PpoConfig) -> Objective:
    """The clipped squared error to the returns."""

    def network(params: Params, minibatch: Rollout, _: None) -> Array:
        return values_before(params, reward_config, minibatch.layout)

    def loss(value_BxL: Array, minibatch: Rollout, normalizer: Array | None):
        return clipped_value_loss(
            value_BxL,
            minibatch.old_value_BxL,
            minibatch.return_BxL,
            minibatch.mask_BxL,
            config.value_clip_range,
            normalizer,
        )

    return Objective(network, loss, _response_tokens)


def _response_tokens(minibatch: Rollout) -> Array:
    return minibatch.mask_BxL.sum(dtype=jnp.float32)


def ptx_objective(model_config: ModelConfig, config: PpoConfig) -> Objective:
    """-E log pi(x) on pretraining text: mean over tokens, or sum over a row and mean over rows."""

    def count(batch: LmBatch) -> Array:
        weight_BxL = batch.weight_BxL
        return weight_BxL.sum() if config.ptx_loss == "mean" else weight_BxL.shape[0]

    def network(params: Params, batch: LmBatch, _: None) -> Array:
        return model.token_logprobs(params, model_config, batch.layout)

    def loss(logp_BxL: Array, batch: LmBatch, normalizer: Array | None):
        if normalizer is None and config.ptx_loss == "sum":
            normalizer = count(batch)
        weight_BxL = batch.weight_BxL
        return masked_nll(logp_BxL, weight_BxL != 0, normalizer, weight_BxT=weight_BxL)

    return Objective(network, loss, count)


def policy_gradients(
    params: Params,
    model_config: ModelConfig,
    config: PpoConfig,
    minibatch: Rollout,
    ptx_batch: LmBatch,
) -> tuple[Params, dict[str, Array]]:
    """rl_coef * grad(PPO loss) + gamma * grad(ptx loss), with both norms and their cosine.

    Each of the two is whole, of all its microbatches, before they meet.
    """
    surrogate = policy_objective(model_config, config)
    pretraining = ptx_objective(model_config, config)
    microbatches = config.grad_accumulation
    if config.rl_coef == 0.0:
        # The gradient would be multiplied by 0; the loss is measured all the same, for the figures.
        policy = measure(surrogate, params, minibatch, microbatches)
        grads = jax.tree.map(jnp.zeros_like, params)
    else:
        grads, policy = gradient(surrogate, params, minibatch, microbatches)
    if config.rl_coef not in (0.0, 1.0):
        grads = jax.tree.map(lambda g: config.rl_coef * g, grads)
    metrics = {
        "ppo/loss/policy": policy["loss"],
        "ppo/policy/entropy": policy["entropy"],
        "ppo/policy/approxkl": policy["approxkl"],
        "ppo/policy/clipfrac": policy["clipfrac"],
        "ppo/policy/logratio_clamped": policy["logratio_clamped_fraction"],
        "val/ratio": policy["ratio"],
        "val/ratio_var": policy["ratio_var"],
        "val/ratio_max_deviation": policy["ratio_max_deviation"],
    }
    if config.ptx_coef == 0.0:
        # The gradient would be multiplied by 0; the loss is measured all the same, for the figures.
        norm = global_norm(grads)
        metrics |= {"grad_norm/ppo": norm, "grad_norm/policy": norm}
        if config.ptx_at_zero == "measure":
            metrics["ptx/nll"] = measure(pretraining, params, ptx_batch, microbatches)["nll"]
        return grads, metrics
    ptx_grads, ptx = gradient(pretraining, params, ptx_batch, microbatches)
    grads, norms = combine_gradients(grads, ptx_grads, config.ptx_coef)
    metrics |= {
        "ptx/nll": ptx["nll"],
        "grad_norm/ppo": norms["ppo_grad_norm"],
        "grad_norm/ptx": norms["ptx_grad_norm"],
        "grad_norm/policy": norms["grad_norm"],
        "grad/cosine": norms["grad_cosine"],
    }
    return grads, metrics


def ppo_update(
    state: PpoState,
    minibatch: Rollout,
    ptx_batch: LmBatch,
    *,
    config: PpoConfig,
    model_config: ModelConfig,
    reward_config: ModelConfig,
    policy_optimizer: optax.GradientTransformation,
    value_optimizer: optax.GradientTransformation,
) -> tuple[PpoState, dict[str, Array]]:
    """One minibatch: one update of the policy, one of the value network."""
    grads, metrics = policy_gradients(
        state.policy.params, model_config, config, minibatch, ptx_batch
    )
    policy = apply_gradients(state.policy, grads, policy_optimizer)
    value, value_metrics = _value_update(
        state.value, minibatch, config, reward_config, value_optimizer
    )
    ema = state.ema
    if config.ema_every == "update":
        ema = move_average(ema, policy.params, config.ema_decay)
    metrics |= value_metrics
    metrics["ppo/loss/total"] = metrics["ppo/loss/policy"] + metrics["ppo/loss/value"]
    return PpoState(policy, value, ema, state.kl_coef, state.iteration), metrics


def _value_update(
    state: TrainState, minibatch: Rollout, config: PpoConfig, reward_config: ModelConfig, optimizer
) -> tuple[TrainState, dict[str, Array]]:
    objective = value_objective(reward_config, config)
    grads, value = gradient(objective, state.params, minibatch, config.grad_accumulation)
    metrics = {
        "ppo/loss/value": value["loss"],
        "ppo/val/vpred": value["vpred"],
        "ppo/val/error": value["error"],
        "ppo/val/clipfrac": value["clipfrac"],
        "ppo/val/mean": value["mean"],
        "ppo/val/var": value["var"],
        "ppo/val/var_explained": value["var_explained"],
        "ppo/returns/mean": value["returns_mean"],
        "ppo/returns/var": value["returns_var"],
        "grad_norm/value": global_norm(grads),
    }
    return apply_gradients(state, grads, optimizer), metrics


def minibatch_order(key: Array, episodes: int, config: PpoConfig) -> Array:
    """index_UxM: the episodes of each of the U updates; every epoch a fresh permutation of all."""
    epochs = [
        jax.random.permutation(jax.random.fold_in(key, epoch), episodes)
        for epoch in range(config.inner_epochs)
    ]
    return jnp.concatenate(epochs).reshape(-1, config.minibatch_size)


def ppo_iteration(
    state: PpoState,
    rollout: Rollout,
    ptx_batches: LmBatch,
    observed_kl: Array,
    source_UxRxL: Array,
    scored_UxRxM: Array | None = None,
    *,
    config: PpoConfig,
    **networks: Any,
) -> tuple[PpoState, dict[str, Array]]:
    """All updates of an iteration as one scan, then the EMA and the KL controller.

    Args:
      rollout: B frozen episodes.
      ptx_batches: pretraining text of every update, stacked on a leading axis U = updates.
      observed_kl: nats a sequence, of this iteration's rollout.
      source_UxRxL: the episodes of each update and how they lie in rows; :func:`minibatch_order`
        with :func:`~instructax.rl.packing.padded_rows` or ``packed_rows``.
      scored_UxRxM: the slots of those rows with a response (:func:`~instructax.rl.packing.scored_rows`);
        None computes the logits of every slot.
      networks: model_config, reward_config, policy_optimizer, value_optimizer of :func:`ppo_update`.

    Returns:
      (state, metrics): means over the updates, and ``val/first_ratio_deviation``, the max
      |ratio - 1| of the first minibatch, which is 0 up to rounding if rollout and update agree.
    """

    def one(state, scanned):
        source_RxL, scored_RxM, ptx_batch = scanned
        minibatch = take_rollout(rollout, source_RxL, scored_RxM)
        return ppo_update(state, minibatch, ptx_batch, config=config, **networks)

    state, metrics = jax.lax.scan(one, state, (source_UxRxL, scored_UxRxM, ptx_batches))
    first_deviation = metrics["val/ratio_max_deviation"][0]
    metrics = {name: value.mean() for name, value in metrics.items()}
    metrics["val/first_ratio_deviation"] = first_deviation
    ema, kl_coef = state.ema, state.kl_coef
    if config.ema_every == "iteration":
        ema = move_average(ema, state.policy.params, config.ema_decay)
    if config.kl_controller == "adaptive":
        kl_coef = adaptive_kl_update(
            kl_coef, observed_kl, config.kl_target, rollout.mask_BxL.shape[0], config.kl_horizon
        )
    return PpoState(state.policy, state.value, ema, kl_coef, state.iteration + 1), metrics
