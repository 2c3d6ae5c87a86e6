"""The reward step: K responses of a prompt behind one copy of it, all pairs in one loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from instructax.batches import ComparisonBatch, Layout
from instructax.config import ModelConfig
from instructax.losses.ranking import best_of_k_loss, pairwise_logistic_loss, ranked_pairs
from instructax.models import functional as model
from instructax.steps.accumulate import Objective, gradient, outputs_of, split_rows
from instructax.steps.state import TrainState, apply_gradients, global_norm

Array = Any
Params = Any

LOSSES = {"pairwise": pairwise_logistic_loss, "best_of_k": best_of_k_loss}


def scores(
    params: Params, model_config: ModelConfig, batch: ComparisonBatch, *, microbatches: int = 1
) -> Array:
    """score_NxK: the scalar read at each response's last real token (trap T3)."""

    def network(params: Params, layout: Layout, _: None) -> Array:
        return model.scalars(params, model_config, layout)

    return _read(outputs_of(network, params, batch.layout, microbatches), batch)


def _read(value_BxL: Array, batch: ComparisonBatch) -> Array:
    return value_BxL[batch.row_NxK, batch.last_NxK]


def ranking_objective(model_config: ModelConfig, loss: str = "pairwise") -> Objective:
    """The mean over prompts of :mod:`instructax.losses.ranking`'s loss by that name."""

    def network(params: Params, batch: ComparisonBatch, dropout_key: Array | None) -> Array:
        return model.scalars(params, model_config, batch.layout, dropout_key=dropout_key)

    def of_values(value_BxL: Array, batch: ComparisonBatch, normalizer: Array | None):
        score_NxK = _read(value_BxL, batch)
        return LOSSES[loss](score_NxK, batch.rank_NxK, batch.valid_NxK, normalizer=normalizer)

    return Objective(network, of_values, _ranked_prompts, _split)


def _ranked_prompts(batch: ComparisonBatch) -> Array:
    """How many prompts have a preferred pair, whatever their scores."""
    no_score_NxK = jnp.zeros(batch.rank_NxK.shape)
    _, preferred_NxKxK = ranked_pairs(no_score_NxK, batch.rank_NxK, batch.valid_NxK)
    return preferred_NxKxK.any(axis=(1, 2)).sum(dtype=jnp.float32)


def _split(batch: ComparisonBatch, parts: int) -> ComparisonBatch:
    """Each part has its rows and names all prompts, of which those of other rows are not valid.

    A prompt with its responses lies in one row, so no pair is torn apart.
    """

    def in_all(x_NxK: Array) -> Array:
        return jnp.broadcast_to(x_NxK, (parts, *x_NxK.shape))

    part_Mx1x1 = jnp.arange(parts)[:, None, None]
    return ComparisonBatch(
        split_rows(batch.layout, parts),
        in_all(batch.row_NxK // parts),
        in_all(batch.last_NxK),
        in_all(batch.rank_NxK),
        in_all(batch.valid_NxK) & (in_all(batch.row_NxK % parts) == part_Mx1x1),
    )


def reward_step(
    state: TrainState,
    batch: ComparisonBatch,
    key: Array | None,
    *,
    model_config: ModelConfig,
    optimizer: optax.GradientTransformation,
    loss: str = "pairwise",
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, Array]]:
    """One update on N prompts' rankings: K forward passes a prompt, not K(K-1)/2."""
    dropout_key = None if key is None else jax.random.fold_in(key, state.step)
    objective = ranking_objective(model_config, loss)
    grads, metrics = gradient(objective, state.params, batch, microbatches, dropout_key)
    metrics = {f"loss/{name}": value for name, value in metrics.items()}
    return apply_gradients(state, grads, optimizer), metrics | {"grad_norm": global_norm(grads)}
