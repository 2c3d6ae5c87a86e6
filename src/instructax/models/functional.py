"""THE SEAM: all that the rest of the house knows of a model. Parameters in, arrays out.

A parameter tree is a nested dict: ``embed/{token,position}``, ``blocks/...`` stacked on a leading
layer axis, ``final_norm``, and a head: ``head/kernel_VxD`` (an untied unembedding) or
``value_head/{kernel,bias}``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import logprobs, shapes
from instructax.batches import Layout, check_layout, predecessor
from instructax.config import ModelConfig
from instructax.models import cache as cache_lib
from instructax.models import transformer
from instructax.models.cache import Cache, admit, repeat_rows, rollout_copy
from instructax.models.cache import empty as empty_cache
from instructax.models.families import row_scores
from instructax.models.families import tile as family_tile
from instructax.partitioning import by_batch_shard_with_table, constrain, parts

__all__ = [
    "Cache",
    "admit",
    "decode",
    "empty_cache",
    "family_tile",
    "init",
    "num_parameters",
    "prefill",
    "prefill_packed",
    "repeat_rows",
    "replace_head",
    "rollout_copy",
    "row_scores",
    "scalars",
    "shift_scalars",
    "token_logprobs",
    "token_statistics",
]

Array = Any
Params = Any


def init(key: Array, model_config: ModelConfig, head: str) -> Params:
    """Random float32 parameters. ``head`` is "lm" or "scalar".

    The scalar head is N(0, 1/(d+1)) with bias 0 (Stiennon et al. 2020; trap T4).

    Raises:
      TypeError, ValueError: a key that is not one typed key; another head.
    """
    shapes.key_array("key", key, 0)
    if head not in ("lm", "scalar"):
        raise ValueError(f'head must be "lm" or "scalar", got {head!r}')
    trunk_key, head_key = jax.random.split(key)
    params = transformer.init_trunk(trunk_key, model_config)
    if head == "scalar":
        return params | {"value_head": _scalar_head(head_key, model_config)}
    if not model_config.tie_embeddings:
        shape = (model_config.padded_vocab_size, model_config.d_model)
        params["head"] = {"kernel": model_config.init_std * jax.random.normal(head_key, shape)}
    return params


def _scalar_head(key: Array, config: ModelConfig) -> Params:
    kernel_Dx1 = jax.random.normal(key, (config.d_model, 1)) * (config.d_model + 1) ** -0.5
    return {"kernel": kernel_Dx1, "bias": jnp.zeros((1,))}


def replace_head(key: Array, params: Params, model_config: ModelConfig) -> Params:
    """The language model with its unembedding replaced by a fresh scalar head."""
    shapes.key_array("key", key, 0)
    trunk = {name: value for name, value in params.items() if name not in ("head", "value_head")}
    return trunk | {"value_head": _scalar_head(key, model_config)}


def shift_scalars(params: Params, shift: Array) -> Params:
    """Add ``shift`` to every scalar by moving the head's bias, so that it travels with the weights."""
    head = params["value_head"]
    shift = shapes.scalar("shift", shift, head["bias"].dtype)
    return params | {"value_head": head | {"bias": head["bias"] + shift}}


