"""How long collectives take on a slice's links, by the algorithm that the compiler names."""

from __future__ import annotations

import pytest

from instructax.plan import timing
from instructax.plan.chips import CHIPS
from instructax.plan.links import HOP_SECONDS, Links

V5P = CHIPS["v5p"]
PLACES = [(x, y, z) for x in range(4) for y in range(4) for z in range(8)]
PLANE = [i for i, (x, _, _) in enumerate(PLACES) if x == 0]
ALONG_Z = [i for i, (x, y, _) in enumerate(PLACES) if x == y == 0]


def seconds(members, one_ring, kind="reduce-scatter", places=PLACES):
    return Links(V5P, places).seconds(kind, members, 1e9, one_ring)


@pytest.mark.laws
def test_one_ring_has_two_links_however_many_axes_the_group_spans():
    link = 1e9 / V5P.link_bandwidth
    # 4 x 8 chips of axes that close: two links each, 2 and 4 steps to the farthest; one ring of 32 has 16.
    assert seconds(PLANE, False) == pytest.approx(link / 4 + 6 * HOP_SECONDS)
    assert seconds(PLANE, True) == pytest.approx(link / 2 + 16 * HOP_SECONDS)
    # Along one axis they are the same.
    assert seconds(ALONG_Z, True) == seconds(ALONG_Z, False)
    # A line's chips have one link each way, and no ring gives them more.
    line = [(0, 0, z) for z in range(3)]
    assert seconds(range(3), True, places=line) == pytest.approx(link + 2 * HOP_SECONDS)
    assert seconds([5], True) == 0.0


@pytest.mark.laws
def test_a_permutation_and_a_switch_know_no_rings():
    link = 1e9 / V5P.link_bandwidth
    for one_ring in (False, True):
        assert seconds(PLANE, one_ring, "collective-permute") == pytest.approx(link + HOP_SECONDS)
        switched = seconds(range(4), one_ring, places=[None] * 4)
        assert switched == pytest.approx(link / V5P.links + HOP_SECONDS)


TEXT = """\
HloModule jit_step, is_scheduled=true

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter.1 (x: bf16[32,4096]) -> bf16[1,4096] {
  %x = bf16[32,4096]{1,0} parameter(0)
  %whole = bf16[32,4096]{1,0} all-reduce(%x), replica_groups={{GROUP}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = bf16[1,4096]{1,0} dynamic-slice(%whole, %zero, %zero), dynamic_slice_sizes={1,4096}
}

ENTRY %main (x: bf16[32,4096]) -> bf16[32,4096] {
  %x.1 = bf16[32,4096]{1,0} parameter(0)
  %part = bf16[1,4096]{1,0} fusion(%x.1), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion","strategy":"SCATTER"}}
  ROOT %back = bf16[32,4096]{1,0} all-gather(%part), replica_groups={{GROUP}}, dimensions={0}, backend_config={"collective_algorithm_config":{"emitter":"GATHER"}}
}
"""


@pytest.mark.parametrize(
    ("scatter", "gather", "rings"),
    [
        ("StrategyRing", "1DAllGatherNonMajorDim", (True, True)),
        ("UniDirection1DRingStrategy", "2DAllGather", (True, False)),
        ("StrategyND", "3DAllGatherOnMajorDim", (False, False)),
        ("UniDirectionNDRingStrategy", "1DAllGatherOnMajorDimImbalanced", (False, True)),
    ],
)
def test_the_algorithm_is_what_the_compiler_names(scatter, gather, rings):
    group = ",".join(map(str, PLANE))
    text = TEXT.replace("GROUP", group).replace("SCATTER", scatter).replace("GATHER", gather)
    found = timing.analyse(text, V5P, PLACES).collectives
    wire = 31 / 32 * 32 * 4096 * 2
    for kind, ring in zip(("reduce-scatter", "all-gather"), rings, strict=True):
        meant = Links(V5P, PLACES).seconds(kind, PLANE, wire, ring)
        assert (found[kind].wire, found[kind].seconds) == pytest.approx((wire, meant))
