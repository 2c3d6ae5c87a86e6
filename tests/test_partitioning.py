"""Every parameter has exactly one rule, every rule a parameter, and mistakes name the path."""

from __future__ import annotations

import functools

import apart
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from instructax import partitioning
from instructax.config import ModelConfig
from instructax.models import functional
from instructax.models.layers import join_qkv

GPT = ModelConfig(num_layers=2, d_model=64, num_heads=4, vocab_size=300)
LLAMA = ModelConfig(
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=300,
    norm="rms",
    positions="rope",
    activation="swiglu",
    use_bias=False,
    qk_norm=True,
    tie_embeddings=False,
)
MESH = {"data": 1, "fsdp": 2, "model": 2}


def abstract(config: ModelConfig, head: str):
    return jax.eval_shape(lambda key: functional.init(key, config, head), jax.random.key(0))


def paths(tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return [partitioning.path_name(path) for path, _ in leaves]


def array(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_every_parameter_has_one_rule_and_every_rule_a_parameter():
    found = []
    for config, head in ((GPT, "lm"), (LLAMA, "lm"), (GPT, "scalar")):
        tree = abstract(config, head)
        partitioning.param_specs(tree, MESH)
        found += paths(tree)
        attn = jax.eval_shape(functools.partial(join_qkv, config=config), tree["blocks"]["attn"])
        copy = {"blocks": {"attn": attn}}  # of the rollout copy, before its layers part
        partitioning.param_specs(copy, MESH)
        found += paths(copy)
    for end, _ in partitioning.PARAMETERS:
        alone = [p for p in found if partitioning.re.search(rf"(?:^|/){end}$", p)]
        assert alone, f"no parameter of any model ends like {end}"


def test_logical_axes_of_the_rules_are_known_and_never_collide():
    for end, axes in partitioning.PARAMETERS:
        partitioning.spec(end, (4,) * len(axes), axes)
    for axes in partitioning.RULES.values():
        assert set(axes) <= set(partitioning.MESH_AXES)


def test_known_specs():
    specs = partitioning.param_specs(abstract(GPT, "lm"), MESH)
    assert specs["embed"]["token"] == P(("model", "fsdp"), None)
    assert specs["blocks"]["attn"]["q"]["kernel"] == P(None, "fsdp", "model", None)
    assert specs["blocks"]["mlp"]["down"]["kernel"] == P(None, "model", "fsdp")
    assert specs["final_norm"]["scale"] == P(None)


def test_parameters_may_be_shared_out_over_data_too():
    shape = {"data": 2, "fsdp": 2, "model": 2}
    rules = partitioning.PLACEMENTS["data+fsdp"]
    spread = partitioning.param_specs(abstract(LLAMA, "lm"), shape, rules)
    assert spread["embed"]["token"] == P(("model", "fsdp", "data"), None)
    assert spread["blocks"]["attn"]["k"]["kernel"] == P(None, ("fsdp", "data"), "model", None)
    for axes in rules.values():
        assert set(axes) <= set(partitioning.MESH_AXES)
    # Nothing but kernels and vocabulary lies elsewhere.
    usual = partitioning.param_specs(abstract(LLAMA, "lm"), shape)
    leaves = (jax.tree.leaves(t, is_leaf=lambda x: isinstance(x, P)) for t in (usual, spread))
    moved = {path for path, a, b in zip(paths(usual), *leaves, strict=True) if a != b}
    assert moved == {path for path in paths(usual) if path.endswith(("kernel", "embed/token"))}


def test_optimizer_moments_are_sharded_like_their_parameter():
    params = abstract(GPT, "scalar")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    specs = partitioning.param_specs(jax.eval_shape(optimizer.init, params), MESH)
    adam = specs[1][0]
    assert adam.mu == partitioning.param_specs(params, MESH) == adam.nu
    assert adam.count == P()


def test_scalars_are_replicated_and_typed_keys_too():
    tree = {"step": array(), "key": jax.eval_shape(lambda: jax.random.key(0))}
    assert partitioning.param_specs(tree) == {"step": P(), "key": P()}


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("embed/tokens", (4, 4), "embed/tokens: no rule"),
        ("old_embed/token", (4, 4), "old_embed/token: no rule"),
        ("embed/token", (4, 4, 4), "embed/token: shape .* rank 3"),
        ("embed/token", (6, 4), "embed/token: axis 'vocab' of size 6 is not divisible by 4"),
        ("blocks/attn/k/kernel", (2, 64, 3, 8), "k/kernel: axis 'kv_heads' of size 3"),
    ],
)
def test_refusals_name_the_path(path, shape, message):
    with pytest.raises(ValueError, match=message):
        partitioning.param_specs({path: array(*shape)}, MESH)


def test_two_claims_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="w: mesh axis 'model' is claimed by 'heads' and 'mlp'"):
        partitioning.spec("w", (4, 4), ("heads", "mlp"))


def test_unknown_logical_axis_is_refused():
    with pytest.raises(ValueError, match="w: unknown logical axis 'head'"):
        partitioning.spec("w", (4,), ("head",))


