"""How long a group of chips takes to move bytes: the links that a collective uses, and its steps."""

from __future__ import annotations

import re
from collections.abc import Sequence

from instructax.plan.chips import Chip
from instructax.plan.hlo import Instruction

HOP_SECONDS = 1e-6  # latency of a step of a collective from chip to chip

# How a TPU's compiler names what goes round one ring through all chips of a group; other algorithms take every axis
# of the slice that the group spans.
_ONE_RING = re.compile(
    r'"emitter":"(1D|SinglePhaseRing)|"strategy":"(StrategyRing|UniDirection1DRing)'
)


def goes_round_one_ring(instruction: Instruction) -> bool:
    """Whether the compiler says so; it says nothing of what it moves beside products."""
    return _ONE_RING.search(instruction.attributes) is not None


class Links:
    """Those between the devices of a mesh.

    Args:
      places: where in the slice each device lies, in the order of the mesh; None where a switch connects them.
    """

    def __init__(self, chip: Chip, places: Sequence[tuple[int, ...] | None]):
        self._chip, self._places = chip, places
        spans = [place for place in places if place is not None]
        self._slice = tuple(max(axis) + 1 for axis in zip(*spans, strict=True)) if spans else ()

    def seconds(self, kind: str, members: Sequence[int], wire: float, one_ring: bool) -> float:
        """Of a collective among some devices of which each sends ``wire`` bytes."""
        if len(members) == 1:
            return 0.0
        chip, places = self._chip, [self._places[m] for m in members]
        if any(place is None for place in places):
            return wire / (chip.link_bandwidth * chip.links) + HOP_SECONDS
        if kind == "collective-permute":
            return wire / chip.link_bandwidth + HOP_SECONDS
        links, hops = self._spanned(places)
        if one_ring:
            links, hops = min(links, 2), max(hops, len(members) // 2)
        return wire / (chip.link_bandwidth * links) + hops * HOP_SECONDS

    def _spanned(self, places: Sequence[tuple[int, ...] | None]) -> tuple[int, int]:
        """(links of a chip, steps) along all axes that a group spans."""
        coordinates = list(zip(*(place for place in places if place is not None), strict=True))
        links, hops = 0, 0
        for axis, whole in zip(coordinates, self._slice, strict=True):
            extent = len(set(axis))
            if extent == 1:
                continue
            ring = extent == whole and whole % self._chip.wraps_at == 0
            # Two chips that are neighbours share one link; a line's ends have one neighbour.
            links += 2 if ring else 1
            hops += extent // 2 if ring else extent - 1
        return max(1, links), hops
