"""Attention by a flash kernel of the platform: no score ever lies in memory.

On TPU JAX's splash attention (Pallas). Its segment ids say "my segment" and no more, so it serves
layouts in which no segment has a prefix (padded rows, packed documents, episodes), and families, of which
each response has its prompt's keys before its own (:mod:`instructax.models.families`). Elsewhere
:func:`instructax.models.attention.causal_attention` computes the same.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from instructax.batches import Layout
from instructax.partitioning import RULES, free_axes, parts, platform

Array = Any

LANES = 128  # what the kernel takes at a time: it must divide row length and head width


def serves(layout: Layout, heads: int, kv_heads: int, head_width: int) -> bool:
    """Whether there is a kernel for this layout where the program will run."""
    rows, length = layout.token_BxL.shape
    return not layout.prefixed and serves_lengths(rows, (length,), heads, kv_heads, head_width)


def serves_lengths(
    rows: int, lengths: Sequence[int], heads: int, kv_heads: int, head_width: int
) -> bool:
    """The same for queries and keys of these lengths."""
    return (
        platform() == "tpu"
        and not any(size % LANES for size in (*lengths, head_width))
        and rows % parts("batch") == 0
        and heads % parts("heads") == kv_heads % parts("kv_heads") == 0
    )


def flash_attention(
    q_BxLxHxC: Array,
    k_BxSxGxC: Array,
    v_BxSxGxC: Array,
    segment_BxL: Array,
    band_width: int | None = None,
    *,
    key_segment_BxS: Array | None = None,
    interpret: bool = False,
) -> Array:
    """softmax(q k^T / sqrt(C)) v over the earlier slots of a query's own segment, 0 where segment is 0.

    Keys may begin S - L slots before the queries; they end with them. Every device takes its own rows and
    heads. ``interpret`` runs the kernel without its platform, slowly.
    """
    key_segment = segment_BxL if key_segment_BxS is None else key_segment_BxS
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BxLxHxC, k_BxSxGxC, v_BxSxGxC))
    attend = functools.partial(_of_device, band_width=band_width, interpret=interpret)
    axes = free_axes()
    if axes:
        rows, heads, kv_heads = (
            tuple(a for a in RULES[name] if a in axes) for name in ("batch", "heads", "kv_heads")
        )
        at, kv_at = PartitionSpec(rows, heads), PartitionSpec(rows, kv_heads)
        attend = jax.shard_map(
            attend,
            in_specs=(at, kv_at, kv_at, PartitionSpec(rows), PartitionSpec(rows)),
            out_specs=at,
            axis_names=set(axes),
            check_vma=False,
        )
    out_BxLxHxC = jnp.swapaxes(attend(q, k, v, segment_BxL, key_segment), 1, 2)
    return jnp.where(segment_BxL[:, :, None, None] != 0, out_BxLxHxC, 0.0)


def block(length: int) -> int:
    """Slots of a row that the kernel takes at a time."""
    return next(size for size in (512, 256, LANES) if length % size == 0)


def pairs(length: int, band_width: int | None, keys: int | None = None) -> int:
    """Pairs of slots of a row whose scores the kernel computes: those of blocks in which some query sees a key."""
    keys = length if keys is None else keys
    size, key_size, before = block(length), block(keys), keys - length
    reach = keys if band_width is None else band_width
    # From the first query of a block back to the last key of another, and from its last to the first.
    seen = sum(
        before + i - (j + key_size - 1) < reach and before + i + size - 1 >= j
        for i in range(0, length, size)
        for j in range(0, keys, key_size)
    )
    return seen * size * key_size


def _of_device(
    q_BxHxLxC: Array,
    k_BxGxSxC: Array,
    v_BxGxSxC: Array,
    segment_BxL: Array,
    key_segment_BxS: Array,
    *,
    band_width: int | None,
    interpret: bool,
) -> Array:
    # Here, since other platforms need not wait for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, length, width = q_BxHxLxC.shape
    keys = k_BxGxSxC.shape[2]
    mask: Any = masks.CausalMask((length, keys), offset=keys - length)
    if band_width is not None:
        mask = masks.LocalMask((length, keys), (band_width - 1, 0), offset=keys - length)
    size, key_size = block(length), block(keys)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=size,
            block_kv=key_size,
            block_q_dkv=size,
            block_kv_dkv=key_size,
            block_q_dq=size,
            block_kv_dq=key_size,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def of_row(q: Array, k: Array, v: Array, segment_L: Array, key_segment_S: Array) -> Array:
        return attend(q, k, v, segment_ids=kernel.SegmentIds(segment_L, key_segment_S))

    # What compiled text does not say of a kernel, its name does: `instructax plan` reads it.
    with jax.named_scope(f"flash_pairs_{pairs(length, band_width, keys)}"):
        # The kernel does not scale.
        return jax.vmap(of_row)(
            q_BxHxLxC * width**-0.5, k_BxGxSxC, v_BxGxSxC, segment_BxL, key_segment_BxS
        )
