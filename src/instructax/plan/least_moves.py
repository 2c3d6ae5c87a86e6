"""Bytes that a chip cannot but send on its mesh, whatever the program does.

``fsdp`` shares out the weights of a part of a batch twice, forward and going back, and sums their
gradients once, in the compute dtype (Rajbhandari et al. 2020, section 7.2.1, stage 3: 3 times the
parameters). ``model`` gathers and sums a block's stream twice each way (Korthikanti et al. 2022,
section 4.2.2). ``data`` sums what is left of the gradients, with each part in the compute dtype or once an update in float32, unless
it shares out the weights as well (``ModelConfig.shard_over``). On a ring of n each sends (n-1)/n of the whole, twice that to
sum where all keep it. Recomputation does not count.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from instructax.config import ModelConfig
from instructax.plan.model_flops import matrix_parameters


def forward(
    m: ModelConfig, tokens: float, mesh: Mapping[str, int], parts: int = 1, *, scalar: bool = False
) -> float:
    """Bytes a chip for ``tokens`` of all chips, read in so many parts; a scalar head has no vocabulary to meet."""
    return parts * _weights(m, mesh, scalar) + 4.0 * _stream(m, tokens, mesh)


def train(
    m: ModelConfig,
    tokens: float,
    mesh: Mapping[str, int],
    parts: int = 1,
    *,
    updates: int = 1,
    scalar: bool = False,
) -> float:
    """The same for so many updates on them, which have ``parts`` together."""
    copies, shares = _copies_and_shares(m, mesh)
    width = min(4.0, parts / updates * jnp.dtype(m.compute_dtype).itemsize)
    of_chip = _parameters(m, scalar) / (shares * mesh["model"])
    gradients = 2.0 * (copies - 1) / copies * width * of_chip
    weights = 3.0 * parts * _weights(m, mesh, scalar)
    return weights + 8.0 * _stream(m, tokens, mesh) + updates * gradients


def _parameters(m: ModelConfig, scalar: bool) -> float:
    return float(matrix_parameters(m) + (0 if scalar else m.padded_vocab_size * m.d_model))


def _copies_and_shares(m: ModelConfig, mesh: Mapping[str, int]) -> tuple[int, int]:
    """How often the weights are there, and into how many parts each is shared out beside ``model``."""
    data, fsdp = mesh["data"], mesh["fsdp"]
    return (data, fsdp) if m.shard_over == "fsdp" else (1, data * fsdp)


def _weights(m: ModelConfig, mesh: Mapping[str, int], scalar: bool) -> float:
    _, shares = _copies_and_shares(m, mesh)
    width = jnp.dtype(m.compute_dtype).itemsize
    return (shares - 1) / shares * width * _parameters(m, scalar) / mesh["model"]


def _stream(m: ModelConfig, tokens: float, mesh: Mapping[str, int]) -> float:
    """A gather, or a sum into parts, of every block's stream of a chip's rows."""
    model = mesh["model"]
    of_rows = tokens / (mesh["data"] * mesh["fsdp"])
    width = jnp.dtype(m.compute_dtype).itemsize
    return (model - 1) / model * m.num_layers * of_rows * m.d_model * width
