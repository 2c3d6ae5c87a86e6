"""Where things lie while a token a row is decoded: the same logits on every mesh, and kernels that stay."""

from __future__ import annotations

import apart
import jax
import pytest

from instructax.partitioning import DECODING, RULES, decoding_rules


def test_axes_change_places_where_the_mesh_has_fsdp_and_divides_the_sizes():
    sizes = {"heads": 8, "kv_heads": 4, "d_model": 16, "mlp": 64}
    assert decoding_rules(**sizes) is RULES, "no mesh"
    for shape, is_other in (
        ((1, 4, 2), True),
        ((2, 4, 1), True),
        ((4, 1, 2), False),
        ((1, 8, 1), False),
    ):
        mesh = jax.sharding.AbstractMesh(shape, ("data", "fsdp", "model"))
        with jax.sharding.use_abstract_mesh(mesh):
            assert (decoding_rules(**sizes) is DECODING) == is_other, shape
            assert decoding_rules(**sizes | {"d_model": 15, "heads": 6}) is RULES, shape


MESHES = """
import dataclasses
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
import tiny
from instructax.config import MeshConfig
from instructax.models import functional as model
from instructax.partitioning import DECODING
from instructax.models import decoding
from instructax.runtime import mesh

token = jnp.asarray(tiny.tokens(4, 6))
mask = jnp.arange(6)[None] >= jnp.asarray([0, 2, 5, 1])[:, None]
following = jnp.asarray(tiny.tokens(3, 4, seed=1))
grouped = dataclasses.replace(
    tiny.MODEL, num_layers=2, num_heads=4, num_kv_heads=2, positions="rope", activation="swiglu",
    qk_norm=True, tie_embeddings=False, attention_pattern=("dense", "banded"), band_width=4,
)

def decoded(params, config, token, mask):
    copy = model.rollout_copy(params, config)
    logits, cache = model.prefill(copy, config, token, mask, 9)
    found = [logits]
    for next_B in following:
        logits, cache = model.decode(copy, config, next_B, cache)
        found.append(logits)
    return jnp.stack(found), copy["blocks"][0]["mlp"]["up"]["kernel"], cache.key[0].data

plain = dataclasses.replace(tiny.MODEL, num_heads=4)
spread = dataclasses.replace(plain, shard_over="data+fsdp")
CASES = {
    "few": {grouped: ((1, 2, 2),)},
    "many": {
        grouped: ((1, 4, 1), (2, 2, 1), (2, 1, 2)), plain: ((1, 4, 1), (1, 2, 2), (1, 1, 4)),
        spread: ((2, 2, 1), (4, 1, 1)),
    },
}
for config, shapes in CASES[sys.argv[1]].items():
    init = lambda: model.init(jax.random.key(0), config, "lm")
    run = jax.jit(decoded, static_argnums=1)
    expected, *_ = run(jax.jit(init)(), config, token, mask)
    for shape in shapes:
        made = mesh.make_mesh(MeshConfig(*shape))
        with jax.set_mesh(made):
            placed = mesh.put_batch(made, (np.asarray(token), np.asarray(mask)))
            found, kernel, key = run(mesh.init_sharded(made, init, over=config.shard_over), config, *placed)
            rows = 4 // (shape[0] * shape[1])
            np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=str(shape))
            assert key.sharding.shard_shape(key.shape)[0] == rows, (shape, key.sharding)
            wide = shape[1] > 1 and not config.kv_heads % shape[1]
            width = kernel.shape[1] // (shape[1] if wide else shape[2])
            assert kernel.sharding.shard_shape(kernel.shape)[1] == width, (shape, kernel.sharding)
print("passed")
"""


@pytest.mark.laws
@pytest.mark.parametrize("which", ["few", pytest.param("many", marks=pytest.mark.slow)])
def test_every_mesh_decodes_the_same(which):
    # Nearly all of its time is compilation.
    quick = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    said = apart.passes(MESHES, which, **quick)
    assert "rematerialization" not in said, "an array that the partitioner gathered whole"
