"""InstructGPT 175B with a 6B reward model and value network: the recipe of instructgpt_1b3.py at the size of 175B.

    instructax ppo --config configs/instructgpt_175b.py

Planned for 128 v5p chips, never run (docs/plan.md). PPO's batches fit its mesh, those of SFT and the RL init (8 demonstrations)
do not, so the plan is asked for with others:

    JAX_PLATFORMS=cpu launch/local.sh --flags tpu -- plan --config configs/instructgpt_175b.py --topology v5p:4x4x8 \\
        --only ppo --sft.batch-size 32 --init.batch-size 32

- Largest program: sampling, 84.2 of 95 GiB a chip; the update 82.1, each minibatch in two parts; scoring 41.8.
- PPO, an iteration of 512 episodes at full length: 322 s (prefill 5, decode 27, score 17, update 273); the update at 64% MFU,
  decoding at 27% of its bandwidth bound.
- 65.7 PF/s-days of the model's FLOPs; the paper gives 60 (section 5.1).
- SFT and the RL init have batches of 8, so their mesh is another on the same chips (`--only sft/step --mesh.data 1 --mesh.model 16`): 809 ms a
  step, 37% MFU, 34.1 GiB. A chip's part of 8 rows is little work: it waits 323 ms for others. On 64 chips (v5p:4x4x4, `--mesh.data 1 --mesh.model 8`)
  it is 1.5 s, 40% and 67.7 GiB.
"""

import runpy
from pathlib import Path

from instructax.config import Config, MeshConfig

_RECIPE = runpy.run_path(str(Path(__file__).parent / "instructgpt_1b3.py"))["recipe"]


def config() -> Config:
    return _RECIPE(
        "instructgpt_175b",
        policy="gpt3-175b",
        # Trained in 32 shares, over data and fsdp together; decoding, which waits for others 13 times a layer and token, goes
        # round rings of 8 where these would be of 32 (docs/plan.md).
        mesh=MeshConfig(data=4, fsdp=-1, model=4),
        shard_over="data+fsdp",
        sft=(5.03e-6, 8),
        init=(2.45e-6, 8),
        sft_remat="wide",
        # 2.55e-6 and 3.74e-6 were tried.
        policy_rate=2.55e-6,
        value_rate=5e-6,
        grad_accumulation=2,
    )
