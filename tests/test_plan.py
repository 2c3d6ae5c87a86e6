"""The plan: topologies, figures of a compiled program, bytes against a count by hand, exit codes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import textwrap

import apart
import jax
import jax.numpy as jnp
import pytest

from instructax.__main__ import main
from instructax.config import (
    Arm,
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    UserError,
    replace,
)
from instructax.models import functional as model
from instructax.plan import (
    chips,
    compiling,
    least_moves,
    links,
    memory,
    model_flops,
    programs,
    timing,
    topology,
)
from instructax.plan.chips import CHIPS, GIB
from instructax.plan.program import Program
from instructax.runtime.mesh import make_mesh

MODEL = ModelConfig(
    num_layers=2,
    d_model=32,
    num_heads=2,
    vocab_size=300,
    vocab_multiple=64,
    context_length=64,
)

TINY = Config(
    name="tiny",
    data=DataConfig(max_prompt_tokens=16, max_response_tokens=16),
    model=MODEL,
    pretrain=PretrainConfig(batch_size=8, row_length=32, steps=200),
    sft=SftConfig(batch_size=8, row_length=32),
    init=SftConfig(batch_size=8, row_length=32),
    reward=RewardConfig(batch_size=8, row_length=64),
    ppo=PpoConfig(
        batch_size=16,
        minibatch_size=8,
        episodes=1600,
        prompt_length=16,
        response_length=16,
        ptx_examples_per_episode=1,
        ptx_row_length=32,
    ),
    arms=(Arm("ppo_ptx"), Arm("more", (("kl_coef", 0.1),)), Arm("ppo", (("ptx_coef", 0.0),))),
    evaluate=EvaluateConfig(batch_size=8, policies=("sft",)),
)

FILE = f"""
from instructax.config import *

def config():
    return {TINY!r}
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(FILE)
    return "tiny.py"


# Topologies and chips.


@pytest.mark.parametrize(
    ("text", "name", "sizes"),
    [
        ("v5p:8x8x8", "v5p", (8, 8, 8)),
        ("v6e:16x16", "v6e", (16, 16)),
        ("v4:2x2x1", "v4", (2, 2, 1)),
    ],
)
def test_a_topology_is_a_chip_and_sizes(text, name, sizes):
    assert topology.parse(text) == (name, sizes)


@pytest.mark.parametrize(
    "text", ["", "v5p", "v5p:", "v5p:8", "v5p:8x8", "v6e:4x4x4", "v9:2x2", "H100:8", "v5p:0x2x2", "v5p:2x-2x2"]
)  # fmt: skip
def test_other_topologies_are_refused_with_an_example(text):
    with pytest.raises(UserError, match="--topology .*(for example)"):
        topology.parse(text)


