"""What gamma does, and what it means under both readings of the pretraining term.

    instructax run --config configs/ablations/gamma.py

Arms differ in gamma alone: 0, a quarter of the demo's, four times, and the paper's 27.8. Two more take the sum over a row
in place of the mean over tokens: `sum_same` with the demo's gamma divided by the tokens of a row, which is the
demo's arm in other words, and `sum_paper` with 27.8, under which little of the PPO gradient should be left.
docs/gamma.md has the argument. Not run yet.
"""

import dataclasses
import runpy
from pathlib import Path

from instructax.config import Arm, Config

_DEMO = Path(__file__).parent.parent / "demo.py"


def config() -> Config:
    demo: Config = runpy.run_path(str(_DEMO))["config"]()
    gamma = demo.ppo.ptx_coef
    same = gamma / demo.ppo.ptx_row_length
    arms = (
        Arm("gamma_0", (("ptx_coef", 0.0),)),
        Arm("gamma_quarter", (("ptx_coef", gamma / 4),)),
        Arm("gamma_demo"),
        Arm("gamma_4_times", (("ptx_coef", gamma * 4),)),
        Arm("gamma_paper", (("ptx_coef", 27.8),)),
        Arm("sum_same", (("ptx_loss", "sum"), ("ptx_coef", same))),
        Arm("sum_paper", (("ptx_loss", "sum"), ("ptx_coef", 27.8))),
    )
    return dataclasses.replace(
        demo,
        name="gamma",
        arms=arms,
        evaluate=dataclasses.replace(
            demo.evaluate, policies=("sft", "init", *(arm.name for arm in arms)), best_of=1
        ),
    )
