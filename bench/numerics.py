"""Writes docs/numerics.md: how far every function is from its float64 oracle.

    python bench/numerics.py

One CPU, about a minute. The functions, their oracles and the inputs are those of tests/cases.py; the
transformer's oracle is tests/oracle_model.py.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle_model
import tiny

from instructax.batches import padded_layout
from instructax.models import functional as model

SEEDS, SHAPE = range(10), (8, 64)
NO_ACTIVATIONS = (
    "adaptive_kl_update",
    "learning_rate",
    "Adam",
    "move_average",
    "combine_gradients",
)

HEAD = """# Numerics

The largest error of each pure function against its float64 oracle (`tests/oracles.py`: loops over
Python floats, written from the papers). Written by

    python bench/numerics.py

on one CPU; arrays of {rows} x {length}, {seeds} seeds. An oracle reads the very numbers that the
function read, after their rounding, so that what is left is the function's own arithmetic. The
relative error is the error over the largest magnitude in the same output, the worst over outputs.

With bfloat16 inputs every function computes in float32 all the same: the two columns have one size.
Only the transformer's activations are bfloat16 where its config says so. The last three rows show
what that costs; the rows of `chunked_token_statistics`, whose hidden states were bfloat16, show that
the softmax over the vocabulary adds nothing to it. Optimizer state, averages and coefficients are
float32 whatever the compute dtype.

| function | float32: largest error | relative | bfloat16 compute: largest error | relative |
| --- | --- | --- | --- | --- |
"""


def rounded(arguments: Iterable, dtype) -> list:
    return [
        jnp.asarray(a, dtype) if np.issubdtype(np.asarray(a).dtype, np.floating) else a
        for a in arguments
    ]


def as_float64(x):
    x = np.asarray(x)
    return x.astype(np.float64) if x.dtype.kind not in "biu" else x


def errors(pairs) -> tuple[float, float]:
    """(largest error, largest relative to the largest magnitude of its output)."""
    absolute = relative = 0.0
    for got, expected in pairs:
        got, expected = as_float64(got), as_float64(expected)
        if got.size:
            error = float(np.abs(got * 1.0 - expected * 1.0).max())
            absolute = max(absolute, error)
            relative = max(relative, error / max(float(np.abs(expected).max()), 1e-30))
    return absolute, relative


def of_case(case: cases.Case, dtype) -> tuple[float, float]:
    pairs = []
    for seed in SEEDS:
        arguments = rounded(case.draw(np.random.default_rng(seed), SHAPE), dtype)
        exact = [as_float64(a) for a in arguments]
        pairs += zip(case.outputs(*arguments), case.expected(*exact), strict=True)
    return errors(pairs)


def of_transformer(compute_dtype: str) -> dict[str, tuple[float, float]]:
    """Two layers, left- and right-padded rows of mixed length, at temperature 0.7."""
    config = dataclasses.replace(tiny.MODEL, num_layers=2, compute_dtype=compute_dtype)
    found: dict[str, list] = {"token_logprobs": [], "token_statistics, entropy": [], "scalars": []}

    @jax.jit
    def run(lm, scalar, layout):
        statistics = model.token_statistics(lm, config, layout, temperature=0.7)
        return statistics["logp"], statistics["entropy"], model.scalars(scalar, config, layout)

    for seed in range(3):
        lm, scalar = (tiny.params(seed, head, tiny_config(config)) for head in ("lm", "scalar"))
        slot = np.arange(16)[None]
        mask = (slot >= np.array([[0], [5], [2]])) & (slot < np.array([[16], [16], [9]]))
        layout = padded_layout(tiny.tokens(3, 16, seed), mask)
        rows = tuple(np.asarray(x) for x in jax.tree.leaves(layout))
        wide = jax.tree.map(as_float64, (lm, scalar))
        logp, entropy = oracle_model.token_statistics(wide[0], rows, tiny.VOCAB, 0.7)
        expected = logp, entropy, oracle_model.scalars(wide[1], rows)
        for name, pair in zip(found, zip(run(lm, scalar, layout), expected, strict=True)):  # noqa: B905
            found[name].append(pair)
    return {name: errors(pairs) for name, pairs in found.items()}


def tiny_config(config):
    """Parameters are float32 whatever the compute dtype, and drawn once."""
    return dataclasses.replace(config, compute_dtype="float32")


def row(name: str, *columns: tuple[float, float] | None) -> str:
    cells = [f"{x:.1e}" for pair in columns if pair is not None for x in pair]
    cells += ["", ""] * sum(pair is None for pair in columns)
    return "| " + " | ".join([f"`{name}`" if "," not in name else name, *cells]) + " |"


def main() -> None:
    lines = []
    for case in cases.CASES:
        low = None if case.name.startswith(NO_ACTIVATIONS) else of_case(case, jnp.bfloat16)
        lines.append(row(case.name, of_case(case, jnp.float32), low))
    full, low_precision = of_transformer("float32"), of_transformer("bfloat16")
    lines += [row(name, full[name], low_precision[name]) for name in full]
    head = HEAD.format(rows=SHAPE[0], length=SHAPE[1], seeds=len(SEEDS))
    (ROOT / "docs" / "numerics.md").write_text(head + "\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
