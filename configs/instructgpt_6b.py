"""InstructGPT 6B with a 6B reward model and value network: the recipe of instructgpt_1b3.py at the size of 6.7B.

    instructax run --config configs/instructgpt_6b.py

Planned for 16 v5p chips, never run (docs/plan.md):

    JAX_PLATFORMS=cpu launch/local.sh --flags tpu -- plan --config configs/instructgpt_6b.py --topology v5p:2x2x4 --only ppo

- Largest program `ppo/update`: 58.1 of 95 GiB a chip, each minibatch in two parts. On v6e not planned.
- PPO, an iteration of 512 episodes at full length: 168 s (prefill 2, decode 31, score 14, update 120); the update at 51% MFU,
  scoring at 56%, decoding at 32% of its bandwidth bound; 500 iterations: 23.3 hours.
- 3.04 PF/s-days of the model's FLOPs.
- SFT (`--only sft/step`) with whole products (docs/plan.md: one flag more): 656 ms a step, 59% MFU, 11.9 GiB; with
  `--model.remat none` 602 ms, 64%, 41.6 GiB.
- Reward model and evaluation: not planned.
"""

import runpy
from pathlib import Path

from instructax.config import Config, MeshConfig

_RECIPE = runpy.run_path(str(Path(__file__).parent / "instructgpt_1b3.py"))["recipe"]


def config() -> Config:
    return _RECIPE(
        "instructgpt_6b",
        policy="gpt3-6.7b",
        mesh=MeshConfig(data=2, fsdp=-1, model=1),
        sft=(9.65e-6, 32),
        init=(1.04e-5, 32),
        policy_rate=8.05e-6,
        value_rate=9e-6,
        grad_accumulation=2,
    )
