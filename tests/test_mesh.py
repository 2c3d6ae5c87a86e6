"""The mesh is what was asked for, batches and states lie on it whole, on 1 device and on 8."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from instructax.batches import padded_layout
from instructax.config import MeshConfig, UserError
from instructax.runtime import distributed, mesh
from instructax.steps import state


def init(key):
    params = {"embed": {"token": jax.random.normal(key, (16, 8))}}
    return state.create(params, optax.adam(1e-3))


def test_one_device_gives_the_trivial_mesh_with_auto_axes():
    made = mesh.make_mesh(MeshConfig(), jax.devices()[:1])
    assert dict(made.shape) == {"data": 1, "fsdp": 1, "model": 1}
    assert set(made.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3, fsdp=1, model=1), "needs 3 devices, 1 are present"),
        (MeshConfig(data=-1, fsdp=2), "2 does not divide the 1 devices"),
        (MeshConfig(data=-1, fsdp=-1), "at most one may be -1"),
        (MeshConfig(data=0), "must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        mesh.make_mesh(config, jax.devices()[:1])


def described(sizes: tuple[int, int, int], slices: int = 1) -> list[SimpleNamespace]:
    """Chips of TPU slices, as far as their places in a mesh depend on them."""
    places = itertools.product(range(slices), *map(range, sizes))
    return [
        SimpleNamespace(
            platform="tpu", device_kind="TPU v5p", core_on_chip=0, id=i, slice_index=number, coords=tuple(at)
        )
        for i, (number, *at) in enumerate(places)
    ]  # fmt: skip


def test_a_mesh_may_split_an_axis_of_a_slice_and_keeps_neighbours_together():
    laid = mesh.arrange((128, 4, 1), described((8, 8, 8)))
    assert laid.shape == (128, 4, 1) and len({device.id for device in laid.flat}) == 512
    for group in laid[:, :, 0]:
        coords = np.asarray([device.coords for device in group])
        assert sorted(np.ptp(coords, axis=0)) == [0, 0, 3], coords


def test_only_data_lies_between_slices():
    two = described((2, 2, 2), slices=2)
    laid = mesh.arrange((4, 4, 1), two)
    assert [{device.slice_index for device in rows.flat} for rows in laid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"mesh.data = 1: the devices are 2 slices.*multiple of 2"):
        mesh.arrange((1, 16, 1), two)


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_nodes_follow_each_other(platform):
    """JAX calls every node of GPUs a slice; a mesh axis may span them all the same."""
    nodes = [
        SimpleNamespace(platform=platform, device_kind=platform, id=i, slice_index=i // 4)
        for i in range(8)
    ]
    laid = mesh.arrange((1, 8, 1), nodes)
    assert [device.id for device in laid.flat] == list(range(8))


def test_put_batch_keeps_values_and_structure():
    made = mesh.make_mesh(MeshConfig(), jax.devices()[:1])
    token = np.arange(12, dtype=np.int32).reshape(4, 3)
    layout = jax.device_get(padded_layout(token, np.ones((4, 3), bool)))
    placed = mesh.put_batch(made, {"layout": layout, "scale": np.float32(2)})
    assert jax.tree.all(jax.tree.map(np.array_equal, placed["layout"], layout))
    assert placed["layout"].token_BxL.sharding == mesh.batch_sharding(made)
    assert placed["scale"].sharding.spec == P()


def test_init_sharded_equals_init():
    made = mesh.make_mesh(MeshConfig(), jax.devices()[:1])
    key = jax.random.key(0)
    born, plain = mesh.init_sharded(made, init, key), jax.jit(init)(key)
    assert jax.tree.all(jax.tree.map(np.array_equal, born, plain))
    abstract = mesh.abstract_sharded(made, init, key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), born
    )


def test_networks_of_one_state_may_lie_on_different_axes():
    abstract = jax.eval_shape(init, jax.random.key(0))
    scalar = jax.ShapeDtypeStruct((), np.float32)
    ppo = state.PpoState(abstract, abstract, abstract.params, scalar, scalar)
    made = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "model"))
    placed = mesh.shardings(made, ppo, state.by_network("fsdp", "data+fsdp"))
    parts = jax.tree.map(lambda s: s.shard_shape((16, 8))[0], {
        "policy": placed.policy.params, "ema": placed.ema, "value": placed.value.params,
        "moments": placed.value.opt_state[0].mu,
    })  # fmt: skip
    found = {name: tree["embed"]["token"] for name, tree in parts.items()}
    assert found == {"policy": 4, "ema": 4, "value": 2, "moments": 2}
    assert placed.kl_coef.spec == placed.value.step.spec == P()
    assert mesh.shardings(made, ppo) == mesh.shardings(made, ppo, state.by_network("fsdp", "fsdp"))


def test_what_is_parked_comes_back_to_where_it_was():
    made = mesh.make_mesh(MeshConfig(), jax.devices()[:1])
    tree = mesh.init_sharded(made, init, jax.random.key(0)).params
    kept = jax.tree.map(np.asarray, tree)
    placed = jax.tree.map(lambda x: x.sharding, tree)
    back = mesh.parked("ppo.frozen_memory", tree)
    jax.tree.map(lambda x: x.delete(), tree)
    for _ in range(2):
        found = back()
        assert jax.tree.map(lambda x: x.sharding, found) == placed
        assert jax.tree.all(jax.tree.map(np.array_equal, found, kept))
        jax.tree.map(lambda x: x.delete(), found)


def test_a_platform_without_pinned_memory_is_named():
    class Nowhere:
        def with_memory_kind(self, kind):
            raise ValueError(kind)

    class Placed:
        sharding = Nowhere()

    with pytest.raises(UserError, match="frozen_memory = host: cpu devices have no pinned"):
        mesh.parked("ppo.frozen_memory", [Placed()])


def run_python(code: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


EIGHT = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import sys, tempfile
import numpy as np
import optax
import pytest
from instructax.config import MeshConfig, UserError
from instructax.runtime import checkpoint, mesh
from instructax.steps import state

def init(key):
    params = {
        "embed": {"token": jax.random.normal(key, (16, 8))},
        "blocks": {"mlp": {"up": {"kernel": jax.random.normal(key, (2, 8, 4))}}},
    }
    return state.create(params, optax.adam(1e-3))

key = jax.random.key(0)
cube = mesh.make_mesh(MeshConfig(data=-1, fsdp=2, model=2))
assert dict(cube.shape) == {"data": 2, "fsdp": 2, "model": 2}
born = mesh.init_sharded(cube, init, key)
one = mesh.make_mesh(MeshConfig(), jax.devices()[:1])
plain = mesh.init_sharded(one, init, key)
assert jax.tree.all(jax.tree.map(np.array_equal, born, plain)), "init depends on the mesh"
for leaf in (born.params["embed"]["token"], born.opt_state[0].mu["embed"]["token"]):
    assert leaf.addressable_shards[0].data.size * 4 == leaf.size

rows = np.arange(24).reshape(8, 3).astype(np.int32)
placed = mesh.put_batch(cube, rows)
assert np.array_equal(placed, rows)
assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
with pytest.raises(UserError, match="6 rows"):
    mesh.put_batch(cube, rows[:6])

# A checkpoint of eight devices continues on one, and the other way round.
with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save(1, {"state": born}, {})
    checkpoints.save(2, {"state": plain}, {})
    down = checkpoints.restore(1, "state", mesh.abstract_sharded(one, init, key))
    up = checkpoints.restore(2, "state", mesh.abstract_sharded(cube, init, key))
    assert jax.tree.all(jax.tree.map(np.array_equal, born, down))
    assert jax.tree.all(jax.tree.map(np.array_equal, born, up))
    assert up.params["embed"]["token"].sharding == born.params["embed"]["token"].sharding
print("passed")
"""


