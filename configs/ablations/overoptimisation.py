"""What beta and gamma guard: four arms of PPO with beta and gamma on or off, on the demo's world.

    instructax run --config configs/ablations/overoptimisation.py

One seed on two CPU cores; the report plots gold and pretraining loss against KL. The learning rate is
twice the demo's, so that the arms without beta go far in few iterations.
"""

import dataclasses
import runpy
from pathlib import Path

from instructax.config import Arm, Config

_DEMO = Path(__file__).parent.parent / "demo.py"


def config() -> Config:
    demo: Config = runpy.run_path(str(_DEMO))["config"]()
    faster = dataclasses.replace(demo.ppo.policy_optimizer, learning_rate=6e-4)
    return dataclasses.replace(
        demo,
        name="overoptimisation",
        ppo=dataclasses.replace(demo.ppo, policy_optimizer=faster, sample_every=8, log_prompts=200),
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
