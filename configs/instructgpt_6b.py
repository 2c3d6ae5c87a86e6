"""InstructGPT 6B with a 6B reward model and value network: the recipe of instructgpt_1b3.py at the size of 6.7B.

    instructax run --config configs/instructgpt_6b.py

Planned for 16 v5p chips, never run (docs/plan.md):

    JAX_PLATFORMS=cpu launch/local.sh --flags tpu -- plan --config configs/instructgpt_6b.py --topology v5p:2x2x4 --only ppo

- Largest program `ppo/update`: 77.1 of 95 GiB a chip, each minibatch in two parts; sampling 66.2, scoring 46.6.
- PPO, an iteration of 512 episodes at full length: 112 s (prefill 1, decode 12, score 8, update 91); the update at 68% MFU,
  decoding at 50% of its bandwidth bound; 500 iterations: 16 hours.
- On 32 v6e, `--topology v6e:4x8 --mesh.data 4 --model.shard-over data+fsdp --reward.model.shard-over data+fsdp`:
  sampling 27.9 of 31.25 GiB; the update, compiled with `LIBTPU_INIT_ARGS=--xla_tpu_scoped_vmem_limit_kib=49152`, 26.5; an iteration 50 s (prefill 1,
  decode 10, update 36, MFU of the update 43%; scoring, 4, is that of `--mesh.data 1`).
- 3.03 PF/s-days of the model's FLOPs.
- SFT (`--only sft/step`): 649 ms a step, 59% MFU, 49.2 GiB.
- The 6B reward model (`--only reward/step`): 1.46 s for 64 rankings of 9 in rows of 2,048, 50% MFU, 20.3 GiB.
- Evaluation (`--only evaluate`): 64 prompts are sampled in 4.0 s and scored in .3 s; 14.6 GiB.
"""

import runpy
from pathlib import Path

from instructax.config import Config, MeshConfig

_RECIPE = runpy.run_path(str(Path(__file__).parent / "instructgpt_1b3.py"))["recipe"]


def config() -> Config:
    return _RECIPE(
        "instructgpt_6b",
        policy="gpt3-6.7b",
        # fsdp within the planes of 2x2x4: the compiler sums gradients into parts there (docs/plan.md).
        mesh=MeshConfig(data=2, fsdp=-1, model=1),
        sft=(9.65e-6, 32),
        init=(1.04e-5, 32),
        sft_remat="none",
        policy_rate=8.05e-6,
        value_rate=9e-6,
        grad_accumulation=2,
    )
