"""One query a head against a cache, by a kernel that reads what rows see and nothing else (TPU).

Decoding does little arithmetic on many bytes. The compiler's own products of one query with a cache read all of
its slots, at about half of what the memory gives. This kernel goes through the blocks of slots in which a row sees
something, while the next one is on its way.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from instructax.partitioning import RULES, free_axes, parts, platform

Array = Any

LANES = 128
# Numbers of a block: larger ones hold more that no row sees, smaller ones are more steps.
BLOCK = 2**18
# Of slots that a row sees: its prompt, and its own tokens in a ring that may have come round.
RUNS = 3
UNSEEN = -1e30  # a score that no exponential tells from minus infinity


def block(slots: int, width: int, reach: int) -> int:
    """Slots of a block; 0 where none fits. ``reach``: as many slots a row sees at most."""
    most = max(LANES, min(BLOCK // width, reach // 2))
    sizes = (LANES << power for power in reversed(range(6)))
    return next((size for size in sizes if slots % size == 0 and size <= most), 0)


def serves(rows: int, groups: int, slots: int, width: int) -> bool:
    """Whether there is a kernel for such a cache where the program will run."""
    return (
        platform() == "tpu"
        and width % LANES == 0
        and slots % LANES == 0
        and rows % parts("batch") == 0
        and groups % parts("kv_heads") == 0
    )


def cached_attention(
    q_BxGxMxC: Array,
    k_BxGxSxJC: Array,
    v_BxGxSxJC: Array,
    mask_BxS: Array,
    reach: int | None = None,
    key_scale_BxGxMxS: Array | None = None,
    value_scale_BxGxMxS: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """softmax(q k^T / sqrt(C)) v over the slots that a row sees, BxGxMxC.

    J key-value heads lie side by side in a cache of JC wide slots, and the first M/J queries look at the first of
    them, the next at the next. In the kernel a query is JC wide, with zeros in the places of the others.
    The softmax is taken block by block with a running maximum (Milakov & Gimelshein 2018); scores and sums are
    float32.

    Args:
      mask_BxS: every row sees a slot. What it sees are at most three runs of slots: its prompt's, and its own
        to the end of a ring and on from the ring's beginning.
      reach: a row sees at most so many slots; None: it may see all.
      key_scale_BxGxMxS, value_scale_BxGxMxS: of keys and values as they lie in the cache: data * scale.
      interpret: run the kernel without its platform, slowly.
    """
    slots, width = k_BxGxSxJC.shape[2:]
    reach = slots if reach is None else min(reach, slots)
    size = block(slots, width, reach)
    seen_BxN = mask_BxS.reshape(len(mask_BxS), -1, size).any(axis=2)
    # The numbers of blocks with something to see come first. A run of n slots lies in at most (n - 2) // size + 2.
    most = min(slots // size, reach // size + 2 * RUNS)
    block_BxN = jnp.argsort(~seen_BxN, axis=1)[:, :most].astype(jnp.int32)
    count_B = seen_BxN.sum(axis=1, dtype=jnp.int32)
    bias_Bx1xS = jnp.where(mask_BxS, 0.0, UNSEEN).astype(jnp.float32)[:, None]
    scales = [x for x in (key_scale_BxGxMxS, value_scale_BxGxMxS) if x is not None]
    attend = functools.partial(_of_device, size=size, interpret=interpret)
    axes = free_axes()
    if axes:
        rows, groups = (
            tuple(a for a in RULES[name] if a in axes) for name in ("batch", "kv_heads")
        )
        at, of_rows = PartitionSpec(rows, groups), PartitionSpec(rows)
        attend = jax.shard_map(
            attend,
            in_specs=(of_rows, of_rows, at, at, at, of_rows, *([at] * len(scales))),
            out_specs=at,
            axis_names=set(axes),
            check_vma=False,
        )
    # What compiled text does not say of a kernel, its name does: `instructax plan` reads it.
    with jax.named_scope(f"cache_reach_{reach}_block_{size}"):
        return attend(count_B, block_BxN, q_BxGxMxC, k_BxGxSxJC, v_BxGxSxJC, bias_Bx1xS, *scales)


def _of_device(
    count_B: Array, block_BxN: Array, q: Array, k: Array, v: Array, bias: Array, *scales: Array,
    size: int, interpret: bool,
) -> Array:  # fmt: skip
    # Here, since other platforms need not wait for it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    rows, groups, queries, head_width = q.shape
    width = k.shape[3]
    steps = block_BxN.shape[1]

    def at(row: Array, step: Array, count: Array, block: Array) -> Array:
        # When a row has seen all it stays at its last block, and nothing is read.
        return block[row * steps + jnp.minimum(step, count[row] - 1)]

    of_query = pl.BlockSpec((None, None, queries, head_width), lambda b, g, n, *_: (b, g, 0, 0))
    of_cache = pl.BlockSpec(
        (None, None, size, width), lambda b, g, n, *of: (b, g, at(b, n, *of), 0)
    )
    of_bias = pl.BlockSpec((None, 1, size), lambda b, g, n, *of: (b, 0, at(b, n, *of)))
    of_scale = pl.BlockSpec(
        (None, None, queries, size), lambda b, g, n, *of: (b, g, 0, at(b, n, *of))
    )
    call = pl.pallas_call(
        functools.partial(_kernel, scaled=len(scales)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, groups, steps),
            in_specs=[of_query, of_cache, of_cache, of_bias, *([of_scale] * len(scales))],
            out_specs=of_query,
            scratch_shapes=[
                pltpu.VMEM((queries, width), q.dtype),
                pltpu.VMEM((queries, LANES), jnp.float32),
                pltpu.VMEM((queries, LANES), jnp.float32),
                pltpu.VMEM((queries, width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="cached_attention",
    )
    # Numbers in a line: a table's rows would be padded to the width of a vector.
    return call(count_B, block_BxN.reshape(-1), q, k, v, bias, *scales)


def _kernel(
    count: Any, block: Any, q: Any, k: Any, v: Any, bias: Any, *rest: Any, scaled: int
) -> None:
    """One block of slots; ``rest`` is scales, the result, wide queries, and maximum, sum and weighted values so far."""
    from jax.experimental import pallas as pl

    scales, (out, wide, top, total, weighted) = rest[:scaled], rest[scaled:]
    row, step = pl.program_id(0), pl.program_id(2)
    queries, width = q.shape
    joined = k.shape[1] // width
    query_MxC = jax.lax.broadcasted_iota(jnp.int32, (queries, width), 0) * joined
    # Whose head lies at a place.
    own = [
        (query_MxC >= place * queries) & (query_MxC < (place + 1) * queries)
        for place in range(joined)
    ]

    @pl.when(step == 0)
    def _begin() -> None:
        scaled_MxC = q[...].astype(jnp.float32) * width**-0.5
        parts = [jnp.where(mask, scaled_MxC, 0.0) for mask in own]
        wide[...] = jnp.concatenate(parts, axis=1).astype(wide.dtype)
        top[...] = jnp.full(top.shape, UNSEEN, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        weighted[...] = jnp.zeros(weighted.shape, weighted.dtype)

    @pl.when(step < count[row])
    def _look() -> None:
        product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        score_MxS = product(wide[...], k[...].astype(wide.dtype), (((1,), (1,)), ((), ())))
        if scaled:
            score_MxS = score_MxS * scales[0][...]
        score_MxS = score_MxS + bias[...]
        before_Mx1 = top[:, :1]
        top_Mx1 = jnp.maximum(before_Mx1, score_MxS.max(axis=1, keepdims=True))
        weight_MxS, decay_Mx1 = jnp.exp(score_MxS - top_Mx1), jnp.exp(before_Mx1 - top_Mx1)
        top[...] = jnp.broadcast_to(top_Mx1, top.shape)
        total_Mx1 = decay_Mx1 * total[:, :1] + weight_MxS.sum(axis=1, keepdims=True)
        total[...] = jnp.broadcast_to(total_Mx1, total.shape)
        if scaled:
            weight_MxS = weight_MxS * scales[1][...]
        weight_MxS, value = weight_MxS.astype(wide.dtype), v[...].astype(wide.dtype)
        weighted[...] = decay_Mx1 * weighted[...] + product(
            weight_MxS, value, (((1,), (0,)), ((), ()))
        )

    @pl.when(step == pl.num_programs(2) - 1)
    def _end() -> None:
        parts = [
            jnp.where(mask, weighted[:, place * width : (place + 1) * width], 0.0)
            for place, mask in enumerate(own)
        ]
        out[...] = (sum(parts[1:], parts[0]) / total[:, :1]).astype(out.dtype)
