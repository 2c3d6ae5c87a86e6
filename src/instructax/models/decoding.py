"""Where parameters and activations lie on the mesh while one token a row is decoded.

Kernels stay and activations travel (:data:`instructax.partitioning.DECODING`). The stream is divided by rows over
``fsdp``. Before a product its rows are gathered; behind one that ends in the stream they are summed and dealt out
again. Between them heads lie on ``fsdp``, but the cache divides rows, as training does: queries, keys
and values change over, and what was looked up changes back. Where the mesh has no ``fsdp`` or does not divide the
sizes, a kernel's d_model lies on it, and the stream's does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from instructax.config import ModelConfig
from instructax.partitioning import (
    DECODING,
    PLACEMENTS,
    RULES,
    block_axes,
    constrain,
    decoding_rules,
    param_specs,
    path_name,
)

Array = Any
Params = Any


def _rules(c: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    return decoding_rules(c.num_heads, c.kv_heads, c.d_model, c.mlp_width)


def placed(params: Params, config: ModelConfig) -> Params:
    """The training layout in that of decoding."""
    rules, shape = _rules(config), dict(jax.sharding.get_abstract_mesh().shape)
    lies: Mapping[str, tuple[str, ...]] = PLACEMENTS[config.shard_over]
    # Along data first: the partitioner does not know how to take both steps at once.
    for step in (RULES, rules):
        if shape and step is not lies:
            params = jax.lax.with_sharding_constraint(params, param_specs(params, shape, step))
            lies = step
    return params


def layer(blocks: Params, i: int, config: ModelConfig) -> Params:
    """One layer of the stacked parameters, where it lies. Pinned, or whoever gathers it for many tokens moves the copy itself."""
    rules = _rules(config)

    def of(path: Any, p: Array) -> Array:
        return constrain(p[i], *block_axes(path_name(path)), rules=rules)

    return jax.tree_util.tree_map_with_path(of, blocks)


def stream(x_Bx1xD: Array, config: ModelConfig) -> Array:
    """The residual stream between blocks."""
    rules = _rules(config)
    rows = "batch" if rules is DECODING else "replica"
    return constrain(x_Bx1xD, rows, None, "d_model", rules=rules)


def to_kernels(x_Bx1xD: Array, config: ModelConfig) -> Array:
    """What a block's first products read."""
    return constrain(x_Bx1xD, "replica", None, "d_model", rules=_rules(config))


def hidden(x_Bx1xF: Array, config: ModelConfig) -> Array:
    """The MLP's own width."""
    return constrain(x_Bx1xF, "replica", None, "mlp", rules=_rules(config))


def to_cache(x_Bx1xGxJ: Array, config: ModelConfig) -> Array:
    """From where a kernel makes groups of heads to where the cache has them."""
    rules = _rules(config)
    if rules is DECODING:
        x_Bx1xGxJ = constrain(x_Bx1xGxJ, "replica", None, "kv_heads", None, rules=rules)
        x_Bx1xGxJ = constrain(x_Bx1xGxJ, "batch", None, None, None)
    return constrain(x_Bx1xGxJ, "batch", None, "kv_heads", None)


def from_cache(x_Bx1xHxC: Array, config: ModelConfig) -> Array:
    """And what was looked up, to where a kernel takes heads."""
    rules = _rules(config)
    if rules is DECODING:
        x_Bx1xHxC = constrain(x_Bx1xHxC, "batch", None, None, None)
    return constrain(x_Bx1xHxC, "replica", None, "heads", None, rules=rules)
