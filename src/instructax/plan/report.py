"""What a plan prints: a paragraph a program, PPO's iteration by phase, and what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from instructax.config import Config
from instructax.plan.chips import GIB, Chip
from instructax.plan.compiling import Planned
from instructax.plan.timing import Cost, utilisation

PETAFLOP_DAY = 1e15 * 86400
"""FLOPs of a PF/s-day, the unit in which the papers give compute."""


@dataclass(frozen=True)
class Target:
    """What the plan is for."""

    topology: str
    chip: Chip
    chips: int
    mesh: dict[str, int]

    def seconds(self, cost: Cost) -> float:
        """The compiler's estimate where it gives one, else the roofline's."""
        estimate = cost.compiler_seconds(self.chip)
        return cost.roofline_seconds if estimate is None else estimate


def heading(config: Config, target: Target) -> str:
    chip, mesh = target.chip, " x ".join(f"{a} {n}" for a, n in target.mesh.items())
    return (
        f"plan of {config.name} for {target.topology}: {target.chips} x {chip.name} with "
        f"{chip.usable_bytes / GIB:.2f} GiB, mesh {mesh}"
    )


def paragraph(planned: Planned, target: Target) -> str:
    chip, memory = target.chip, planned.memory
    fits = "fits" if planned.fits(chip) else "DOES NOT FIT"
    lines = [
        (
            f"{planned.program.name}: {fits}, {size(memory.total)} of {size(chip.usable_bytes)} a chip "
            f"(compiled in {planned.seconds:.0f} s)"
        ),
        "  memory  " + ", ".join(f"{kind} {size(v)}" for kind, v in memory.kinds.items() if v),
    ]
    lines += [f"  buffer  {buffer}" for buffer in memory.largest]
    if planned.rematerialized:
        lines.append(f"  sharding: {planned.rematerialized} involuntary full rematerializations")
    if planned.cost is not None:
        lines += _work(planned, planned.cost, target)
    return "\n".join(lines)


def _work(planned: Planned, cost: Cost, target: Target) -> list[str]:
    model = planned.program.model_flops / target.chips
    once = flops(planned.counted_once)
    lines = [f"  FLOPs   a chip: model {flops(model)}, hardware {flops(cost.flops)}"]
    lines[0] += f"; the compiler, which counts a loop's body once, {once}"
    for kind, traffic in sorted(cost.collectives.items()):
        if traffic.wire:
            lines.append(
                f"  moves   {kind}: {traffic.wire / 1e9:.2f} GB sent a chip in "
                f"{traffic.count:.0f}, {clock(traffic.seconds)}, exposed {clock(traffic.exposed)}"
            )
    least, sent = planned.program.least_moved, cost.wire
    if least:
        lines.append(f"  moves   all: {sent / 1e9:.2f} GB, {sent / least:.2f} times the least")
    compiler = cost.compiler_seconds(target.chip)
    shown = f"  time    roofline {clock(cost.roofline)} + communication {clock(cost.exposed)}"
    if compiler is not None:
        shown += f"; compiler {clock(compiler - cost.exposed_compiler)}"
        shown += f" + communication {clock(cost.exposed_compiler)}"
    if cost.unknown_loops:
        shown += (
            f"; {cost.unknown_loops} loop at its longest, {planned.program.unknown_trips} turns"
        )
    if model:
        seconds = target.seconds(cost)
        mfu = utilisation(planned.program.model_flops, target.chips, target.chip, seconds)
        shown += f"; MFU {mfu:.1%}"
    return [*lines, shown]


def iterations(plans: Sequence[Planned], target: Target) -> list[dict[str, Any]]:
    """PPO's iteration by phase, for every planned arm: seconds, model FLOPs, and the whole run's."""
    by_name = {p.program.name: p for p in plans}
    found = []
    for arm in [n.removesuffix("/update") for n in by_name if n.endswith("/update")]:
        parts = [
            by_name.get(f"{arm}/{part}") for part in ("rollout_copy", "sample", "score", "update")
        ]
        if any(p is None or p.cost is None for p in parts):
            continue
        copy, sample, score, update = (p for p in parts if p is not None)
        assert copy.cost and sample.cost and sample.decode and score.cost and update.cost
        seconds = {
            "rollout copy": target.seconds(copy.cost),
            "prefill": 0.0,
            "decode": target.seconds(sample.decode),
            "score": target.seconds(score.cost),
            "update": target.seconds(update.cost),
        }
        # Sampling makes the copy, reads the prompts and decodes: the first and the last are known.
        rest = target.seconds(sample.cost) - seconds["rollout copy"] - seconds["decode"]
        seconds["prefill"] = max(0.0, rest)
        total = sum(seconds.values())
        model = sum(p.program.model_flops for p in (sample, score, update))
        bound = sample.program.bandwidth_bound / target.chip.hbm_bandwidth
        count = update.program.iterations
        found.append(
            {
                "arm": arm,
                "seconds": seconds,
                "total": total,
                "mfu": utilisation(model, target.chips, target.chip, total),
                "decode_of_bandwidth": bound / seconds["decode"] if seconds["decode"] else 0.0,
                "iterations": count,
                "hours": count * total / 3600,
                "petaflop_days": count * model / PETAFLOP_DAY,
            }
        )
    return found


def iteration_paragraph(found: dict[str, Any]) -> str:
    phases = ", ".join(f"{phase} {clock(s)}" for phase, s in found["seconds"].items())
    return (
        f"{found['arm']}, an iteration at full length: {clock(found['total'])}, MFU {found['mfu']:.1%}\n"
        f"  phases  {phases}\n"
        f"  decode  {found['decode_of_bandwidth']:.0%} of its bandwidth bound\n"
        f"  run     {found['iterations']} iterations: {found['hours']:.1f} hours, "
        f"{found['petaflop_days']:.3g} PF/s-days of the model"
    )


def verdict(plans: Sequence[Planned], target: Target) -> str:
    """One line; names what does not fit with its largest parts."""
    bad = [p for p in plans if not p.fits(target.chip)]
    if not bad:
        tightest = max(plans, key=lambda p: p.memory.total)
        return (
            f"all {len(plans)} programs fit; the largest is {tightest.program.name} with "
            f"{size(tightest.memory.total)} of {size(target.chip.usable_bytes)}"
        )
    said = "; ".join(
        f"{p.program.name} needs {size(p.memory.total)} of {size(target.chip.usable_bytes)} "
        f"({p.memory.top()})"
        for p in bad
    )
    return f"{len(bad)} of {len(plans)} programs do not fit: {said}"


def as_json(plans: Sequence[Planned], found: Sequence[dict[str, Any]], target: Target) -> Any:
    return {
        "topology": target.topology,
        "chip": target.chip.name,
        "chips": target.chips,
        "mesh": target.mesh,
        "programs": {p.program.name: _program_json(p, target) for p in plans},
        "ppo": list(found),
    }


def _program_json(planned: Planned, target: Target) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "fits": planned.fits(target.chip),
        "bytes": planned.memory.kinds | {"total": planned.memory.total},
        "model_flops_per_chip": planned.program.model_flops / target.chips,
        "compile_seconds": planned.seconds,
        "rematerialized": planned.rematerialized,
    }
    if planned.cost is None:
        return plain | {"buffers": list(planned.memory.largest)}
    cost, seconds = planned.cost, target.seconds(planned.cost)
    return plain | {
        "hardware_flops_per_chip": cost.flops,
        "compiler_flops_counted_once": planned.counted_once,
        "hbm_bytes_per_chip": cost.hbm_bytes,
        "roofline_seconds": cost.roofline_seconds,
        "compiler_seconds": cost.compiler_seconds(target.chip),
        "exposed_seconds": cost.exposed,
        "sent_bytes_per_chip": cost.wire,
        "least_sent_bytes_per_chip": planned.program.least_moved,
        "mfu": utilisation(planned.program.model_flops, target.chips, target.chip, seconds),
        "collectives": {kind: vars(traffic) for kind, traffic in cost.collectives.items()},
    }


def size(nbytes: float) -> str:
    if nbytes >= GIB / 10:
        return f"{nbytes / GIB:.2f} GiB"
    return f"{nbytes / 2**20:.2f} MiB"


def flops(count: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def clock(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
