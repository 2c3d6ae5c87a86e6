"""Weak scaling by the plan: configs/instructgpt_1b3.py on 4 to 512 v5p chips, as many tokens a chip on all of them.

    pip install -e ".[tpu]"; python bench/scaling.py [--programs sft/step ppo/update] [--chips 4 16 64 512]

An SFT step reads 4 rows of 2,048 tokens a chip; an update, 8 episodes and 64 rows of pretraining text a chip in one minibatch of two
parts. Compiled with the flags of launch/flags/tpu.env, or with LIBTPU_INIT_ARGS where that is set; nothing runs. An update takes the
compiler 9 to 15 minutes of one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
_LINES = (ROOT / "launch" / "flags" / "tpu.env").read_text("utf-8").splitlines()
_FLAGS = [line.partition("+=")[2] for line in _LINES if line.startswith("LIBTPU_INIT_ARGS+=")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("LIBTPU_INIT_ARGS", " ".join(_FLAGS))
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from instructax.config import Config, MeshConfig, replace
from instructax.plan.chips import chip_of
from instructax.plan.compiling import plan
from instructax.plan.programs import programs
from instructax.plan.timing import utilisation
from instructax.plan.topology import devices
from instructax.resolve import load_config
from instructax.runtime.mesh import make_mesh

# Chips: the slice, and the mesh that lies best on it.
SLICES = {
    4: ("v5p:2x2x1", MeshConfig(data=1, fsdp=4)),
    16: ("v5p:2x2x4", MeshConfig(data=4, fsdp=4)),
    64: ("v5p:4x4x4", MeshConfig(data=16, fsdp=4)),
    512: ("v5p:8x8x8", MeshConfig(data=64, fsdp=8)),
}


def config(chips: int) -> Config:
    """The recipe with as much work a chip as on any other number of them."""
    c = load_config(str(ROOT / "configs" / "instructgpt_1b3.py"))
    return replace(
        c,
        mesh=SLICES[chips][1],
        sft=replace(c.sft, batch_size=4 * chips),
        ppo=replace(c.ppo, batch_size=8 * chips, minibatch_size=8 * chips, episodes=8000 * chips),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", nargs="+", default=["sft/step", "ppo/update"])
    parser.add_argument("--chips", nargs="+", type=int, choices=SLICES, default=list(SLICES))
    given = parser.parse_args()
    print(
        "| program | chips | slice | data x fsdp | step | MFU | of the least bytes | memory | compiled in |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in given.programs:
        for chips in given.chips:
            topology, lay = SLICES[chips]
            found = devices(topology)
            mesh, chip = make_mesh(lay, found), chip_of(found[0])
            planned = plan(next(programs(config(chips), mesh, [name])), mesh, chip)
            cost, program = planned.cost, planned.program
            assert cost is not None, f"{name} does not fit {topology}: {planned.memory}"
            seconds = cost.compiler_seconds(chip) or float("nan")
            mfu = utilisation(program.model_flops, chips, chip, seconds)
            print(
                f"| {name} | {chips} | {topology} | {lay.data} x {lay.fsdp} | {seconds:.3f} s | {mfu:.1%} | "
                f"{cost.wire / program.least_moved:.2f} | {planned.memory.total / 2**30:.1f} GiB | "
                f"{planned.seconds:.0f} s |",
                flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
