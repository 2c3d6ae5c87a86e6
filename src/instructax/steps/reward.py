"""The reward step: K responses of a prompt behind one copy of it, all pairs in one loss."""

from __future__ import annotations

from typing import Any

import jax
import optax

from instructax.batches import ComparisonBatch
from instructax.config import ModelConfig
from instructax.losses.ranking import best_of_k_loss, pairwise_logistic_loss
from instructax.models import functional as model
from instructax.steps.state import TrainState, apply_gradients, global_norm

Array = Any
Params = Any

LOSSES = {"pairwise": pairwise_logistic_loss, "best_of_k": best_of_k_loss}


def scores(
    params: Params,
    model_config: ModelConfig,
    batch: ComparisonBatch,
    dropout_key: Array | None = None,
) -> Array:
    """score_NxK: the scalar read at each response's last real token (trap T3)."""
    value_BxL = model.scalars(params, model_config, batch.layout, dropout_key=dropout_key)
    return value_BxL[batch.row_NxK, batch.last_NxK]


def ranking_loss(
    params: Params,
    model_config: ModelConfig,
    batch: ComparisonBatch,
    loss: str = "pairwise",
    dropout_key: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    score_NxK = scores(params, model_config, batch, dropout_key)
    return LOSSES[loss](score_NxK, batch.rank_NxK, batch.valid_NxK)


def reward_step(
    state: TrainState,
    batch: ComparisonBatch,
    key: Array | None,
    *,
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    loss: str = "pairwise",
) -> tuple[TrainState, dict[str, Array]]:
    """One update on N prompts' rankings: K forward passes a prompt, not K(K-1)/2."""
    dropout_key = None if key is None else jax.random.fold_in(key, state.step)
    grads, metrics = jax.grad(ranking_loss, has_aux=True)(
        state.params, model_config, batch, loss, dropout_key
    )
    metrics = {f"loss/{name}": value for name, value in metrics.items()}
    return apply_gradients(state, grads, optimizer), metrics | {"grad_norm": global_norm(grads)}
