"""What beta and gamma guard: four arms of PPO with beta and gamma on or off, on the demo's world.

    instructax run --config configs/ablations/overoptimisation.py

One seed on two CPU cores; the report plots gold and pretraining loss against KL. Not run yet.
"""

import dataclasses
import runpy
from pathlib import Path

from instructax.config import Arm, Config

_DEMO = Path(__file__).parent.parent / "demo.py"


def config() -> Config:
    demo: Config = runpy.run_path(str(_DEMO))["config"]()
    return dataclasses.replace(
        demo,
        name="overoptimisation",
        ppo=dataclasses.replace(demo.ppo, sample_every=8, log_prompts=200),
        arms=(
            Arm("beta_and_gamma"),
            Arm("beta_only", (("ptx_coef", 0.0),)),
            Arm("gamma_only", (("kl_coef", 0.0),)),
            Arm("neither", (("kl_coef", 0.0), ("ptx_coef", 0.0))),
        ),
        evaluate=dataclasses.replace(
            demo.evaluate,
            policies=("sft", "init", "beta_and_gamma", "beta_only", "gamma_only", "neither"),
            best_of=1,
        ),
    )
