"""The stack as a function: embeddings, a scan over periods of the layer pattern, the final norm."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from instructax.batches import Layout
from instructax.config import ModelConfig
from instructax.models.attention import attending
from instructax.models.layers import NARROW, QKV, Block, Norm, dropout, keep_masks
from instructax.partitioning import by_batch_shard_with_table, constrain, constrain_stream

Array = Any
Params = Any

_INPUT = "block_input"

# What the backward pass is given of a block beside its input, by the names that layers.py gives. "offload" keeps the input as
# well in the host's memory: it is the scan's carry, so it is named in here.
_POLICIES = {
    "block": None,
    "wide": jax.checkpoint_policies.save_only_these_names(QKV, NARROW),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[QKV, _INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def init_trunk(key: Array, config: ModelConfig) -> Params:
    """Embeddings, blocks stacked on a leading layer axis, final norm; float32."""
    token_key, position_key, block_key = jax.random.split(key, 3)
    std, width = config.init_std, config.d_model
    embed = {"token": std * jax.random.normal(token_key, (config.padded_vocab_size, width))}
    if config.positions == "learned":
        # GPT-2 draws positions at half the deviation of tokens: 0.01 against 0.02.
        shape = (config.context_length, width)
        embed["position"] = 0.5 * std * jax.random.normal(position_key, shape)
    block = Block(config)
    x = jnp.zeros((1, 1, width))
    position = jnp.zeros((1, 1), jnp.int32)

    def init_block(key):
        return block.init(key, x, position, lambda q, k, v: (q, None))["params"]

    params = {
        "embed": embed,
        "blocks": jax.vmap(init_block)(jax.random.split(block_key, config.num_layers)),
    }
    if config.norm_position == "pre":
        params["final_norm"] = _final_norm(config).init(key, x)["params"]
    return params


def _final_norm(config: ModelConfig) -> Norm:
    return Norm(config.norm, config.norm_eps, config.use_bias)


def embed(params: Params, config: ModelConfig, token_BxL: Array, position_BxL: Array) -> Array:
    """Token plus learned position embedding, in the compute dtype."""
    x = _words(params["embed"]["token"], token_BxL, config)
    if config.positions == "learned":
        x = x + jnp.take(params["embed"]["position"], position_BxL, axis=0)
    return constrain_stream(x.astype(config.compute_dtype))


def _words(table_VxD: Array, token_BxL: Array, config: ModelConfig) -> Array:
    if token_BxL.shape[1] == 1:  # decoding: words are less than the table
        return jnp.take(table_VxD, token_BxL, axis=0)

    # The partitioner's own way takes float32, twice, and a whole table of zeros besides.
    take = functools.partial(jnp.take, axis=0)
    return by_batch_shard_with_table(take, table_VxD, config.compute_dtype, token_BxL)


def finish(params: Params, config: ModelConfig, x: Array) -> Array:
    """The final norm of a pre-norm stack; a post-norm stack has none. Rows are whole on every device."""
    if config.norm_position == "pre":
        x = _final_norm(config).apply({"params": params["final_norm"]}, x)
    return constrain(x, "batch", None, None)


def hidden(
    params: Params, config: ModelConfig, layout: Layout, dropout_key: Array | None = None
) -> Array:
    """Final hidden states x_BxLxD of every slot of a layout."""
    position_BxL = layout.position_BxL
    x = embed(params, config, layout.token_BxL, position_BxL)
    if config.dropout == 0.0:
        dropout_key = None
    if dropout_key is not None:
        key = jax.random.fold_in(dropout_key, config.num_layers)
        x = dropout(x, keep_masks(key, x.shape, config.dropout)[0], config.dropout)
    block = Block(config, deterministic=dropout_key is None)
    pattern = config.attention_pattern
    attend_of = {
        kind: attending(layout, config, config.band_width if kind == "banded" else None)
        for kind in sorted(set(pattern))
    }

    def layer(x: Array, params_of_period: Params, first_layer: Array, i: int) -> Array:
        x = checkpoint_name(x, _INPUT)
        # Taken out in here: outside, the backward pass would keep a copy of every layer's parameters.
        layer_params = jax.tree.map(lambda p: p[i], params_of_period)
        rngs = None
        if dropout_key is not None:
            rngs = {"dropout": jax.random.fold_in(dropout_key, first_layer + i)}

        def attend(q, k, v):
            return attend_of[pattern[i]](q, k, v), None

        return block.apply({"params": layer_params}, x, position_BxL, attend, rngs=rngs)[0]

    if config.remat != "none":
        policy = _POLICIES[config.remat]
        layer = jax.checkpoint(layer, prevent_cse=False, static_argnums=3, policy=policy)

    def period(x: Array, scanned: tuple[Params, Array]) -> tuple[Array, None]:
        params_of_period, first_layer = scanned
        for i in range(len(pattern)):
            x = layer(x, params_of_period, first_layer, i)
        return x, None

    periods = config.num_layers // len(pattern)
    by_period = jax.tree.map(
        lambda p: p.reshape((periods, len(pattern)) + p.shape[1:]), params["blocks"]
    )
    first_layer = jnp.arange(periods) * len(pattern)
    x, _ = jax.lax.scan(
        period, x, (by_period, first_layer), unroll=min(config.scan_unroll, periods)
    )
    return finish(params, config, x)
