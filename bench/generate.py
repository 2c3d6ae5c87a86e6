"""Sampling on one CPU: what padding, stragglers and reading a prompt again and again cost.

    python bench/generate.py [--rounds 5] [--json FILE] [--only demo stragglers generate]

Every form of a case has the same prompts and the same response lengths, drawn in advance. Forms run
one after another in each round; a figure is the median over rounds. The limit of a case is the time
in which the machine, at the matrix rate and the memory bandwidth measured in the same run, could read
the prompts and, with every slot busy, decode the real tokens, weights and filled cache read once a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import geometric
from bench.ours import ending_after
from instructax.batches import PromptBatch
from instructax.config import ModelConfig
from instructax.models import functional as model
from instructax.plan import model_flops
from instructax.rl.packing import prompt_rows
from instructax.steps import rollout
from instructax.steps.slots import group_size

DEMO = ModelConfig(
    num_layers=3, d_model=96, num_heads=4, vocab_size=960, vocab_multiple=64, context_length=96
)
SMALL = ModelConfig(num_layers=4, d_model=256, num_heads=4, vocab_size=8192, context_length=512)
EOS, PAD = 2, 0


@dataclasses.dataclass(frozen=True)
class Case:
    """Prompts, how long each response shall be, and the rows that decode at a time at the limit."""

    config: ModelConfig
    prompts: PromptBatch
    length_N: np.ndarray
    longest: int
    rows: int

    @functools.cached_property
    def params(self):
        return model.init(jax.random.key(0), self.config, "lm")

    def limit(self, flops_a_second: float, bytes_a_second: float) -> float:
        """Seconds."""
        m, prompt_M = self.config, self.prompts.mask_BxP.sum(axis=1)
        prompt = float(prompt_M.mean())
        reading = model_flops.forward(
            m, float(prompt_M.sum()), prompt / 2, unembedded=len(prompt_M)
        )
        # A response's first token comes from its prompt.
        decoded = float((self.length_N - 1).sum())
        context = prompt + float((self.length_N**2).sum() / self.length_N.sum()) / 2
        flops = model_flops.forward(m, decoded, context)
        weights = model_flops.matrix_parameters(m) + m.padded_vocab_size * m.d_model
        cache = 2 * m.num_layers * m.kv_heads * m.head_width * context
        steps = decoded / self.rows
        read = 4 * (steps * weights + decoded * cache)
        return reading / flops_a_second + max(flops / flops_a_second, read / bytes_a_second)


def demo(rng) -> Case:
    """configs/demo.py: 256 prompts, responses of at most 30 tokens."""
    return Case(
        DEMO, prompts(rng, rng.integers(15, 45, 256), 52), geometric(rng, 256, 13, 30), 30, 256
    )


def stragglers(rng) -> Case:
    """128 prompts of 64 tokens, lengths geometric with mean 32, at most 128, in 16 rows."""
    return Case(SMALL, prompts(rng, np.full(128, 64), 64), geometric(rng, 128, 32, 128), 128, 16)


def same_length(rng) -> Case:
    """16 prompts of 64 tokens, 128 new each."""
    return Case(SMALL, prompts(rng, np.full(16, 64), 64), np.full(16, 128), 128, 16)


CASES = {"demo": demo, "stragglers": stragglers, "generate": same_length}


def prompts(rng, length_M: np.ndarray, width: int) -> PromptBatch:
    mask = np.arange(width)[None] >= width - length_M[:, None]
    token = np.where(mask, rng.integers(5, 900, mask.shape), PAD).astype(np.int32)
    return PromptBatch(token, mask, np.arange(len(length_M), dtype=np.int32))


def sampler(case: Case, batch: int, slots: int | None = None, packed: bool = True, copies: int = 1):
    """A call that draws all of the case's responses and returns how many tokens they have."""
    sample = jax.jit(
        functools.partial(
            rollout.sample_responses, model_config=case.config, response_length=case.longest,
            temperature=1.0, eos_id=EOS, pad_id=PAD, slots=slots,
        )
    )  # fmt: skip
    parts = []
    for first in range(0, len(case.length_N) // copies, batch):
        part = jax.tree.map(lambda x, i=first: x[i : i + batch], case.prompts)
        group = None if slots is None else group_size(len(part.episode_B), copies, slots)
        plan = prompt_rows(part.mask_BxP, group) if packed else None
        parts.append((jax.device_put(part), plan))
    key = jax.random.key(1)
    key = key if copies == 1 else jax.random.split(key, copies)

    def run() -> int:
        return sum(int(sample(case.params, key, part, plan).mask_BxT.sum()) for part, plan in parts)

    return run


def forms(name: str, case: Case) -> dict[str, Callable[[], int]]:
    rows = len(case.length_N)
    if name == "demo":
        return {
            "a row each, padded prompts": sampler(case, rows, packed=False),
            "a row each": sampler(case, rows),
            "128 slots": sampler(case, rows, 128),
            "64 slots": sampler(case, rows, 64),
            "8 samples a prompt": sampler(case, rows, copies=8),
        }
    if name == "stragglers":
        return {
            "batches of 16": sampler(case, 16, packed=False),
            "16 slots": sampler(case, rows, 16, packed=False),
        }
    return {"a row each": sampler(case, rows, packed=False)}


def matrix_rate() -> float:
    """FLOPs a second of a large float32 product."""
    n = 1536
    product = jax.jit(jnp.matmul)
    return 2 * n**3 / fastest(product, jnp.ones((n, n)), jnp.ones((n, n)))


def bandwidth() -> float:
    """Bytes a second of reading what no cache holds."""
    x = jnp.ones((128, 2**20))
    return x.nbytes / fastest(jax.jit(lambda x: x.sum(axis=0)), x)


def fastest(function, *args) -> float:
    jax.block_until_ready(function(*args))
    return min(timed(lambda: jax.block_until_ready(function(*args)))[0] for _ in range(5))


def timed(call):
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    rates = matrix_rate(), bandwidth()
    found = {"flops_a_second": rates[0], "bytes_a_second": rates[1], "jax": jax.__version__,
             "cores": len(os.sched_getaffinity(0)),
             "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""), "cases": {}}  # fmt: skip
    print(f"{rates[0] / 1e9:.0f} GFLOP/s, {rates[1] / 1e9:.1f} GB/s, {found['cores']} cores\n")
    print(f"| {'case':10} | {'form':26} | ms | tokens/s | of the limit |\n|---|---|---|---|---|")
    for name in options.only:
        case = CASES[name](np.random.default_rng(0))
        with ending_after(case.length_N):
            runs = forms(name, case)
            tokens = {form: run() for form, run in runs.items()}
        seconds: dict[str, list[float]] = {form: [] for form in runs}
        for _ in range(options.rounds):
            for form, run in runs.items():
                seconds[form].append(timed(run)[0])
        limit = case.limit(*rates)
        found["cases"][name] = {"limit_s": limit, "forms": {}}
        for form, times in seconds.items():
            median = statistics.median(times)
            found["cases"][name]["forms"][form] = {
                "median_s": median, "min_s": min(times), "max_s": max(times), "tokens": tokens[form],
                "tokens_a_second": tokens[form] / median, "of_limit": limit / median,
            }  # fmt: skip
            print(f"| {name:10} | {form:26} | {1e3 * median:.0f} | {tokens[form] / median:.0f} | "
                  f"{limit / median:.2f} |")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
