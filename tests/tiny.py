"""The smallest model that has everything, and batches for it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from instructax.batches import LmBatch, PromptBatch, padded_layout
from instructax.config import ModelConfig
from instructax.models import functional as model
from instructax.steps.accumulate import Objective

VOCAB, EOS, PAD = 23, 2, 0
MODEL = ModelConfig(
    num_layers=1,
    d_model=16,
    num_heads=2,
    vocab_size=VOCAB,
    vocab_multiple=8,
    context_length=24,
    init_std=0.3,
    remat="none",
)


@functools.cache
def _init(config: ModelConfig, head: str):
    return jax.jit(lambda seed: model.init(jax.random.key(seed), config, head))


def params(seed: int = 0, head: str = "lm", config: ModelConfig = MODEL):
    return _init(config, head)(seed)


def tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, length)).astype(np.int32)


def prompts(lengths, width: int, seed: int = 0, first_episode: int = 0) -> PromptBatch:
    """Left-padded prompts; row b's tokens depend on its episode and length alone, not on the width."""
    rows = [tokens(1, n, seed + first_episode + b)[0] for b, n in enumerate(lengths)]
    token = np.stack([np.pad(row, (width - row.size, 0)) for row in rows])
    mask = np.arange(width)[None] >= width - np.asarray(lengths)[:, None]
    episode = np.arange(first_episode, first_episode + len(rows), dtype=np.int32)
    return PromptBatch(token, mask, episode)


def text(rows: int, length: int, seed: int = 0) -> LmBatch:
    layout = padded_layout(tokens(rows, length, seed), np.ones((rows, length), bool))
    weight = np.ones((rows, length), np.float32)
    weight[:, 0] = 0.0
    return LmBatch(layout, weight)


def mean_of_means(objective: Objective, parts: int) -> Objective:
    """The wrong way to accumulate: each microbatch divides by its own count, and they are averaged."""

    def loss(outputs, batch, normalizer):
        own, metrics = objective.loss(outputs, batch, None)
        return (own if normalizer is None else own / parts), metrics

    return dataclasses.replace(objective, loss=loss)


def rows_of(tree, index):
    return jax.tree.map(lambda x: x[jnp.asarray(index)], tree)


def assert_equal(a, b) -> None:
    """Bit for bit; trees of another structure raise as well."""
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, **tolerance) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)
