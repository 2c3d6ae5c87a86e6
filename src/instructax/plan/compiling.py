"""Programs through the compiler: figures of what fits, and a reason where it does not."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from instructax.plan import memory, timing
from instructax.plan.chips import Chip
from instructax.plan.memory import Memory
from instructax.plan.program import Program
from instructax.plan.timing import Cost
from instructax.plan.topology import quiet

REMATERIALIZED = "Involuntary full rematerialization"


@dataclass(frozen=True)
class Planned:
    """What the plan says of one program."""

    program: Program
    memory: Memory
    cost: Cost | None
    """None where the compiler gave up for lack of memory."""
    decode: Cost | None
    """The part of ``cost`` inside loops whose number of turns the data decides."""
    counted_once: float
    """The compiler's own FLOPs a chip, loops' bodies counted once."""
    rematerialized: int
    """Arrays that the partitioner had to gather whole against the tables' wish."""
    seconds: float
    """Spent in the compiler."""

    def fits(self, chip: Chip) -> bool:
        return self.cost is not None and self.memory.total <= chip.usable_bytes


def plan(program: Program, mesh: Mesh, chip: Chip) -> Planned:
    """Compile, and say what the compiler says; lack of memory is an answer, any other refusal a RuntimeError."""
    began = time.perf_counter()
    message, compiled = "", None
    with jax.set_mesh(mesh), quiet() as said:
        lowered = program.jitted.lower(*program.arguments)
        try:
            compiled = lowered.compile(compiler_options=compiler_options(chip))
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
    spent = time.perf_counter() - began
    rematerialized = sum(REMATERIALIZED in line for line in said)
    if compiled is None:
        refused = memory.refused(message, program.passed, program.held)
        if refused is None:
            raise RuntimeError(f"{program.name}: {message}")
        return Planned(program, refused, None, None, 0.0, rematerialized, spent)
    text, places = compiled.as_text(), _places(mesh.devices.flatten().tolist())
    cost = timing.analyse(text, chip, places, program.unknown_trips, program.filled)
    decode = Cost()
    if program.unknown_trips > 1:
        decode.add(cost)
        decode.add(timing.analyse(text, chip, places, 0, program.filled), -1.0)
    held = memory.of_program(compiled.memory_analysis(), program.passed, program.held, program.made)
    return Planned(program, held, cost, decode, _counted_once(compiled), rematerialized, spent)


def compiler_options(chip: Chip) -> dict[str, str]:
    """The flags in LIBTPU_INIT_ARGS, which a TPU's runtime reads and a compiler without one does not."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "") if chip.torus else ""
    pairs = (word.removeprefix("--").partition("=") for word in given.split())
    return {name: value or "true" for name, _, value in pairs}


def _places(devices: Sequence[Any]) -> list[tuple[int, ...] | None]:
    """Coordinates in the slice, where the devices have some."""
    return [tuple(device.coords) if device.platform == "tpu" else None for device in devices]


def _counted_once(compiled: Any) -> float:
    analysis = compiled.cost_analysis()
    return float((analysis or {}).get("flops", 0.0))