def test_a_block_has_the_axes_of_the_table_without_its_layers():
    assert partitioning.block_axes("mlp/down/kernel") == ("mlp", "d_model")
    with pytest.raises(ValueError, match="blocks/mlp/sideways/kernel: no rule of PARAMETERS"):
        partitioning.block_axes("mlp/sideways/kernel")


def test_what_is_gathered_is_whole_and_its_gradient_in_parts():
    """Nothing changes but where it lies, and without a mesh nothing at all."""
    x = jnp.arange(32.0).reshape(8, 4)
    assert partitioning.gathered(x, ("d_model", "mlp"), "d_model") is x
    mesh = jax.sharding.AbstractMesh((1, 4, 2), ("data", "fsdp", "model"))
    with jax.sharding.use_abstract_mesh(mesh):
        read = functools.partial(
            partitioning.gathered, logical_axes=("d_model", "mlp"), whole="d_model"
        )
        forward, backward = jax.make_jaxpr(lambda x: jax.vjp(read, x)[1](x))(x).eqns[-2:]
    assert forward.params["sharding"].spec == P(None, "model")
    assert backward.params["sharding"].spec == P("fsdp", "model")
    # Over data alone, where the parameters are.
    mesh = jax.sharding.AbstractMesh((4, 1, 2), ("data", "fsdp", "model"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert partitioning.gathered(x, ("d_model", "mlp"), "d_model") is x
        read = functools.partial(read, over="data+fsdp")
        forward, backward = jax.make_jaxpr(lambda x: jax.vjp(read, x)[1](x))(x).eqns[-2:]
    assert forward.params["sharding"].spec == P(None, "model")
    assert backward.params["sharding"].spec == P(("fsdp", "data"), "model")


def test_an_axis_of_size_one_stays_whole():
    assert partitioning.spec("k", (64, 1), ("d_model", "kv_heads"), MESH) == P("fsdp", None)


def test_the_stream_is_divided_by_slots_where_the_model_axis_divides_them():
    def pinned(length: int) -> str:
        x = jax.ShapeDtypeStruct((8, length, 2), "float32")
        return str(jax.make_jaxpr(partitioning.constrain_stream)(x))

    assert "sharding_constraint" not in pinned(6) and partitioning.parts("batch") == 1
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((2, 2, 4), partitioning.MESH_AXES)
    ):
        assert partitioning.parts("batch") == 4 and partitioning.parts("d_model") == 2
        assert "'model', None" in pinned(8)
        for length in (6, 1):
            assert "sharding_constraint" in pinned(length) and "'model'," not in pinned(length)


def test_constrain_does_nothing_without_a_mesh_and_pins_with_one():
    x = jnp.zeros((4, 3, 2))
    pinned = lambda x: partitioning.constrain(x, "batch", None, "heads")
    assert "sharding_constraint" not in str(jax.make_jaxpr(pinned)(x))
    mesh = jax.make_mesh((1, 1, 1), partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        assert "sharding_constraint" in str(jax.make_jaxpr(pinned)(x))
        assert jax.jit(pinned)(x).shape == x.shape
        with pytest.raises(ValueError, match="activation"):
            partitioning.constrain(x, "batch", None)


IN_PARTS = """
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from instructax.batches import Layout
from instructax.config import MeshConfig, ModelConfig
from instructax.models import functional as model
from instructax.plan import timing, topology
from instructax.plan.chips import CHIPS
from instructax.runtime.mesh import abstract_sharded, make_mesh
devices = topology.devices("v5p:2x2x1")
mesh = make_mesh(MeshConfig(1, 4, 1), devices)
config = ModelConfig(num_layers=2, d_model=512, num_heads=4, d_ff=2048, vocab_size=512, context_length=128,
                     compute_dtype="bfloat16", remat="block")
slots = jax.ShapeDtypeStruct((8, 128), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
layout = Layout(slots, slots, slots, slots, prefixed=False)
with jax.set_mesh(mesh):
    params = abstract_sharded(mesh, lambda: model.init(jax.random.key(0), config, "lm"))
    step = jax.jit(
        jax.grad(lambda p, layout: model.token_logprobs(p, config, layout).sum()),
        out_shardings=jax.tree.map(lambda p: p.sharding, params),
    )
    text = step.lower(params, layout).compile().as_text()
moved = timing.analyse(text, CHIPS["v5p"], [tuple(d.coords) for d in devices]).collectives
vector, table = 128 * 512, 512 * 512
# What is summed whole are vectors and the 128 positions, less than the smallest kernel. In bfloat16; the table of tokens
# is summed twice, where it embeds and where it gives logits.
assert moved["all-reduce"].payload < 2 * table, moved
divided = sum(p.size for p in jax.tree.leaves(params) if p.size > vector) + table
assert moved["reduce-scatter"].payload == 2 * divided, (moved, divided)
# Six kernels of two layers, forward and backward, though a block is computed again; and the table.
assert moved["all-gather"].count == 2 * 6 * 2 + 1, moved
print("passed")
"""


@pytest.mark.slow
def test_kernels_travel_once_a_pass_and_their_gradients_are_summed_into_parts_on_tpus():
    """The compiler, left alone, gathers q, k and v again for their gradients, and sums whole where d_model stands behind."""
    apart.needs_libtpu()
    apart.passes(IN_PARTS)
