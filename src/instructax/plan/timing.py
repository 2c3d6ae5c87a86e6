"""What a compiled program does on one chip, each instruction counted as often as it runs, and how long it takes.

Time is added up from the leaves: an instruction takes the longer of its products at the chip's peak and its
HBM traffic at full bandwidth (the roofline), or the cycles that the compiler expects (TPU). Inside one
computation, such as the body of the scan over layers, communication that the compiler has started early
hides behind that computation's own work, and what is left of it is exposed; communication that the
compiler waits for is exposed whole.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from instructax.plan import hlo
from instructax.plan.chips import Chip
from instructax.plan.hlo import Computation, Instruction, Module
from instructax.plan.links import Links, goes_round_one_ring
from instructax.plan.traffic import hbm_bytes, of_cache_look


@dataclass
class Traffic:
    """All collectives of one kind in a program, on one chip."""

    count: float = 0.0
    payload: float = 0.0
    """Bytes of the whole array that a group shares out, gathers or sums."""
    wire: float = 0.0
    """Bytes that the chip sends: (n-1)/n of the payload, twice that for an all-reduce, on a ring."""
    seconds: float = 0.0
    exposed: float = 0.0


@dataclass
class Cost:
    """One chip's work in a program or a part of it."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    cycles: float = 0.0
    roofline: float = 0.0
    """Seconds without communication."""
    exposed: float = 0.0
    """Seconds of communication that the roofline's work does not hide."""
    exposed_compiler: float = 0.0
    """The same, with the compiler's cycles as the work."""
    collectives: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    unknown_loops: int = 0
    """Loops whose number of turns the text does not say."""

    def add(self, other: Cost, times: float = 1.0) -> None:
        for name in (
            "flops", "hbm_bytes", "cycles", "roofline", "exposed", "exposed_compiler"
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        self.unknown_loops += other.unknown_loops
        for kind, theirs in other.collectives.items():
            ours = self.collectives[kind]
            for name in ("count", "payload", "wire", "seconds", "exposed"):
                setattr(ours, name, getattr(ours, name) + times * getattr(theirs, name))

    def compiler_seconds(self, chip: Chip) -> float | None:
        """The compiler's cycles and the exposed communication; None where the compiler gives no cycles."""
        if chip.clock is None or self.cycles == 0:
            return None
        return self.cycles / chip.clock + self.exposed_compiler

    @property
    def wire(self) -> float:
        """Bytes that the chip sends."""
        return sum(traffic.wire for traffic in self.collectives.values())

    @property
    def roofline_seconds(self) -> float:
        return self.roofline + self.exposed


def analyse(
    text: str,
    chip: Chip,
    places: Sequence[tuple[int, ...] | None],
    unknown_trips: int = 1,
    filled: tuple[int, int] = (1, 1),
) -> Cost:
    """The cost of compiled HLO text on one chip.

    Args:
      places: where in the slice each device of the mesh lies, in the order of the mesh; None
        where a switch connects them.
      unknown_trips: how often a loop runs of which the text does not say it (the sampler's).
      filled: of how many slots to how many a cache fills while it is looked at.
    """
    return _Walk(hlo.parse(text), chip, places, unknown_trips, filled).of(None)


class _Walk:
    def __init__(
        self, module: Module, chip: Chip, places: Sequence[tuple[int, ...] | None], unknown: int,
        filled: tuple[int, int],
    ):  # fmt: skip
        self._module, self._chip, self._unknown, self._filled = module, chip, unknown, filled
        self._devices, self._links = len(places), Links(chip, places)
        self._known: dict[str, Cost] = {}

    def of(self, name: str | None) -> Cost:
        name = self._module.entry if name is None else name
        if name not in self._known:
            self._known[name] = self._computation(self._module.computations[name])
        return self._known[name]

    def _computation(self, computation: Computation) -> Cost:
        own, rest, early = Cost(), Cost(), 0.0
        chains: set[str] = set()
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = self._module.trip_count(instruction)
                rest.unknown_loops += trips is None
                turn = self.of(instruction.attribute("body"))
                rest.add(turn, self._unknown if trips is None else trips)
            elif opcode == "conditional":
                branches = [self.of(b) for b in _branches(instruction)]
                rest.add(max(branches, key=lambda cost: (cost.flops, cost.cycles)))
            elif opcode in ("call", "async-start", "call-start"):
                callee = instruction.attribute("calls") or instruction.attribute("to_apply") or ""
                started = self._collectives(callee) if opcode == "async-start" else []
                early += sum(self._collective(kind, inner, own, True) for kind, inner in started)
                if not started:
                    rest.add(self.of(callee))
            else:
                early += self._leaf(instruction, computation, own, chains)
        own.exposed += max(0.0, early - own.roofline)
        cycles_seconds = own.cycles / self._chip.clock if self._chip.clock else own.roofline
        own.exposed_compiler += max(0.0, early - cycles_seconds)
        self._share_exposed(own, early)
        own.add(rest)
        return own

    def _share_exposed(self, own: Cost, early: float) -> None:
        """What of the early starts stays exposed is put down to their kinds in proportion."""
        left = max(0.0, early - own.roofline)
        for traffic in own.collectives.values():
            started = traffic.seconds - traffic.exposed
            traffic.exposed += left * started / early if early else 0.0

    def _collectives(self, name: str) -> list[tuple[str, Instruction]]:
        inner = self._module.computations[name].instructions.values()
        return [(kind, i) for i in inner if (kind := collective_kind(i)) is not None]

    def _leaf(
        self, instruction: Instruction, within: Computation, own: Cost, chains: set[str]
    ) -> float:
        """Adds an instruction to ``own``; returns the seconds of communication that it starts early.

        A collective that a TPU runs beside products is written down several times: where it starts, in the
        products, and where it is awaited. These are one chain, which counts where it is first met.
        """
        early = 0.0
        kind = collective_kind(instruction)
        flops = hlo.product_flops(instruction, within)
        if kind is not None:
            early += self._collective(kind, instruction, own, instruction.opcode.endswith("-start"))
        if instruction.opcode == "fusion":
            flops, found = self._inside(instruction)
            for inner_kind, inner, is_early in found:
                chain = inner.chain
                if chain not in chains:
                    is_early = is_early or bool(chain)
                    early += self._collective(inner_kind, inner, own, is_early, instruction)
                if chain:
                    chains.add(chain)
            kind = kind or (found[0][0] if found and not flops else None)
        nbytes = 0.0 if kind is not None else self._hbm_bytes(instruction, within)
        own.flops += flops
        own.hbm_bytes += nbytes
        seconds = max(flops / self._chip.peak_flops, nbytes / self._chip.hbm_bandwidth)
        own.roofline += seconds
        if kind is None:
            # The compiler expects nothing of a kernel that it did not write.
            is_given = not hlo.is_kernel(instruction)
            own.cycles += instruction.cycles if is_given else seconds * (self._chip.clock or 0.0)
        return early

    def _hbm_bytes(self, instruction: Instruction, within: Computation) -> float:
        if hlo.is_cache_look(instruction):
            slots = hlo.cache_slots_read(instruction, *self._filled)
            return of_cache_look(instruction, within, slots)
        return hbm_bytes(instruction, within, self._module)

    def _inside(self, fusion: Instruction) -> tuple[float, list[tuple[str, Instruction, bool]]]:
        """FLOPs and collectives of a fused computation."""
        name = fusion.attribute("calls") or ""
        computation = self._module.computations.get(name)
        flops = 0.0
        found: list[tuple[str, Instruction, bool]] = []
        for inner in computation.instructions.values() if computation else ():
            flops += hlo.product_flops(inner, computation)  # type: ignore[arg-type]
            if inner.opcode == "fusion":
                more, deeper = self._inside(inner)
                flops, found = flops + more, found + deeper
            kind = collective_kind(inner)
            if kind is not None:
                # A reduction whose result is sliced at once is sent as a reduce-scatter.
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind = "all-reduce-scatter"
                found.append((kind, inner, "async" in name or inner.opcode.endswith("-start")))
        return flops, found

    def _collective(
        self,
        kind: str,
        instruction: Instruction,
        own: Cost,
        is_early: bool,
        within: Instruction | None = None,
    ) -> float:
        """Adds one to ``own``; returns its seconds where it is started early. ``within`` is the fusion that holds it."""
        members = hlo.group(instruction, self._devices)
        n = len(members)
        moved = _payload(kind, instruction, n)
        kind = "reduce-scatter" if kind == "all-reduce-scatter" else kind
        share = 1.0 if kind == "collective-permute" else (n - 1) / n
        wire = (2.0 if kind == "all-reduce" else 1.0) * share * moved
        one_ring = any(goes_round_one_ring(i) for i in (instruction, within) if i is not None)
        seconds = self._links.seconds(kind, members, wire, one_ring)
        traffic = own.collectives[kind]
        traffic.count += 1
        traffic.payload += moved
        traffic.wire += wire if n > 1 else 0.0
        traffic.seconds += seconds
        if is_early:
            return seconds
        traffic.exposed += seconds
        own.exposed += seconds
        own.exposed_compiler += seconds
        return 0.0


def collective_kind(instruction: Instruction) -> str | None:
    """The collective that an instruction is or starts; its ``-done`` is none."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in hlo.COLLECTIVES else None


def _payload(kind: str, instruction: Instruction, n: int) -> float:
    """Bytes of the whole array of a group."""
    shapes = instruction.shapes
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # (operands, results) of a gather; (operand, result, two counters) of a permute.
        half = len(shapes) // 2
        results = shapes[half:] if kind == "all-gather" else shapes[1:2]
        return float(sum(s.nbytes for s in results))
    nbytes = float(sum(s.nbytes for s in shapes))
    return nbytes * n if kind == "reduce-scatter" else nbytes


def _branches(instruction: Instruction) -> list[str]:
    listed = instruction.attributes.partition("branch_computations={")[2].partition("}")[0]
    names = [name.strip(" %") for name in listed.split(",") if name.strip()]
    either = [instruction.attribute(key) for key in ("true_computation", "false_computation")]
    return names or [name for name in either if name]


def utilisation(model_flops: float, chips: int, chip: Chip, seconds: float) -> float:
    """MFU: the model's FLOPs over what the chips could do in that time."""
    return model_flops / (chips * chip.peak_flops * seconds) if seconds > 0 else math.nan
