"""What gamma does, and what it means under both readings of the pretraining term.

    instructax run --config configs/ablations/gamma.py

Arms differ in gamma alone: 0, 1/4, 1, 4 (the demo's) and the paper's 27.8. Two more take the sum over a row in
place of the mean over tokens: `sum_4` with the demo's gamma divided by the tokens of a row, which is the demo's arm in
other words, and `sum_27_8`, under which little of the PPO gradient is left. docs/gamma.md has figures and argument.
"""

import dataclasses
import runpy
from pathlib import Path

from instructax.config import Arm, Config

_DEMO = Path(__file__).parent.parent / "demo.py"


def config() -> Config:
    demo: Config = runpy.run_path(str(_DEMO))["config"]()
    arms = (
        Arm("gamma_0", (("ptx_coef", 0.0),)),
        Arm("gamma_1_4", (("ptx_coef", 0.25),)),
        Arm("gamma_1", (("ptx_coef", 1.0),)),
        Arm("gamma_4", (("ptx_coef", 4.0),)),
        Arm("gamma_27_8", (("ptx_coef", 27.8),)),
        Arm("sum_4", (("ptx_loss", "sum"), ("ptx_coef", 4.0 / demo.ppo.ptx_row_length))),
        Arm("sum_27_8", (("ptx_loss", "sum"), ("ptx_coef", 27.8))),
    )
    return dataclasses.replace(
        demo,
        name="gamma",
        arms=arms,
        evaluate=dataclasses.replace(
            demo.evaluate, policies=("sft", "init", *(arm.name for arm in arms)), best_of=1
        ),
    )