def test_a_plan_for_a_tpu_without_libtpu_is_one_line_and_exit_code_2(file, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    assert main(["plan", "--config", file, "--topology", "v5p:2x2x1"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "pip install instructax[tpu]" in err


def test_cycles_and_peaks_of_a_chip_agree():
    """The clock times the multiply-adds of all matrix units is the published peak."""
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    for name, multiply_adds in units.items():
        chip = CHIPS[name]
        assert chip.clock is not None
        assert 2 * multiply_adds * chip.clock == pytest.approx(chip.peak_flops, rel=0.005)


def test_a_device_that_the_table_lacks_is_refused():
    class Device:
        platform, device_kind = "gpu", "NVIDIA B9000"

    with pytest.raises(UserError, match="B9000"):
        chips.chip_of(Device())  # type: ignore[arg-type]
    Device.device_kind = "NVIDIA H100 80GB HBM3"
    assert chips.chip_of(Device()).name == "H100"  # type: ignore[arg-type]


# Compiled text.


EIGHT = """
import functools
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from instructax.config import MeshConfig
from instructax.plan import timing
from instructax.plan.chips import CHIPS
from instructax.runtime.mesh import make_mesh

mesh = make_mesh(MeshConfig(data=1, fsdp=4, model=2))
TURNS, ROWS, WIDTH = 7, 16, 32

@functools.partial(
    jax.shard_map, mesh=mesh, check_vma=False, in_specs=(P("fsdp"), P("fsdp", "model")), out_specs=(P("fsdp"), P(("fsdp", "model")))
)
def program(x, w):
    w = jax.lax.all_gather(w, "fsdp", tiled=True)                     # WIDTH x WIDTH / 2
    w = jax.lax.all_gather(w, "model", axis=1, tiled=True)            # WIDTH x WIDTH

    def turn(x, _):
        return jnp.tanh(jax.lax.pmean(x @ w, "model")), None          # ROWS / 4 x WIDTH

    x, _ = jax.lax.scan(turn, x, length=TURNS)
    return x, jax.lax.psum_scatter(w.T @ w, ("fsdp", "model"), tiled=True)  # WIDTH / 8 x WIDTH

x, w = jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH))
text = jax.jit(program).lower(x, w).compile().as_text()
assert " while(" in text
cost = timing.analyse(text, CHIPS["H100"], [None] * 8)
found = {kind: (t.count, t.payload, t.wire) for kind, t in cost.collectives.items()}
part, whole = ROWS // 4 * WIDTH * 4, WIDTH * WIDTH * 4
assert found["all-gather"] == (2, whole / 2 + whole, whole / 2 * 3 / 4 + whole / 2), found
# A group of two sends a sum once around: 2 (n-1)/n of it.
assert found["all-reduce"] == (TURNS, TURNS * part, TURNS * part), found
assert found["reduce-scatter"] == (1, whole, whole * 7 / 8), found
assert cost.flops == TURNS * 2 * (ROWS // 4) * WIDTH**2 + 2 * WIDTH**3, cost.flops
assert cost.unknown_loops == 0
print("passed")
"""


def test_collectives_and_flops_inside_loops_are_counted_as_often_as_they_run():
    apart.passes(EIGHT)


# An embedding split over the width by an axis that splits the rows of a batch as well.
GATHERED_WHOLE = """
import sys
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from instructax.config import MeshConfig
from instructax.plan.chips import CHIPS
from instructax.plan.compiling import plan
from instructax.plan.program import Program
from instructax.plan.topology import devices
from instructax.runtime.mesh import make_mesh

if sys.argv[1] == "local":
    jax.config.update("jax_num_cpu_devices", 8)
mesh = make_mesh(MeshConfig(2, 2, 2), devices(sys.argv[1]))

def array(shape, dtype, *spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

def loss(embedding, kernel, token):
    def rows(x):
        return jax.lax.with_sharding_constraint(x, P(("data", "fsdp"), None, None))

    x = rows(embedding[token])
    x, _ = jax.lax.scan(lambda x, _: (rows(x + jnp.tanh(x @ kernel)), None), x, length=3)
    return jax.nn.logsumexp(x @ embedding.T, axis=-1).sum()

def planned(*embedding_spec):
    arguments = (
        array((128, 64), jnp.float32, *embedding_spec),
        array((64, 64), jnp.float32, "fsdp", "model"),
        array((16, 32), jnp.int32, ("data", "fsdp")),
    )
    program = Program("loss", jax.jit(jax.grad(loss, argnums=(0, 1))), arguments, passed={})
    return plan(program, mesh, CHIPS["v5p"]).rematerialized

assert planned("model", "fsdp") > 0
assert planned("model", None) == 0
print("passed")
"""


@pytest.mark.parametrize("where", ["local", pytest.param("v5p:2x2x2", marks=pytest.mark.slow)])
def test_an_array_that_the_partitioner_gathers_whole_is_seen(where):
    if where != "local":
        apart.needs_libtpu()
    apart.passes(GATHERED_WHOLE, where)


# The shapes and options of a TPU's text, shortened: a loop of 6 with a product written as a convolution,
# a gather over one axis of a named mesh, a sum that waits, and a gather that is started early.
TPU = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p0: bf16[4,256], p1: bf16[6,256,128]) -> bf16[4,128] {
  %p0 = bf16[4,256]{1,0} parameter(0)
  %p1 = bf16[6,256,128]{2,1,0} parameter(1)
  %one = bf16[1,256,128]{2,1,0} dynamic-slice(%p1, %p0), dynamic_slice_sizes={1,256,128}
  %flat = bf16[256,128]{1,0} bitcast(%one)
  ROOT %product = bf16[4,128]{1,0} convolution(%p0, %flat), dim_labels=bf_io->bf
}

%body (t: (s32[], bf16[4,256], bf16[6,256,128])) -> (s32[], bf16[4,256], bf16[6,256,128]) {
  %t = (s32[]{:T(128)}, bf16[4,256]{1,0:T(8,128)(2,1)}, /*index=2*/bf16[6,256,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = bf16[4,256]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %w = bf16[6,256,128]{2,1,0:T(8,128)} get-tuple-element(%t), index=2
  %step = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %step)
  %y = bf16[4,128]{1,0:T(8,128)(2,1)} fusion(%x, %w), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %s = bf16[4,128]{1,0:T(8,128)(2,1)} all-reduce(%y), replica_groups=[4,2]<=[8], to_apply=%add, backend_config={"estimated_cycles":"9223372036854775807"}
  %g = bf16[4,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%s), replica_groups=mesh['a'=4,'b'=1,'c'=2] {'a'}, dimensions={1}
  ROOT %out = (s32[]{:T(128)}, bf16[4,256]{1,0}, bf16[6,256,128]{2,1,0}) tuple(%next, %g, %w)
}

%condition (t: (s32[], bf16[4,256], bf16[6,256,128])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, bf16[4,256]{1,0}, bf16[6,256,128]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[4,256], w: bf16[6,256,128]) -> bf16[4,256] {
  %x.2 = bf16[4,256]{1,0} parameter(0)
  %w.2 = bf16[6,256,128]{2,1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, bf16[4,256]{1,0}, bf16[6,256,128]{2,1,0}) tuple(%zero, %x.2, %w.2)
  %loop = (s32[]{:T(128)}, bf16[4,256]{1,0}, bf16[6,256,128]{2,1,0}) while(%first), condition=%condition, body=%body
  ROOT %last = bf16[4,256]{1,0} get-tuple-element(%loop), index=1
}
"""
PLACES = [(x, y, z) for x in range(2) for y in range(2) for z in range(2)]


def test_the_text_of_a_tpu_is_read():
    chip = CHIPS["v5p"]
    cost = timing.analyse(TPU, chip, PLACES)
    assert cost.unknown_loops == 0
    assert cost.flops == 6 * 2 * 4 * 256 * 128
    assert cost.cycles == 6 * 1000
    # x, the slice of w, and y: not the whole stack of w; the gather writes to fast memory.
    assert cost.hbm_bytes == pytest.approx(6 * 2 * (4 * 256 + 256 * 128 + 4 * 128), rel=0.01)
    summed, gathered = cost.collectives["all-reduce"], cost.collectives["all-gather"]
    assert (summed.count, summed.wire) == (6, 6 * 4 * 128 * 2)
    assert (gathered.count, gathered.wire) == (6, 6 * 4 * 256 * 2 * 3 / 4)
    # Neighbours share one link; {0, 2, 4, 6} spans two axes of two.
    one_sum = 4 * 128 * 2 / 100e9 + links.HOP_SECONDS
    assert summed.seconds == pytest.approx(6 * one_sum)
    assert gathered.seconds == pytest.approx(6 * (1536 / 200e9 + 2 * links.HOP_SECONDS))
    assert cost.exposed == pytest.approx(summed.seconds + gathered.seconds)
    seconds = cost.compiler_seconds(chip)
    assert seconds == pytest.approx(6000 / 1.75e9 + cost.exposed)


FLASH = """\
HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[2,4,1024,128], k: bf16[2,4,1024,128]) -> bf16[2,4,1024,128] {
  %q = bf16[2,4,1024,128]{3,2,1,0} parameter(0)
  %k = bf16[2,4,1024,128]{3,2,1,0} parameter(1)
  %next = s8[1,2,2]{2,1,0} constant({...})
  %splash.1 = (bf16[2,4,1024,128]{3,2,1,0}, f32[2,4,1024,128]{3,2,1,0}) custom-call(%next, %next, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/jvp(flash_pairs_786432)/vmap()/splash_mha_fwd_segmented_residuals/pallas_call"}, backend_config={"custom_call_config":{"body":"TUz"}}
  %out = bf16[2,4,1024,128]{3,2,1,0} get-tuple-element(%splash.1), index=0
  ROOT %half = bf16[2,4,1024,128]{3,2,1,0} fusion(%out), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"1000"}
}
"""


LOOK = """\
HloModule jit_decode, is_scheduled=true

ENTRY %main (q: bf16[4,2,8,1024], k: bf16[4,2,2048,1024], bias: f32[4,1,2048]) -> bf16[4,2,8,1024] {
  %q = bf16[4,2,8,1024]{3,2,1,0} parameter(0)
  %k = bf16[4,2,2048,1024]{3,2,1,0} parameter(1)
  %bias = f32[4,1,2048]{2,1,0} parameter(2)
  %count = s32[4]{0} constant({...})
  %blocks = s32[24]{0} constant({...})
  ROOT %look = bf16[4,2,8,1024]{3,2,1,0} custom-call(%count, %blocks, %q, %k, %k, %bias), custom_call_target="tpu_custom_call", metadata={op_name="jit(decode)/cache_reach_256_block_128/shard_map/cached_attention/pallas_call"}
}
"""


CACHE = """\
HloModule jit_decode, is_scheduled=true

%look (p0: bf16[1024,128], p1: bf16[1,128], p2: s32[]) -> (f32[1024,1], bf16[1024,128]) {
  %p0 = bf16[1024,128]{1,0} parameter(0)
  %p1 = bf16[1,128]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %put = bf16[1024,128]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
  %score = f32[1024,1]{1,0} convolution(%put, %p1), dim_labels=bf_oi->bf
  ROOT %both = (f32[1024,1]{1,0}, bf16[1024,128]{1,0}) tuple(%score, %put)
}

ENTRY %main (c: bf16[1024,128], q: bf16[1,128], i: s32[]) -> (f32[1024,1], bf16[1024,128]) {
  %c = bf16[1024,128]{1,0} parameter(0)
  %q = bf16[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %looked = (f32[1024,1]{1,0}, bf16[1024,128]{1,0}) fusion(%c, %q, %i), kind=kOutput, calls=%look
}
"""


PIECES = """\
HloModule jit_step, is_scheduled=true

%start (p: bf16[64,256]) -> (bf16[64,256], bf16[256,256]) {
  %p = bf16[64,256]{1,0} parameter(0)
  %g1 = bf16[256,256]{1,0} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %t1 = (bf16[64,256]{1,0}, bf16[256,256]{1,0}) tuple(%p, %g1)
}

%beside (a: bf16[128,256], b: bf16[256,128], c: bf16[64,256]) -> bf16[128,128] {
  %a = bf16[128,256]{1,0} parameter(0)
  %b = bf16[256,128]{1,0} parameter(1)
  %c = bf16[64,256]{1,0} parameter(2)
  %g2 = bf16[256,256]{1,0} all-gather(%c), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
  ROOT %y = bf16[128,128]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%done (d: bf16[64,256]) -> bf16[256,256] {
  %d = bf16[64,256]{1,0} parameter(0)
  ROOT %g3 = bf16[256,256]{1,0} all-gather(%d), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="3"}
}

ENTRY %main (a: bf16[128,256], b: bf16[256,128], w: bf16[64,256]) -> bf16[256,256] {
  %a.1 = bf16[128,256]{1,0} parameter(0)
  %b.1 = bf16[256,128]{1,0} parameter(1)
  %w = bf16[64,256]{1,0} parameter(2)
  %begun = (bf16[64,256]{1,0}, bf16[256,256]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %product = bf16[128,128]{1,0} fusion(%a.1, %b.1, %w), kind=kOutput, calls=%beside, backend_config={"estimated_cycles":"70000"}
  ROOT %ended = bf16[256,256]{1,0} fusion(%w), kind=kCustom, calls=%done
}
"""


def test_a_collective_in_pieces_is_one_and_hides_behind_the_work_beside_it():
    cost = timing.analyse(PIECES, CHIPS["v5p"], PLACES)
    gathered = cost.collectives["all-gather"]
    assert (gathered.count, gathered.wire) == (1, 256 * 256 * 2 * 3 / 4)
    # 40 us of the compiler's cycles hide it; the roofline's product is too short to.
    assert cost.exposed_compiler == 0.0 < cost.exposed < gathered.seconds
    apart = PIECES.replace(', frontend_attributes={chain_id="3"}', "")
    assert timing.analyse(apart, CHIPS["v5p"], PLACES).collectives["all-gather"].count == 3


def test_a_cache_that_is_written_in_place_is_read_where_it_is_looked_at():
    row, scores = 128 * 2, 1024 * 4
    looked = timing.analyse(CACHE, CHIPS["v5p"], [(0, 0, 0)]).hbm_bytes
    assert looked == pytest.approx(1024 * row + 2 * row + scores, rel=0.001)
    turned = (
        CACHE.replace("convolution(%put, %p1)", "convolution(%flat, %p1)")
        .replace(
            "  %score =",
            "  %flat = bf16[1024,128]{1,0} fusion(%put), kind=kLoop, calls=%same\n  %score =",
        )
        .replace(
            "%look (p0:",
            """%same (s0: bf16[1024,128]) -> bf16[1024,128] {
  %s0 = bf16[1024,128]{1,0} parameter(0)
  ROOT %s1 = bf16[1024,128]{1,0} bitcast(%s0)
}

%look (p0:""",
        )
    )
    assert timing.analyse(turned, CHIPS["v5p"], [(0, 0, 0)]).hbm_bytes == looked
    alone = CACHE.replace("convolution(%put, %p1)", "convolution(%p1, %p1)")
    put = timing.analyse(alone, CHIPS["v5p"], [(0, 0, 0)]).hbm_bytes
    assert put == pytest.approx(2 * row + scores, abs=8)


def test_a_slice_inside_a_fusion_of_a_fusion_is_read_alone():
    """As TPU compilers take a layer out of a stack: two computations down."""
    nested = TPU.replace(
        "%fused (p0:",
        """%inner (q1: bf16[6,256,128], q0: bf16[4,256]) -> bf16[256,128] {
  %q1 = bf16[6,256,128]{2,1,0} parameter(0)
  %q0 = bf16[4,256]{1,0} parameter(1)
  %one = bf16[1,256,128]{2,1,0} dynamic-slice(%q1, %q0), dynamic_slice_sizes={1,256,128}
  ROOT %flat.1 = bf16[256,128]{1,0} bitcast(%one)
}

%fused (p0:""",
    ).replace(
        "  %one = bf16[1,256,128]{2,1,0} dynamic-slice(%p1, %p0), dynamic_slice_sizes={1,256,128}\n"
        "  %flat = bf16[256,128]{1,0} bitcast(%one)\n",
        "  %flat = bf16[256,128]{1,0} fusion(%p1, %p0), kind=kLoop, calls=%inner\n",
    )
    assert nested.count("calls=%inner") == 1
    found, plain = (timing.analyse(text, CHIPS["v5p"], PLACES) for text in (nested, TPU))
    # The index is read once more.
    assert plain.hbm_bytes <= found.hbm_bytes <= plain.hbm_bytes + 6 * 2 * 4 * 256


@pytest.mark.parametrize(("shape", "nbytes"), [("f32[]", 0), ("bf16[8,128]", 8 * 128 * 2)])
def test_a_copy_on_its_way_moves_what_is_copied(shape, nbytes):
    text = f"""\
HloModule jit_copy, is_scheduled=true

ENTRY %main (a: {shape}) -> {shape} {{
  %a = {shape} parameter(0)
  %begun = ({shape}, {shape}, u32[]) copy-start(%a)
  ROOT %there = {shape} copy-done(%begun)
}}
"""
    assert timing.analyse(text, CHIPS["v5p"], [(0, 0, 0)]).hbm_bytes == nbytes


def test_flags_of_a_tpus_runtime_reach_its_compiler(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_a=65536 --xla_enable_b")
    assert compiling.compiler_options(CHIPS["v5p"]) == {
        "xla_tpu_a": "65536",
        "xla_enable_b": "true",
    }
    assert compiling.compiler_options(chips.cpu()) == {}


def test_a_flash_kernel_counts_with_the_pairs_that_its_name_says():
    """The compiler says nothing of it, and breaks its line."""
    chip = CHIPS["v5p"]
    cost = timing.analyse(FLASH, chip, PLACES)
    assert cost.flops == 2 * 2 * 786432 * 2 * 4 * 128
    assert cost.cycles / chip.clock == pytest.approx(
        1000 / chip.clock + cost.flops / chip.peak_flops
    )
    plain = FLASH.replace("flash_pairs_786432", "other")
    assert timing.analyse(plain, chip, PLACES).cycles == 1000


def test_a_look_at_a_cache_takes_as_long_as_reading_the_blocks_that_are_seen():
    chip = CHIPS["v5p"]
    # 256 slots that end with the 1,024th lie in two blocks of 128, those that end with the 1,025th in three.
    of_slot, beside = 2 * 4 * 2 * 1024 * 2 + 4 * 4, 2 * 4 * 2 * 8 * 1024 * 2 + 28 * 4
    for filled, slots in (
        ((1024, 1024), 256),
        ((1025, 1025), 384),
        ((100, 100), 128),
        ((1024, 1025), 320),
    ):
        cost = timing.analyse(LOOK, chip, PLACES, filled=filled)
        assert cost.hbm_bytes == slots * of_slot + beside
        assert cost.cycles / chip.clock == pytest.approx(cost.hbm_bytes / chip.hbm_bandwidth)
    whole = LOOK.replace("reach_256_block_128", "reach_2048_block_512")
    assert (
        timing.analyse(whole, chip, PLACES, filled=(1025, 1025)).hbm_bytes
        == 1536 * of_slot + beside
    )


def test_a_loop_that_the_compiler_has_unrolled_turns_half_as_often():
    """Its counter, here not the first element, goes up by 1 and by 1 again."""
    unrolled = TPU.replace(
        "%next = s32[]{:T(128)} add(%i, %step)",
        "%half = s32[]{:T(128)} add(%i, %step)\n  %next = s32[]{:T(128)} add(%half, %step)",
    )
    assert timing.analyse(unrolled, CHIPS["v5p"], PLACES).cycles == 3 * 1000


def test_what_is_started_early_hides_behind_the_work_of_its_loop():
    early = TPU.replace(
        "%g = bf16[4,256]{1,0:T(8,128)(2,1)S(1)} all-gather(%s)",
        "%g = (bf16[4,64]{1,0}, bf16[4,256]{1,0:S(1)}) all-gather-start(%s)",
    )
    chip = CHIPS["v5p"]
    waits, starts = (timing.analyse(text, chip, PLACES) for text in (TPU, early))
    assert starts.collectives["all-gather"].wire == waits.collectives["all-gather"].wire
    hidden = waits.exposed - starts.exposed
    assert hidden == pytest.approx(starts.roofline, rel=1e-6)
    # 1000 cycles are shorter than the gather: so much of it is hidden there.
    hidden = waits.exposed_compiler - starts.exposed_compiler
    assert hidden == pytest.approx(6000 / 1.75e9, rel=1e-6)


def test_a_loop_whose_turns_the_data_decides_takes_those_given():
    open_ended = TPU.replace("direction=LT", "direction=NE")
    cost = timing.analyse(open_ended, CHIPS["v5p"], PLACES, unknown_trips=100)
    assert cost.unknown_loops == 1
    assert cost.flops == 100 * 2 * 4 * 256 * 128
    assert timing.analyse(open_ended, CHIPS["v5p"], PLACES, unknown_trips=0).flops == 0


# FLOPs and bytes.


def test_model_flops_are_six_a_parameter_and_token_and_the_attention():
    """GPT-3 175B: 6N is within a percent of the rule without attention; the paper's N is 174.6 billion."""
    m = ModelConfig(num_layers=96, d_model=12288, num_heads=96, context_length=2048)
    matrices = model_flops.matrix_parameters(m)
    assert matrices == 96 * 12 * 12288**2
    counted = model_flops.train(m, tokens=1.0, context=0.0)
    assert counted == pytest.approx(6 * 174.6e9, rel=0.01)
    attention = model_flops.train(m, 1.0, 2048.0) - counted
    assert attention == 12 * 96 * 12288 * 2048
    scalar = model_flops.train(m, 1.0, 0.0, unembedded=0.0)
    assert counted - scalar == 6 * 12288 * 50257


def test_least_moves_by_hand():
    m = ModelConfig(num_layers=2, d_model=8, num_heads=2, vocab_size=10, compute_dtype="bfloat16")
    n, words = 2 * 12 * 8**2, m.padded_vocab_size * 8

    def mesh(data, fsdp, model):
        return {"data": data, "fsdp": fsdp, "model": model}

    assert least_moves.train(m, 100.0, mesh(1, 1, 1)) == 0.0
    assert least_moves.train(m, 100.0, mesh(1, 4, 1)) == 3 * 3 / 4 * 2 * (n + words)
    # Parts of a batch share out the weights anew; rows are divided already.
    assert least_moves.train(m, 1.0, mesh(1, 4, 1), 5) == 5 * 3 * 3 / 4 * 2 * (n + words)
    assert least_moves.forward(m, 1.0, mesh(1, 4, 1), scalar=True) == 3 / 4 * 2 * n
    # Gradients are summed with each part in the compute dtype, or once in float32.
    assert least_moves.train(m, 1.0, mesh(2, 1, 1)) == 2 * 1 / 2 * 2 * (n + words)
    assert least_moves.train(m, 1.0, mesh(2, 1, 1), 5) == 2 * 1 / 2 * 4 * (n + words)
    # And once for each update.
    twice = least_moves.train(m, 1.0, mesh(2, 1, 1), 10, updates=2)
    assert twice == 2 * least_moves.train(m, 1.0, mesh(2, 1, 1), 5)
    assert least_moves.train(m, 1.0, mesh(1, 4, 1), 10, updates=5) == least_moves.train(
        m, 1.0, mesh(1, 4, 1), 10
    )
    # Weights that data shares out as well are gathered by both axes, and no copy's gradients are left to sum.
    spread = dataclasses.replace(m, shard_over="data+fsdp")
    assert least_moves.train(spread, 1.0, mesh(2, 2, 1), 5) == least_moves.train(
        m, 1.0, mesh(1, 4, 1), 5
    )
    assert least_moves.forward(spread, 1.0, mesh(4, 1, 1)) == 3 / 4 * 2 * (n + words)
    stream = 2 * (100 / 2) * 8 * 2
    whole = least_moves.train(m, 100.0, mesh(1, 2, 4))
    assert whole == 8 * 3 / 4 * stream + 3 * 1 / 2 * 2 * (n + words) / 4


def by_name(config: Config, only=()):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return {p.name: p for p in programs.programs(config, mesh, only)}


def test_bytes_of_states_are_those_counted_by_hand():
    d, v, layers, positions = 32, 320, 2, 64
    block = 12 * d * d + (3 * d + d + 4 * d + d) + 4 * d  # matrices, biases, two norms
    policy = v * d + positions * d + layers * block + 2 * d
    value = policy + d + 1
    found = by_name(TINY, ["sft/step", "reward/step", "ppo"])
    sft, reward, update = (found[n] for n in ("sft/step", "reward/step", "ppo/update"))
    # Adam keeps two moments; its count, the schedule's and the step are 4 bytes each.
    assert sft.passed == {"params": 4 * policy, "optimizer": 8 * policy + 12}
    assert reward.passed["params"] == 4 * value
    assert update.passed["params"] == 4 * (policy + value)
    assert update.passed["ema"] == 4 * policy
    assert update.held == {"frozen": 4 * (policy + value)}
    sample = found["ppo/sample"]
    assert sample.made["cache"] == 2 * layers * 16 * 32 * d * 4
    # While it samples, everything else stays where it is.
    assert sample.held["optimizer"] == update.passed["optimizer"]
    assert sample.held["frozen"] == update.held["frozen"]


SPREAD = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from instructax.config import MeshConfig, RewardConfig, replace
from instructax.plan import programs
from instructax.runtime.mesh import make_mesh
from test_plan import MODEL, TINY

def planned(policy, value):
    config = replace(
        TINY, model=replace(MODEL, shard_over=policy), reward=RewardConfig(model=replace(MODEL, shard_over=value))
    )
    mesh = make_mesh(MeshConfig(2, 4, 1), jax.devices())
    found = {p.name: p for p in programs.programs(config, mesh, ["ppo"])}
    return found["ppo/sample"], found["ppo/update"]

sample, update = planned("fsdp", "fsdp")
words, kernels = 320 * 32, 2 * 12 * 32**2
parts = updates = 2
# Of the policy both halves read every part, of the value network one; all float32.
gathered = 3 * 3 / 4 * 4 * parts * (2 * (kernels + words) + kernels)
summed = 2 * 1 / 2 * 4 * updates * (kernels + words + kernels) / 4
assert update.least_moved == gathered + summed, (update.least_moved, gathered, summed)

wide_sample, wide_update = planned("data+fsdp", "data+fsdp")
assert wide_update.least_moved == gathered * (7 / 8) / (3 / 4), wide_update.least_moved
# Decoding reads from fsdp alone, wherever the parameters lie.
assert wide_sample.made == sample.made
saved = update.passed["params"] - wide_update.passed["params"]
assert saved == 4 * 2 * (kernels + words) * (1 / 4 - 1 / 8), saved
_, one_update = planned("fsdp", "data+fsdp")
assert one_update.passed["ema"] == update.passed["ema"]
assert update.passed["params"] - one_update.passed["params"] == saved / 2
print("passed")
"""


def test_networks_spread_over_data_are_planned_where_they_lie():
    apart.passes(SPREAD, JAX_PLATFORMS="cpu")


def test_rankings_are_planned_family_by_family_where_that_has_fewer_scores(monkeypatch):
    """Half of a row its prompt; on a CPU, which has a triangle of scores for a whole row, that pays nowhere."""

    def planned() -> Program:
        return by_name(TINY, ["reward/step"])["reward/step"]

    whole = planned()
    assert whole.arguments[1].layout.families is None
    monkeypatch.setattr(model, "row_scores", lambda length: length**2)
    parted = planned()
    families = parted.arguments[1].layout.families
    assert families.prompt_BxNxP.shape == (8, 1, 32)
    assert families.response_BxNxKxT.shape == (8, 1, 9, 8)
    fewer = 64**2 - (32**2 + 9 * 8 * (32 + 8))
    attention = 3 * 4 * MODEL.num_layers * MODEL.d_model * 8 * fewer
    assert whole.model_flops - parted.model_flops == attention


def test_frozen_models_in_the_hosts_memory_are_on_a_chip_for_scoring_alone():
    hosted = by_name(
        dataclasses.replace(TINY, ppo=dataclasses.replace(TINY.ppo, frozen_memory="host"))
    )
    plain = by_name(TINY)
    assert "frozen" not in hosted["ppo/sample"].held and "frozen" not in hosted["ppo/update"].held
    assert hosted["ppo/score"].passed["frozen"] == plain["ppo/score"].passed["frozen"] > 0


@pytest.mark.parametrize(
    ("model", "sft"), [("block", "none"), ("none", "block"), ("none", "model"), ("block", "model")]
)
def test_a_fine_tuning_stage_computes_again_what_its_own_setting_says(model, sft):
    config = dataclasses.replace(
        TINY,
        model=dataclasses.replace(TINY.model, remat=model),
        sft=dataclasses.replace(TINY.sft, remat=sft),
    )
    found = by_name(config, ["pretrain/step", "sft/step"])

    def computes_again(program) -> bool:
        text = program.jitted.lower(*program.arguments).as_text(debug_info=True)
        return "rematted_computation/Block" in text

    assert computes_again(found["sft/step"]) == ("block" in (sft, model) and sft != "none")
    assert computes_again(found["pretrain/step"]) == (model == "block")


def test_arms_of_the_same_programs_are_planned_once():
    names = list(by_name(TINY))
    assert len(names) == len(set(names))
    assert [n for n in names if n.endswith("/update")] == ["ppo/update", "ppo:ppo/update"]
    assert "pretrain/step" in names
    started = Config(sft=SftConfig(init_from="a.safetensors"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert "pretrain" not in programs.stages(started, mesh)


def test_memory_of_a_program_that_runs_is_its_live_arrays_and_temporaries():
    """On CPU there is no peak to read: the state and batch that lie there, and the compiler's temporaries."""
    from instructax.plan.compiling import plan

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    program = next(programs.programs(TINY, mesh, ["pretrain/step"]))
    planned = plan(program, mesh, chips.cpu())

    def real(leaf):
        return jnp.zeros(leaf.shape, leaf.dtype)

    live = jax.tree.map(real, program.arguments)
    compiled = program.jitted.lower(*program.arguments).compile()
    measured = sum(x.nbytes for x in jax.tree.leaves(live))
    measured += compiled.memory_analysis().temp_size_in_bytes
    kinds = planned.memory.kinds
    assert planned.memory.total - kinds["code"] == pytest.approx(measured, rel=0.1)
    assert kinds["activations"] > 0 and kinds["optimizer"] == pytest.approx(
        2 * kinds["params"], rel=0.01
    )
    compiled_flops = planned.counted_once
    assert planned.cost is not None and planned.cost.flops > 0 and compiled_flops > 0


TEMPORARIES_ALONE = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(76.85G) exceeds available HBM (31.25G)."
)
WITH_ARGUMENTS = """\
RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.00G of 31.25G hbm. Exceeded hbm capacity by 8.75G.
  Largest program allocations in hbm:

  1. Size: 16.00G
     Shape: f32[8,16,2048,2048]{3,2,1,0:T(8,128)}
     Unpadded size: 16.00G
"""


@pytest.mark.parametrize(
    ("message", "temporaries"), [(TEMPORARIES_ALONE, 76.85), (WITH_ARGUMENTS, 40.0 - 3.0)]
)
def test_what_the_compiler_says_when_it_gives_up_is_read(message, temporaries):
    found = memory.refused(message, {"params": 3.0 * GIB}, {"frozen": 1.0 * GIB})
    assert found is not None
    assert found.kinds["activations"] == pytest.approx(temporaries * GIB)
    assert found.total == pytest.approx((temporaries + 4) * GIB)
    assert found.top(1) == f"activations {temporaries:.1f} GiB"
    if "Largest" in message:
        assert found.largest == ("f32[8,16,2048,2048] of 16.00G",)


def test_another_failure_of_the_compiler_is_not_taken_for_a_lack_of_memory():
    assert memory.refused("INTERNAL: something else", {}, {}) is None


def test_arms_are_planned_once_a_shape_and_with_their_own_numbers():
    arms = (
        Arm("ppo_ptx"),
        Arm("other_beta", (("kl_coef", 0.1),)),
        Arm("ptx_only", (("rl_coef", 0.0),)),
        Arm("short", (("episodes", 160),)),
    )
    config = replace(TINY, arms=arms)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    found = {p.name: p for p in programs.programs(config, mesh, ["ppo"]) if "/update" in p.name}
    assert list(found) == ["ppo/update", "ppo:ptx_only/update", "ppo:short/update"]
    whole, ptx_only, short = found.values()
    assert (whole.iterations, ptx_only.iterations, short.iterations) == (100, 100, 10)
    # No way back through the policy on episodes: of 3 forwards there, 1 is left. Half of the slots are responses'.
    tokens, width = 16 * 32 * config.ppo.inner_epochs, 32
    saved = 2 * model_flops.forward(MODEL, tokens, width, unembedded=tokens / 2)
    assert whole.model_flops - ptx_only.model_flops == pytest.approx(saved)


# The verb.


def test_a_plan_for_what_is_at_hand_end_to_end(file, capsys, tmp_path):
    argv = ["plan", "--config", file, "--only", "sft/step,ppo/", "--output", "plan.json"]
    assert main(argv) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "plan of tiny for local: 1 x cpu" in out
    for text in ("sft/step: fits", "ppo/update: fits", "MFU", "rollout copy", "PF/s-days"):
        assert text in out, text
    assert "programs fit; the largest is" in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["topology"] == "local" and plan["chips"] == 1
    update = plan["programs"]["ppo/update"]
    assert update["fits"] and update["bytes"]["params"] > 0
    # Two updates and two layers a turn: the text counted whole has more than the compiler's single count.
    assert update["hardware_flops_per_chip"] > 1.5 * update["compiler_flops_counted_once"]
    assert update["hardware_flops_per_chip"] > update["model_flops_per_chip"]
    phases = plan["ppo"][0]["seconds"]
    assert set(phases) == {"rollout copy", "prefill", "decode", "score", "update"}
    assert plan["ppo"][0]["total"] == pytest.approx(sum(phases.values()))
    assert plan["ppo"][0]["iterations"] == 100


def test_a_config_that_does_not_fit_is_exit_code_1_with_the_largest_parts(
    file, capsys, monkeypatch
):
    import dataclasses

    small = dataclasses.replace(chips.cpu(), hbm_bytes=2**18)
    monkeypatch.setattr(chips, "cpu", lambda: small)
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", file, "--only", "sft/step"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "sft/step: DOES NOT FIT" in out
    assert out.splitlines()[-1].startswith("1 of 1 programs do not fit: sft/step needs")
    assert "activations" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--topology"], "--topology: names no value; write --topology v5p:8x8x8"),
        (["--topology", "v5p:8"], "a slice of v5p has 3 sizes"),
        (["--only", "nothing"], "no program's name begins so; stages are pretrain, sft"),
        (["--mesh.fsdp", "3"], "mesh"),
        (["--output", "tiny.py/plan.json"], "--output tiny.py/plan.json: "),
        (["--output", "."], "--output .: cannot be written"),
    ],
)
def test_refusals_of_the_plan(more, says, file, capsys):
    assert main(["plan", "--config", file, *more]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_rows_that_the_mesh_does_not_divide_are_named(file):
    code = f"""
    import jax
    jax.config.update("jax_num_cpu_devices", 8)
    from instructax.__main__ import main
    raise SystemExit(main(["plan", "--config", {file!r}, "--only", "sft", "--sft.batch-size", "12"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "sft.batch_size = 12" in done.stderr and "8 data-parallel devices" in done.stderr


@pytest.mark.slow
def test_a_plan_for_a_tpu_that_is_not_there(file):
    apart.needs_libtpu()
    done = subprocess.run(
        [
            sys.executable, "-m", "instructax", "plan", "--config", file, "--topology", "v5p:2x2x1",
            "--only", "sft/step", "--mesh.fsdp", "2", "--mesh.model", "2", "--mesh.data", "1",
        ],
        capture_output=True, text=True, timeout=600, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 x v5p" in done.stdout and "compiler" in done.stdout
    assert "all-reduce" in done.stdout
    assert done.stderr == ""
