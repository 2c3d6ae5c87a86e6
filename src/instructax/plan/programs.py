"""Every program of every stage of a config, as the stages build it, on shapes alone.

Nothing here holds a weight: states come from ``jax.eval_shape`` and the partitioning table. Where the
number of rows depends on the data (packed rows), the largest that can come is planned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

from jax.sharding import Mesh

from instructax.config import Arm, Config, OptimizerConfig, PpoConfig, replace
from instructax.plan.program import Program
from instructax.plan.reinforcement import Reinforcement
from instructax.plan.supervised import Supervised
from instructax.resolve import apply_arm


def stages(config: Config, mesh: Mesh) -> dict[str, Callable[[], Iterator[Program]]]:
    """What builds the programs of each stage, in the order in which a run needs them.

    No pretraining where SFT starts from given weights. Building raises UserError for a batch whose
    rows the data axes do not divide, as the stage would refuse it.
    """
    supervised = Supervised(config, mesh)
    found: dict[str, Callable[[], Iterator[Program]]] = {}
    if not config.sft.init_from:
        found["pretrain"] = supervised.pretraining
    found["sft"] = lambda: supervised.fine_tuning("sft", config.sft)
    found["reward"] = supervised.rewarding
    found["init"] = lambda: supervised.fine_tuning("init", config.init)
    seen: list[PpoConfig] = []
    for arm in config.arms or (Arm(),):
        ppo = apply_arm(config, arm).ppo
        if _shape(ppo) in seen:
            continue
        seen.append(_shape(ppo))
        name = "ppo" if len(seen) == 1 else f"ppo:{arm.name}"
        found[name] = functools.partial(Reinforcement(replace(config, ppo=ppo), mesh).ppo, name)
    found["evaluate"] = Reinforcement(config, mesh).evaluating
    return found


def programs(config: Config, mesh: Mesh, only: Sequence[str] = ()) -> Iterator[Program]:
    """All programs, or those whose names start with one of ``only``: a stage, or ``stage/program``."""
    for stage, build in stages(config, mesh).items():
        if only and not any(stage.startswith(name.partition("/")[0]) for name in only):
            continue
        for program in build():
            if not only or program.name.startswith(tuple(only)):
                yield program


def _shape(ppo: PpoConfig) -> PpoConfig:
    """Arms that differ only in what does not change a program's size are planned once."""
    return replace(
        ppo,
        kl_coef=0.0,
        ptx_coef=float(ppo.ptx_coef != 0.0),
        rl_coef=float(ppo.rl_coef != 0.0),
        score_control="none",
        ptx_loss="mean",
        policy_optimizer=OptimizerConfig(),
        value_optimizer=OptimizerConfig(),
    )
