"""`instructax plan`: compile every program of a config for hardware that need not be there."""

from __future__ import annotations

import os
from pathlib import Path

from instructax.config import Config, UserError
from instructax.plan import report
from instructax.plan.chips import chip_of
from instructax.plan.compiling import Planned, plan
from instructax.plan.programs import programs, stages
from instructax.plan.topology import LOCAL, devices
from instructax.runtime.mesh import make_mesh
from instructax.stages.context import write_json


def run(config: Config, topology: str = LOCAL, only: str = "", output: str = "") -> None:
    """Print the plan; exit code 1 where a program does not fit.

    Args:
      topology: ``v5p:8x8x8``, or ``local`` for the devices at hand.
      only: programs whose names start with one of these, separated by commas; empty means all.
      output: a JSON file for the same figures; empty means none.

    Raises:
      UserError: a topology that is none, a name that no program has, an output that cannot be written.
    """
    if output:
        _refuse_unwritable(Path(output))
    found = devices(topology)
    mesh, chip = make_mesh(config.mesh, found), chip_of(found[0])
    target = report.Target(topology, chip, len(found), dict(mesh.shape))
    print(report.heading(config, target))
    plans: list[Planned] = []
    for program in programs(config, mesh, [name for name in only.split(",") if name]):
        plans.append(plan(program, mesh, chip))
        print(report.paragraph(plans[-1], target), flush=True)
    if not plans:
        names = ", ".join(stages(config, mesh))
        raise UserError(f"--only {only}: no program's name begins so; stages are {names}")
    iterations = report.iterations(plans, target)
    for iteration in iterations:
        print(report.iteration_paragraph(iteration))
    print(report.verdict(plans, target))
    if output:
        write_json(Path(output), report.as_json(plans, iterations, target))
    if not all(planned.fits(chip) for planned in plans):
        raise SystemExit(1)


def _refuse_unwritable(path: Path) -> None:
    # Known before the first program is compiled, which may take an hour.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name a file in a folder") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path}: cannot be written; name a file in a folder of yours")
