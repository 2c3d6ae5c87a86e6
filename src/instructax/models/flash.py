"""Attention by a flash kernel of the platform: no score ever lies in memory.

On TPU JAX's splash attention (Pallas). Its segment ids say "my segment" and no more, so it serves
layouts in which no segment has a prefix (padded rows, packed documents, episodes), and families, in which
who sees whom is known when the program is written (:mod:`instructax.models.families`). Elsewhere
:func:`instructax.models.attention.causal_attention` computes the same.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from instructax.batches import Layout
from instructax.partitioning import RULES, free_axes, parts, platform

Array = Any

LANES = 128  # what the kernel takes at a time: it must divide row length and head width


def serves(layout: Layout, heads: int, kv_heads: int, head_width: int) -> bool:
    """Whether there is a kernel for this layout where the program will run."""
    rows, length = layout.token_BxL.shape
    return not layout.prefixed and serves_rows(rows, length, heads, kv_heads, head_width)


def serves_rows(rows: int, length: int, heads: int, kv_heads: int, head_width: int) -> bool:
    """The same for rows of this length."""
    return (
        platform() == "tpu"
        and length % LANES == head_width % LANES == 0
        and rows % parts("batch") == 0
        and heads % parts("heads") == kv_heads % parts("kv_heads") == 0
    )


def flash_attention(
    q_BxLxHxC: Array,
    k_BxLxGxC: Array,
    v_BxLxGxC: Array,
    segment_BxL: Array,
    band_width: int | None = None,
    *,
    seen_LxL: np.ndarray | None = None,
    interpret: bool = False,
) -> Array:
    """softmax(q k^T / sqrt(C)) v over the earlier slots of a query's own segment, 0 where segment is 0.

    Every device takes its own rows and heads.

    Args:
      seen_LxL: which slots of its segment a slot sees, in place of the earlier ones and the band; itself it must.
      interpret: runs the kernel without its platform, slowly.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BxLxHxC, k_BxLxGxC, v_BxLxGxC))
    attend = functools.partial(
        _of_device, band_width=band_width, seen_LxL=seen_LxL, interpret=interpret
    )
    axes = free_axes()
    if axes:
        rows, heads, kv_heads = (
            tuple(a for a in RULES[name] if a in axes) for name in ("batch", "heads", "kv_heads")
        )
        at, kv_at = PartitionSpec(rows, heads), PartitionSpec(rows, kv_heads)
        attend = jax.shard_map(
            attend,
            in_specs=(at, kv_at, kv_at, PartitionSpec(rows)),
            out_specs=at,
            axis_names=set(axes),
            check_vma=False,
        )
    out_BxLxHxC = jnp.swapaxes(attend(q, k, v, segment_BxL), 1, 2)
    return jnp.where(segment_BxL[:, :, None, None] != 0, out_BxLxHxC, 0.0)


def block(length: int) -> int:
    """Slots of a row that the kernel takes at a time."""
    return next(size for size in (512, 256, LANES) if length % size == 0)


def pairs(length: int, band_width: int | None, seen_LxL: np.ndarray | None = None) -> int:
    """Pairs of slots of a row whose scores the kernel computes: those of blocks in which some query sees a key."""
    size = block(length)
    blocks = length // size
    if seen_LxL is not None:
        return int(seen_LxL.reshape(blocks, size, blocks, size).any((1, 3)).sum()) * size**2
    reach = length if band_width is None else band_width
    # From the first query of block i to the last key of block j.
    seen = sum((i - j - 1) * size + 1 < reach for i in range(blocks) for j in range(i + 1))
    return seen * size**2


def _of_device(
    q_BxHxLxC: Array,
    k_BxGxLxC: Array,
    v_BxGxLxC: Array,
    segment_BxL: Array,
    *,
    band_width: int | None,
    seen_LxL: np.ndarray | None,
    interpret: bool,
) -> Array:
    # Here, since other platforms need not wait for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, heads, length, width = q_BxHxLxC.shape
    mask: Any
    if seen_LxL is not None:
        mask = masks.NumpyMask(seen_LxL)
    elif band_width is not None:
        mask = masks.LocalMask((length, length), (band_width - 1, 0), offset=0)
    else:
        mask = masks.CausalMask((length, length))
    size = block(length)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def of_row(q: Array, k: Array, v: Array, segment_L: Array) -> Array:
        return attend(q, k, v, segment_ids=kernel.SegmentIds(segment_L, segment_L))

    # What compiled text does not say of a kernel, its name does: `instructax plan` reads it.
    with jax.named_scope(f"flash_pairs_{pairs(length, band_width, seen_LxL)}"):
        # The kernel does not scale.
        return jax.vmap(of_row)(q_BxHxLxC * width**-0.5, k_BxGxLxC, v_BxGxLxC, segment_BxL)
