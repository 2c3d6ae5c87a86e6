"""What beta and gamma guard: four arms of PPO with beta and gamma on or off, on the demo's world.

    instructax run --config configs/ablations/overoptimisation.py

The report plots gold and pretraining loss against KL. Measured with the demo's settings of commit 026dacc (gamma 1,
96 episodes an iteration), world 11, run seed 0, 1,000 evaluation prompts, EMA weights: beta guards the gold score, gamma guards the language model, and neither does the other's work.

| arm | reward model's score | gold (SFT 2.73) | wins over SFT | pretraining NLL against the init | KL |
|---|---|---|---|---|---|
| beta and gamma | .90 | 3.12 | 66.8% | -.042 | 1.5 |
| beta only | .93 | 3.13 | 67.3% | +.028 | 1.7 |
| gamma only | 2.51 | 1.93 | 17.9% | -.041 | 73 |
| neither | 2.47 | 1.72 | 13.0% | +1.115 | 73 |
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
