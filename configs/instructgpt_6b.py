"""InstructGPT 6B with a 6B reward model and value network: the recipe of instructgpt_1b3.py at the size of 6.7B.

    instructax run --config configs/instructgpt_6b.py

Planned for 32 v5p chips (`instructax plan --config configs/instructgpt_6b.py --topology v5p:2x4x4`, docs/plan.md), never run:

- Largest program `ppo/update`: 57.4 of 95 GiB a chip, of which 49.8 are activations: attention stores its scores, so 16 chips
  should be too few. On v6e not planned yet; try v6e:8x8.
- PPO, an iteration of 512 episodes at full length: 199 s (prefill 1.9, decode 68.4, score 16.1, update 112); the update at
  27.3% MFU, decoding at 7% of its bandwidth bound, since every token gathers the weights; 500 iterations: 27.6 hours.
- 3.04 PF/s-days of the model's FLOPs.
- SFT, reward model and evaluation: not planned yet.
"""

import runpy
from pathlib import Path

from instructax.config import Config, MeshConfig

_RECIPE = runpy.run_path(str(Path(__file__).parent / "instructgpt_1b3.py"))["recipe"]


def config() -> Config:
    return _RECIPE(
        "instructgpt_6b",
        policy="gpt3-6.7b",
        mesh=MeshConfig(data=1, fsdp=-1, model=1),
        sft=(9.65e-6, 32),
        init=(1.04e-5, 32),
        policy_rate=8.05e-6,
        value_rate=9e-6,
    )
