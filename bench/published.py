"""The plan held against published training figures of TPUs.

    pip install -e ".[tpu]"; python bench/published.py [--fast-memory 48] [llama2-70b-v5p ...]

Each row is a dense Llama trained by MaxText in bfloat16 with float32 parameters and Adam moments, sharded over one axis of all
chips (fsdp), as https://maxtext.readthedocs.io/en/maxtext-v0.2.0/reference/models/tiering.html lists it. Rows a chip and what is
computed again are those of its recipes (MaxText/configs/v5p/llama2_70b.sh; benchmarks/maxtext_trillium_model_configs.py and
tpu-recipes/training/trillium). FLAGS are of those recipes what bears on an estimate (asynchronous gathers) with products kept whole, and
--fast-memory is what a fused operation may take; LIBTPU_INIT_ARGS, where set, stands in the place of both. What is compared is tokens a
second and chip: utilisation counts attention's FLOPs in two ways (the same page says so), tokens in one. Rows of v5e are of MaxText's README of
2024 and its configs/v5e/*.sh. It gives TFLOP/s, of which tokens are computed with attention counted whole; its trainer of those years is found
with half as well, which would put published tokens 1.7% (32B, 64B) and 3.3% (16B) higher. "Off by" is the difference in points of utilisation:
published utilisation times (estimated / published tokens - 1).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Literal

FLAGS = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from instructax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, PretrainConfig
from instructax.models.presets import llama
from instructax.plan import model_flops
from instructax.plan.chips import chip_of
from instructax.plan.compiling import plan
from instructax.plan.programs import programs
from instructax.plan.topology import devices
from instructax.runtime.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Row:
    shape: ModelConfig
    topology: str
    rows: int
    """Of a chip."""
    length: int
    remat: Literal["none", "wide", "block", "offload"]
    tokens: float
    """Published: a second and chip."""
    utilisation: float
    """Published, in percent."""


LLAMA2_70B = llama(80, 8192, 64, 28672, 32000, 4096, num_kv_heads=8)
LLAMA3_8B = llama(32, 4096, 32, 14336, 128256, 8192, num_kv_heads=8, rope_theta=500000.0)
LLAMA3_70B = llama(80, 8192, 64, 28672, 128256, 8192, num_kv_heads=8, rope_theta=500000.0)


def _scaled(layers: int, width: int, heads: int, hidden: int) -> ModelConfig:
    """What `global_parameter_scale` makes of MaxText's base model (configs/base.yml): heads of 128, 32,000 words."""
    return dataclasses.replace(llama(layers, width, heads, hidden, 32000, 2048), d_head=128)


def _tokens(shape: ModelConfig, tflops: float) -> float:
    """Tokens a second and chip of a figure in TFLOP/s."""
    return tflops * 1e12 / model_flops.train(shape, 1, shape.context_length)


S16, S32 = _scaled(32, 4096, 64, 28672), _scaled(32, 8192, 64, 28672)
S64 = _scaled(64, 8192, 64, 28672)
ROWS = {
    "llama2-70b-v5p": Row(LLAMA2_70B, "v5p:8x8x8", 4, 4096, "wide", 692, 65.4),
    "llama2-70b-v6e": Row(LLAMA2_70B, "v6e:16x16", 4, 4096, "block", 900, 43.8),
    "llama3.1-8b-v6e": Row(LLAMA3_8B, "v6e:16x16", 4, 8192, "offload", 7207, 45.46),
    "llama3.1-70b-v6e": Row(LLAMA3_70B, "v6e:16x16", 4, 8192, "offload", 960, 50.33),
    "16b-v5e": Row(S16, "v5e:16x16", 6, 2048, "block", _tokens(S16, 120.4), 61.10),
    "32b-v5e": Row(S32, "v5e:16x16", 4, 2048, "block", _tokens(S32, 131.7), 66.86),
    "64b-v5e": Row(S64, "v5e:16x16", 2, 2048, "block", _tokens(S64, 118.0), 59.90),
}


def estimated(row: Row) -> tuple[float, float, float]:
    """(tokens a second and chip, GiB a chip, seconds in the compiler)."""
    found = devices(row.topology)
    config = Config(
        model=dataclasses.replace(
            row.shape, compute_dtype="bfloat16", vocab_multiple=1024, remat=row.remat
        ),
        mesh=MeshConfig(data=1, fsdp=-1, model=1),
        pretrain=PretrainConfig(
            optimizer=OptimizerConfig(max_grad_norm=None),
            batch_size=row.rows * len(found),
            row_length=row.length,
            steps=1000,
        ),
    )
    mesh, chip = make_mesh(config.mesh, found), chip_of(found[0])
    program = next(p for p in programs(config, mesh, ["pretrain/step"]))
    planned = plan(program, mesh, chip)
    if planned.cost is None:
        print(planned.memory, file=sys.stderr)
        return float("nan"), planned.memory.total / 2**30, planned.seconds
    cost = planned.cost
    seconds = cost.compiler_seconds(chip) or float("nan")
    print(
        f"  {seconds:.2f} s, exposed {cost.exposed_compiler:.2f} s, roofline {cost.roofline_seconds:.2f} s, "
        f"{ {k: round(v.seconds, 2) for k, v in cost.collectives.items()} }, "
        f"{cost.flops / chip.peak_flops:.2f} s of products at the peak",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return row.rows * row.length / seconds, planned.memory.total / 2**30, planned.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--fast-memory", type=int, default=48, metavar="MIB")
    given = parser.parse_args()
    fast = f"--xla_tpu_scoped_vmem_limit_kib={1024 * given.fast_memory}"
    os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join((fast, *FLAGS)))
    print("| figure | published | estimated | off by | memory | compiled in |")
    print("|---|---|---|---|---|---|")
    for name in given.rows:
        row = ROWS[name]
        tokens, memory, spent = estimated(row)
        off = row.utilisation * (tokens / row.tokens - 1)
        print(
            f"| {name} | {row.utilisation}%, {row.tokens:,.0f} tokens/s | {tokens:,.0f} tokens/s | "
            f"{off:+.1f} points | {memory:.1f} GiB | {spent:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
