"""The language-model step: pretraining, SFT and the RL init are this step on other batches."""

from __future__ import annotations

from typing import Any

import jax
import optax

from instructax.batches import LmBatch
from instructax.config import ModelConfig
from instructax.losses.language import masked_nll
from instructax.models import functional as model
from instructax.steps.accumulate import Objective, gradient
from instructax.steps.state import TrainState, apply_gradients, global_norm

Array = Any
Params = Any


def lm_objective(model_config: ModelConfig) -> Objective:
    """-sum_t w_t log p(x_t | x_<t) / sum_t w_t over all tokens of the batch that have a predecessor.

    With w = 1 on response and EOS tokens this is the SFT loss, with w = 1 everywhere pretraining's.
    """

    def network(params: Params, batch: LmBatch, dropout_key: Array | None) -> Array:
        return model.token_logprobs(
            params,
            model_config,
            batch.layout,
            dropout_key=dropout_key,
            scored_BxM=batch.scored_BxM,
        )

    def loss(logp_BxL: Array, batch: LmBatch, normalizer: Array | None):
        weight_BxL = batch.weight_BxL
        return masked_nll(logp_BxL, weight_BxL != 0, normalizer, weight_BxT=weight_BxL)

    return Objective(network, loss, normalizer=lambda batch: batch.weight_BxL.sum())


def lm_step(
    state: TrainState,
    batch: LmBatch,
    key: Array | None,
    *,
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One update. ``key`` seeds dropout; none turns it off."""
    dropout_key = None if key is None else jax.random.fold_in(key, state.step)
    objective = lm_objective(model_config)
    grads, metrics = gradient(objective, state.params, batch, microbatches, dropout_key)
    metrics = {f"loss/{name}": value for name, value in metrics.items()}
    return apply_gradients(state, grads, optimizer), metrics | {"grad_norm": global_norm(grads)}
