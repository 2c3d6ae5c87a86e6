"""Adam, schedule, clipping and weight decay from an :class:`OptimizerConfig`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from instructax.config import OptimizerConfig

Params = Any

DECAYED = ("kernel", "token", "position")


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of update ``step`` (from 0): linear warm-up, then the schedule to its final fraction.

    Warm-up update s of W has peak * (f + (1 - f) * s / W) with f = warmup_from; after it, with
    u in [0, 1] the share done of the remaining updates, cosine is
    peak * (final + (1 - final) * (1 + cos(pi u)) / 2) and linear peak * (1 - (1 - final) * u).
    """
    peak, warm = config.learning_rate, config.warmup_steps
    final, remaining = config.final_fraction, max(1, total_steps - warm)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warm) / remaining, 0.0, 1.0)
        if config.schedule == "cosine":
            after = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        elif config.schedule == "linear":
            after = 1.0 - (1.0 - final) * done
        else:
            after = jnp.ones(())
        before = config.warmup_from + (1.0 - config.warmup_from) * step / max(1, warm)
        return peak * jnp.where(step < warm, before, after)

    return schedule


class _AdamState(NamedTuple):
    count: Any
    mu: Params
    nu: Params


def _adam_eps_outside(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam as TensorFlow 1 has it: sqrt(1-b2^t)/(1-b1^t) * m / (sqrt(v) + eps) (trap T18).

    eps joins the *uncorrected* sqrt(v); optax and torch add it to the corrected one.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _AdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        t = count.astype(jnp.float32)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        updates = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, _AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _decayed(params: Params) -> Params:
    """True for matrices and embeddings; norms and biases are not decayed."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """clip by global norm -> Adam -> + weight_decay * params -> * -learning_rate(step)."""
    parts = []
    if config.max_grad_norm is not None:
        parts.append(optax.clip_by_global_norm(config.max_grad_norm))
    if config.eps_inside_correction:
        parts.append(_adam_eps_outside(config.b1, config.b2, config.eps))
    else:
        parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    if config.weight_decay != 0.0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decayed))
    parts.append(optax.scale_by_learning_rate(learning_rate(config, total_steps)))
    return optax.chain(*parts)
