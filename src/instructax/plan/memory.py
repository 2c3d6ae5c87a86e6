"""What lies on one chip while a program runs, by kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from instructax.plan.chips import GIB

KINDS = (
    "params", "optimizer", "ema", "frozen", "copy", "cache", "batch", "activations", "code"
)  # fmt: skip
"""Trained parameters; Adam's moments; the averaged policy; reference and reward model; the rollout copy; keys and
values; what the program reads and returns beside states; temporaries of the program; the program itself."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one chip by kind."""

    kinds: dict[str, float]
    largest: tuple[str, ...] = ()
    """The compiler's largest buffers, where it has named them."""

    @property
    def total(self) -> float:
        return sum(self.kinds.values())

    def top(self, count: int = 3) -> str:
        """The largest kinds, in words."""
        by_size = sorted(self.kinds.items(), key=lambda item: -item[1])
        return ", ".join(f"{kind} {size / GIB:.1f} GiB" for kind, size in by_size[:count] if size)


def shard_bytes(tree: Any) -> float:
    """Bytes of one chip's part of a tree of ShapeDtypeStructs; without a sharding, all of a leaf."""
    return float(sum(map(_leaf_bytes, jax.tree.leaves(tree))))


def _leaf_bytes(leaf: Any) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def of_program(
    analysis: Any,
    passed: dict[str, float],
    held: dict[str, float],
    made: dict[str, float],
) -> Memory:
    """From the compiler's figures for one chip.

    Args:
      analysis: memory_analysis() of the compiled program.
      passed: bytes by kind of its arguments.
      held: bytes by kind of what lies on the chip and is not passed.
      made: bytes by kind that the program makes for itself; they are part of its temporaries.
    """
    batch = analysis.argument_size_in_bytes - sum(passed.values())
    returned = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    made, left = dict(made), float(analysis.temp_size_in_bytes)
    for kind in made:  # never more than there is: the compiler may have found a way around
        made[kind] = min(made[kind], left)
        left -= made[kind]
    kinds = {kind: 0.0 for kind in KINDS}
    for part in (passed, held, made):
        for kind, size in part.items():
            kinds[kind] += size
    kinds["batch"] += max(0.0, float(batch)) + max(0.0, float(returned))
    kinds["activations"] += left
    kinds["code"] += float(analysis.generated_code_size_in_bytes)
    return Memory(kinds)


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# With its arguments, or without them, as the compiler's stage that gives up counts.
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_TEMPORARIES = re.compile(rf"HLO temporaries \({_SIZE}\)")
_BUFFER = re.compile(r"Size: ([\d.]+[KMGT]?)\s*(?:\n.*?)*?Shape: (\S+)", re.MULTILINE)


def refused(message: str, passed: dict[str, float], held: dict[str, float]) -> Memory | None:
    """What a compiler says that gives up for lack of memory; None where it says something else."""
    used, temporaries = _USED.search(message), _TEMPORARIES.search(message)
    found = used or temporaries
    if found is None:
        return None
    needed = float(found[1]) * _UNITS[found[2]]
    kinds = {kind: passed.get(kind, 0.0) + held.get(kind, 0.0) for kind in KINDS}
    kinds["activations"] = max(0.0, needed - sum(passed.values())) if used else needed
    return Memory(kinds, tuple(_buffers(message)))


def _buffers(message: str) -> Iterable[str]:
    for match in list(_BUFFER.finditer(message))[:5]:
        yield f"{match[2].partition('{')[0]} of {match[1]}"