def num_parameters(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _unembedding(params: Params, config: ModelConfig) -> Array:
    return params["embed"]["token"] if config.tie_embeddings else params["head"]["kernel"]


def _check(layout: Layout, dropout_key: Array | None) -> None:
    check_layout(layout)
    if dropout_key is not None:
        shapes.key_array("dropout_key", dropout_key, 0)


def _statistics(
    params, config, layout, temperature, dropout_key, with_entropy, scored_BxM=None
) -> tuple[Array, Array]:
    _check(layout, dropout_key)
    if scored_BxM is not None:
        shapes.int_array("scored_BxM", scored_BxM, 2)
    x_BxLxD = transformer.hidden(params, config, layout, dropout_key)
    index_BxL, exists_BxL = predecessor(layout)
    token_BxL = layout.token_BxL
    if scored_BxM is not None:
        slot_BxM = jnp.maximum(scored_BxM, 0)
        index_BxL, token_BxL, exists_BxL = (
            jnp.take_along_axis(of_BxL, slot_BxM, axis=1)
            for of_BxL in (index_BxL, token_BxL, exists_BxL)
        )
    before_BxLxD = jnp.take_along_axis(x_BxLxD, index_BxL[:, :, None], axis=1)
    unembedding_VxD = _unembedding(params, config)
    rows_of_device = max(1, token_BxL.shape[0] // parts("batch"))

    def of_rows(table_VxD: Array, before_BxLxD: Array, token_BxL: Array) -> tuple[Array, Array]:
        return logprobs.chunked_token_statistics(
            before_BxLxD,
            token_BxL,
            table_VxD,
            chunk=logprobs.slots_at_a_time(rows_of_device, unembedding_VxD.shape[0]),
            vocab_size=config.vocab_size,
            temperature=temperature,
            with_entropy=with_entropy,
        )

    # The partitioner's own way sends the stream with every chunk.
    logp, entropy = by_batch_shard_with_table(
        of_rows, unembedding_VxD, before_BxLxD.dtype, before_BxLxD, token_BxL
    )
    logp, entropy = jnp.where(exists_BxL, logp, 0.0), jnp.where(exists_BxL, entropy, 0.0)
    if scored_BxM is None:
        return logp, entropy
    length = layout.token_BxL.shape[1]
    return _home(logp, scored_BxM, length), _home(entropy, scored_BxM, length)


def _home(y_BxM: Array, slot_BxM: Array, length: int) -> Array:
    """y_BxL with y_BxM at its slots, 0 at all others; slot -1 goes nowhere."""

    def of_row(y_M: Array, slot_M: Array) -> Array:
        # One slot more than there are takes what has no home.
        y_L = jnp.zeros((length + 1,), y_M.dtype)
        return y_L.at[jnp.where(slot_M >= 0, slot_M, length)].set(y_M)[:length]

    return jax.vmap(of_row)(y_BxM, slot_BxM)


def token_logprobs(
    params: Params,
    model_config: ModelConfig,
    layout: Layout,
    *,
    temperature: float = 1.0,
    dropout_key: Array | None = None,
    scored_BxM: Array | None = None,
) -> Array:
    """logp_BxL: log p(token | what it sees before it) at the given temperature; 0 where nothing precedes.

    ``scored_BxM`` names the slots of each row that are wanted (-1 names none): no other's logits are
    computed, and its log-probability is 0.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    return _statistics(params, model_config, layout, temperature, dropout_key, False, scored_BxM)[0]


def token_statistics(
    params: Params,
    model_config: ModelConfig,
    layout: Layout,
    *,
    temperature: float = 1.0,
    dropout_key: Array | None = None,
    scored_BxM: Array | None = None,
) -> dict[str, Array]:
    """{"logp": BxL, "entropy": BxL} in nats; the entropy is of the distribution the token came from.

    ``scored_BxM``: as in :func:`token_logprobs`; both are 0 elsewhere.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    logp, entropy = _statistics(
        params, model_config, layout, temperature, dropout_key, True, scored_BxM
    )
    return {"logp": logp, "entropy": entropy}


def scalars(
    params: Params, model_config: ModelConfig, layout: Layout, *, dropout_key: Array | None = None
) -> Array:
    """value_BxL, float32, read after each token; 0 at padding.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    _check(layout, dropout_key)
    x_BxLxD = transformer.hidden(params, model_config, layout, dropout_key).astype(jnp.float32)
    head = params["value_head"]
    value_BxL = jnp.einsum("bld,dz->bl", x_BxLxD, head["kernel"]) + head["bias"][0]
    return jnp.where(layout.segment_BxL > 0, value_BxL, 0.0)


def prefill(
    copy: Params,
    model_config: ModelConfig,
    token_BxP: Array,
    mask_BxP: Array,
    slots: int,
    cache_dtype: str | None = None,
) -> tuple[Array, Cache]:
    """(logits_BxV float32 after the prompts, cache). ``copy`` comes from :func:`rollout_copy`.

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name; too few ``slots``.
    """
    shapes.int_array("token_BxP", token_BxP, 2)
    shapes.bool_array("mask_BxP", mask_BxP, 2)
    shapes.same_shape(token_BxP=token_BxP, mask_BxP=mask_BxP)
    x_BxD, cache = cache_lib.prefill(copy, model_config, token_BxP, mask_BxP, slots, cache_dtype)
    return _next_logits(copy, model_config, x_BxD), cache


def prefill_packed(
    copy: Params,
    model_config: ModelConfig,
    layout: Layout,
    home_BxP: Array,
    slots: int,
    cache_dtype: str | None = None,
    shards: int = 1,
) -> tuple[Array, Cache]:
    """:func:`prefill` of prompts packed in rows; see :func:`instructax.models.cache.prefill_packed`."""
    check_layout(layout)
    shapes.int_array("home_BxP", home_BxP, 2)
    x_BxD, cache = cache_lib.prefill_packed(
        copy, model_config, layout, home_BxP, slots, cache_dtype, shards
    )
    return _next_logits(copy, model_config, x_BxD), cache


def decode(
    copy: Params, model_config: ModelConfig, token_B: Array, cache: Cache
) -> tuple[Array, Cache]:
    """(logits_BxV float32 after one more token a row, cache).

    Raises:
      TypeError, ValueError: an argument of the wrong dtype or shape, by name.
    """
    shapes.int_array("token_B", token_B, 1)
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache, got {type(cache).__name__}")
    shapes.same_shape(**{"cache.next_B": cache.next_B, "token_B": token_B})
    x_BxD, cache = cache_lib.decode(copy, model_config, token_B, cache)
    return _next_logits(copy, model_config, x_BxD), cache


def _next_logits(copy: Params, config: ModelConfig, x_BxD: Array) -> Array:
    # All rows meet the vocabulary's part of each chip, then every chip has the logits of its own rows.
    x_BxD = constrain(x_BxD, "replica", None)
    logits = logprobs.masked_logits(x_BxD, _unembedding(copy, config), config.vocab_size)
    # In steps, each of which the partitioner knows how to take: fsdp goes from words to rows, then model is gathered.
    for axes in (("replica", "vocab"), ("batch", "vocab_of_rows"), ("batch", None)):
        logits = constrain(logits, *axes)
    return logits