def test_eight_devices_hold_what_one_holds():
    process = run_python(EIGHT)
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "passed" in output, output


# The model axis spans both processes, so each must supply all rows, not its half of them.
TWO_PROCESSES = """
import os, pathlib, signal, sys, time
from unittest import mock
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
import pytest
from jax.experimental import multihost_utils
from instructax.config import Config, PpoConfig, UserError
from instructax.runtime import checkpoint, distributed, loop, mesh, metrics, stopping
from jax.sharding import Mesh, AxisType

distributed.initialize_if_needed()
index = jax.process_index()
assert jax.process_count() == 2 and distributed.is_main() == (index == 0)
distributed.agree("words", "the same")
with pytest.raises(UserError, match=r"processes \\[1\\] differ"):
    distributed.agree("words", f"not the same {index}")

distributed.join(Config())
with pytest.raises(UserError, match=r"process 1 has seed = 1, not 0, ppo.kl_coef = 0.5, not 0.02"):
    distributed.join(Config(seed=index, ppo=PpoConfig(kl_coef=(0.02, 0.5)[index])))
with mock.patch.object(distributed, "code_version", lambda: f"0.1 {index}"):
    with pytest.raises(UserError, match=r"process 1 has other code, 0.1 1\\)"):
        distributed.join(Config())

def refuse():
    raise UserError("no room")

long = {"of": index, "text": "é" * 5000}
assert distributed.on_main(lambda: long) == long | {"of": 0}
assert distributed.on_main(lambda: [index, distributed.on_main(lambda: index)]) == [0, 0]
with pytest.raises(UserError, match="no room"):
    distributed.on_main(refuse)
with pytest.raises(ZeroDivisionError if index == 0 else RuntimeError, match="division"):
    distributed.on_main(lambda: 1 / 0)

here = pathlib.Path(sys.argv[1] + f"-of-{index}")
distributed.on_main(here.mkdir)
distributed._VISIBLE_SECONDS = 0.3
with pytest.raises(UserError, match=r"processes \\[1\\] do not see"):
    distributed.all_see(here.parent, here.name)
distributed.all_see(here.parent, sys.argv[1].rpartition("/")[2] + "-of-0")

rows = np.arange(12, dtype=np.int32).reshape(4, 3)
for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
    devices = np.array(jax.devices())[order].reshape(2, 1, 2)
    made = Mesh(devices, ("data", "fsdp", "model"), axis_types=(AxisType.Auto,) * 3)
    placed = mesh.put_batch(made, rows)
    assert np.array_equal(multihost_utils.process_allgather(placed, tiled=True), rows)

folder = sys.argv[1]
with checkpoint.Checkpoints(folder, keep_latest=1) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, {"params": {"w": placed}}, {"step": step})
    sharding = mesh.batch_sharding(made)
    abstract = {"w": jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=sharding)}
    back = checkpoints.restore(3, "params", abstract)
    assert checkpoints.meta(3) == {"step": 3}
    assert np.array_equal(multihost_utils.process_allgather(back["w"], tiled=True), rows)
assert checkpoints.steps() == [3]

whole = mesh.to_host({"w": placed, "host": rows, "one": back["w"].sum()})
assert np.array_equal(whole["w"], rows) and whole["one"] == rows.sum()

def run(step, total):
    with stopping.StopSignal() as stop, metrics.MetricsWriter(folder + "-run") as writer:
        loop.run_steps(name="sft", start=0, total=total, step=step, save=saved.append,
                       save_at=lambda done: done % (1000) == 0, writer=writer, show=(), stop=stop)

# SIGTERM reaches one process in its second stage; both save the same step and leave.
saved = []
run(lambda i: {"loss": 0.0}, 30)
saved.clear()
def step(i):
    if i == 2 and index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.02)
    return {"loss": 0.0}

with pytest.raises(SystemExit) as leave:
    run(step, 1000)
assert leave.value.code == 143 and len(saved) == 1 and 2 < saved[0] < 1000
gathered = multihost_utils.process_allgather(np.array(saved))
assert (gathered == saved[0]).all(), gathered
print("passed")
"""


