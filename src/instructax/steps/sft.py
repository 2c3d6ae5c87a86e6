"""The language-model step: pretraining, SFT and the RL init are this step on other batches."""

from __future__ import annotations

from typing import Any

import jax
import optax

from instructax.batches import LmBatch
from instructax.config import ModelConfig
from instructax.losses.language import masked_nll
from instructax.models import functional as model
from instructax.steps.state import TrainState, apply_gradients, global_norm

Array = Any
Params = Any


def lm_loss(
    params: Params, model_config: ModelConfig, batch: LmBatch, dropout_key: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """-sum_t w_t log p(x_t | x_<t) / sum_t w_t over all tokens of the batch that have a predecessor.

    With w = 1 on response and EOS tokens this is the SFT loss, with w = 1 everywhere pretraining's.
    """
    logp_BxL = model.token_logprobs(params, model_config, batch.layout, dropout_key=dropout_key)
    weight_BxL = batch.weight_BxL
    return masked_nll(logp_BxL, weight_BxL != 0, weight_BxT=weight_BxL)


def lm_step(
    state: TrainState,
    batch: LmBatch,
    key: Array | None,
    *,
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. ``key`` seeds dropout; none turns it off."""
    dropout_key = None if key is None else jax.random.fold_in(key, state.step)
    grads, metrics = jax.grad(lm_loss, has_aux=True)(state.params, model_config, batch, dropout_key)
    metrics = {f"loss/{name}": value for name, value in metrics.items()}
    return apply_gradients(state, grads, optimizer), metrics | {"grad_norm": global_norm(grads)}
