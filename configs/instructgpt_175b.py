"""InstructGPT 175B with a 6B reward model and value network: the recipe of instructgpt_1b3.py at the size of 175B.

    instructax ppo --config configs/instructgpt_175b.py

Planned for 256 v5p chips (`instructax plan --config configs/instructgpt_175b.py --topology v5p:4x8x8 --only ppo`, docs/plan.md), never run:

- Largest program `ppo/update`: 74.5 of 95 GiB a chip, of which 60.3 are activations: attention stores its scores. The
  largest v6e slice has as many chips, of 31.25 GiB each: too little. 128 v5p chips: not planned yet.
- PPO, an iteration of 512 episodes at full length: 540 s (prefill 2.8, decode 331, score 11.8, update 194); the update at
  44.8% MFU, decoding at 2% of its bandwidth bound, since every token gathers the weights; 500 iterations: 75 hours.
- 65.7 PF/s-days of the model's FLOPs; the paper gives 60 (section 5.1).
- SFT and the RL init have batches of 8, so their mesh is another: `--mesh.model 32` on the same chips. Not planned yet.
"""

import runpy
from pathlib import Path

from instructax.config import Config, MeshConfig

_RECIPE = runpy.run_path(str(Path(__file__).parent / "instructgpt_1b3.py"))["recipe"]


def config() -> Config:
    return _RECIPE(
        "instructgpt_175b",
        policy="gpt3-175b",
        mesh=MeshConfig(data=1, fsdp=-1, model=4),
        sft=(5.03e-6, 8),
        init=(2.45e-6, 8),
        # 2.55e-6 and 3.74e-6 were tried.
        policy_rate=2.55e-6,
        value_rate=5e-6,
        grad_accumulation=2,
    )