# SIGTERM reaches one process outside of any loop, while both sample or evaluate.
OUTSIDE_OF_LOOPS = """
import os, signal, time
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
import pytest
from jax.experimental import multihost_utils
from instructax.runtime import distributed, stopping

distributed.initialize_if_needed()
with pytest.raises(SystemExit) as left, stopping.leaving_on_sigterm():
    for batch in range(1000):
        if batch == 3 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        stopping.leave_if_stopped()
assert left.value.code == 143 and 3 <= batch < 999
assert len(set(multihost_utils.process_allgather(np.array(batch)).tolist())) == 1
print("passed")
"""


@pytest.mark.parametrize(
    "program", [TWO_PROCESSES, OUTSIDE_OF_LOOPS], ids=["in a loop", "outside of loops"]
)
def test_two_processes_agree_share_batches_and_checkpoints_and_stop_together(
    program, tmp_path, monkeypatch
):
    port = 20_000 + (os.getpid() * 3 + len(program)) % 20_000
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    processes = []
    for index in range(2):
        monkeypatch.setenv("JAX_PROCESS_ID", str(index))
        processes.append(run_python(program, str(tmp_path / "checkpoints")))
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "passed" in output, output


def test_one_process_needs_no_initialization(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize_if_needed()
    distributed.agree("words", "alone")
    assert distributed.is_main() and not jax.distributed.is_initialized()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID not set"):
        distributed.initialize_if_needed()
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES not set"):
        distributed.initialize_if_needed()
