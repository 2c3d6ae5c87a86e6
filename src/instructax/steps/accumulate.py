"""A batch in microbatches: the update of the whole batch, in the memory of one of them.

The gradients of microbatches add up to the batch's only where each of them divides by the count of
the *whole* batch. A mean of their means would give a token more weight the fewer stand beside it. So
an objective comes in two parts: the network, which reads rows and returns a number or two a slot,
and the loss over these numbers, which takes the count. The numbers of all microbatches are kept, and
the metrics are the loss's own over the whole batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from instructax.partitioning import constrain

Array = Any
Batch = Any
Outputs = Any
Params = Any


def split_rows(batch: Batch, parts: int) -> Batch:
    """Every leaf R x ... as parts x R/parts x ...: row r goes to part r mod parts.

    Rows are dealt out like cards, so that each device of a mesh has its share of every part among
    the rows that it holds already: nothing moves.
    """

    def split(x: Array) -> Array:
        rows = x.shape[0]
        if rows % parts:
            raise ValueError(f"a batch of {rows} rows is not divided by {parts} microbatches")
        x = jnp.swapaxes(x.reshape((rows // parts, parts) + x.shape[1:]), 0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, batch)


def join_rows(parts: Any) -> Any:
    """The inverse of :func:`split_rows`."""

    def join(x: Array) -> Array:
        x = jnp.swapaxes(x, 0, 1)
        x = x.reshape((x.shape[0] * x.shape[1],) + x.shape[2:])
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(join, parts)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step descends, as ``(params, batch, dropout_key=None) -> (loss, metrics)``."""

    network: Callable[[Params, Batch, Array | None], Outputs]
    """(params, batch, dropout_key) -> arrays R x ..., each row of its own row of the batch alone."""
    loss: Callable[[Outputs, Batch, Array | None], tuple[Array, dict[str, Array]]]
    """(outputs, batch, normalizer) -> (loss, metrics); the normalizer is None for a whole batch."""
    normalizer: Callable[[Batch], Array]
    """What the loss of a whole batch divides by."""
    split: Callable[[Batch, int], Batch] = split_rows

    def __call__(
        self, params: Params, batch: Batch, dropout_key: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        return self.loss(self.network(params, batch, dropout_key), batch, None)


def gradient(
    objective: Objective,
    params: Params,
    batch: Batch,
    microbatches: int = 1,
    dropout_key: Array | None = None,
) -> tuple[Params, dict[str, Array]]:
    """(gradient of the loss, metrics) of a whole batch, the same up to rounding for any ``microbatches``.

    Dropout draws by microbatch, so that with it another number draws another, equally good mask.

    Raises:
      ValueError: rows that ``microbatches`` does not divide.
    """
    if microbatches == 1:
        return jax.grad(objective, has_aux=True)(params, batch, dropout_key)
    normalizer = objective.normalizer(batch)

    def one(total: Params, scanned: tuple[Array, Batch]) -> tuple[Params, Outputs]:
        index, part = scanned
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)

        def loss(params: Params) -> tuple[Array, Outputs]:
            outputs = objective.network(params, part, key)
            return objective.loss(outputs, part, normalizer)[0], outputs

        grads, outputs = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, grads), outputs

    parts = objective.split(batch, microbatches)
    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, outputs = jax.lax.scan(one, zeros, (jnp.arange(microbatches), parts))
    return grads, objective.loss(join_rows(outputs), batch, None)[1]


def outputs_of(
    network: Callable[[Params, Batch, None], Outputs],
    params: Params,
    batch: Batch,
    microbatches: int = 1,
) -> Outputs:
    """The network's outputs on a whole batch, without dropout and without a gradient."""
    if microbatches == 1:
        return network(params, batch, None)
    parts = split_rows(batch, microbatches)
    return join_rows(jax.lax.map(lambda part: network(params, part, None), parts))


def measure(
    objective: Objective, params: Params, batch: Batch, microbatches: int = 1
) -> dict[str, Array]:
    """The metrics of a whole batch, without a gradient."""
    outputs = outputs_of(objective.network, params, batch, microbatches)
    return objective.loss(outputs, batch, None)[1]
