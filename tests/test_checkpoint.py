"""A checkpoint is whole or is none, and comes back as it was."""

from __future__ import annotations

import gc
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructax.config import UserError
from instructax.runtime.checkpoint import Checkpoints, load_item, load_meta
from instructax.steps import state


def make(seed=0, dtype=jnp.float32):
    key = jax.random.key(seed)
    params = {"a": {"kernel": jax.random.normal(key, (8, 4), dtype)}, "b": jnp.zeros(3)}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3, mu_dtype=jnp.bfloat16))
    train = state.create(params, optimizer)
    train = state.apply_gradients(train, jax.tree.map(jnp.ones_like, params), optimizer)
    return {"train": train, "key": key, "keys": jax.random.split(key, 3), "beta": jnp.float32(0.1)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b) -> bool:
    def equal(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return x.dtype == y.dtype and np.array_equal(x, y)

    assert str(jax.tree.structure(a)) == str(jax.tree.structure(b))
    return jax.tree.all(jax.tree.map(equal, a, b))


@pytest.fixture(scope="module")
def tree():
    return make()


@pytest.fixture
def saved(tmp_path, tree):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, {"state": tree, "params": tree["train"].params}, {"tokenizer": "abc"})
    return folder


def test_states_with_typed_keys_and_bf16_moments_round_trip(saved, tree):
    assert same(load_item(saved, "state", abstract(tree)), tree)
    assert jax.tree.leaves(tree["train"].opt_state[1][0].mu)[0].dtype == jnp.bfloat16


def test_a_later_stage_reads_parameters_and_meta_alone(saved, tree):
    shutil.rmtree(saved / "3" / "state")
    params = tree["train"].params
    assert same(load_item(saved, "params", abstract(params), step=3), params)
    assert load_meta(saved) == {"tokenizer": "abc"}


def test_the_caller_may_donate_what_it_saved(tmp_path):
    params = {"w": jnp.arange(1 << 16, dtype=jnp.float32)}
    move = jax.jit(lambda p: jax.tree.map(lambda w: w * 0 - 1, p), donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep_all=True) as checkpoints:
        target = abstract(params)
        for step in range(4):
            params = {"w": jnp.arange(1 << 16, dtype=jnp.float32) + step}
            checkpoints.save(step, {"params": params}, {})
            params = move(move(params))
        for step in range(4):
            back = checkpoints.restore(step, "params", target)["w"]
            assert np.array_equal(back, np.arange(1 << 16, dtype=np.float32) + step)


def test_the_newest_are_kept(tmp_path):
    items = {"params": {"w": jnp.ones(2)}}
    for keep_all, expected in ((False, [4, 5]), (True, [1, 2, 3, 4, 5])):
        with Checkpoints(tmp_path / str(keep_all), keep_all=keep_all) as checkpoints:
            for step in (1, 2, 3, 4, 5):
                checkpoints.save(step, items, {"step": step})
            checkpoints.wait()
            assert checkpoints.steps() == expected and checkpoints.latest() == 5
            assert checkpoints.meta(5) == {"step": 5}


def test_a_step_is_saved_once_and_steps_only_grow(tmp_path):
    items = {"params": {"w": jnp.ones(2)}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, items, {})
        for step in (5, 4):
            with pytest.raises(ValueError, match=f"step {step} is not newer than step 5"):
                checkpoints.save(step, items, {})
        with pytest.raises(ValueError, match="meta"):
            checkpoints.save(6, {"meta": {}}, {})
        with pytest.raises(TypeError):
            checkpoints.save(6, items, {"x": object()})
        assert checkpoints.steps() == [5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p | {"b": p["b"].astype(jnp.bfloat16)},
            "b has dtype float32, expected bfloat",
        ),
        (lambda p: p | {"b": p["b"].astype(jnp.int32)}, "b has dtype float32, expected int32"),
        (lambda p: {**p, "a": {"kernel": p["a"]["kernel"].T}}, r"a/kernel has shape \(8, 4\)"),
        (lambda p: p | {"c": p["b"]}, "lacks c"),
        (lambda p: {"b": p["b"]}, "also holds a/kernel"),
    ],
)
def test_another_dtype_shape_or_structure_is_refused_by_path(saved, tree, change, message):
    with pytest.raises(UserError, match=message):
        load_item(saved, "params", abstract(change(tree["train"].params)))


def test_an_abstract_tree_needs_shardings(saved):
    with pytest.raises(ValueError, match="'b' has no sharding"):
        load_item(saved, "params", {"b": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_folders_that_hold_no_checkpoint_are_refused_in_one_line(tmp_path, saved, tree):
    target = abstract(tree["train"].params)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign" / "100").mkdir(parents=True)
    (tmp_path / "foreign" / "100" / "model.bin").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    for name in ("nowhere", "empty", "foreign", "file"):
        with pytest.raises(UserError, match=name) as refused:
            load_item(tmp_path / name, "params", target)
        assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match=name):
            load_meta(tmp_path / name)
    with pytest.raises(UserError, match="file is not a folder"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(UserError, match=r"no complete step 4, only \[3\]"):
        load_item(saved, "params", target, step=4)
    with pytest.raises(UserError, match=r"holds no 'ema', only \['meta', 'params', 'state'\]"):
        load_item(saved, "ema", target)


# A refused restore abandons orbax's reads of the other arrays.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files_are_refused_or_do_not_matter(saved, tmp_path, tree):
    """Each file of a step, cut in half, emptied or removed: refused in one line, or no harm."""
    params = tree["train"].params
    files = [
        path.relative_to(saved)
        for path in (saved / "3" / "params").rglob("*")
        if path.is_file() and path.name != "commit_success.txt"
    ]
    refused = 0
    for number, path in enumerate(files):
        for damage in ("half", "empty", "gone"):
            copy = tmp_path / f"{number}{damage}"
            shutil.copytree(saved, copy)
            content = (copy / path).read_bytes()
            if damage == "gone":
                (copy / path).unlink()
            else:
                kept = len(content) // 2 if damage == "half" else 0
                (copy / path).write_bytes(content[:kept])
            try:
                assert same(load_item(copy, "params", abstract(params)), params), (path, damage)
            except UserError as error:
                assert "\n" not in str(error) and str(copy) in str(error)
                refused += 1
    gc.collect()  # so that the abandoned reads complain here, where they are expected
    assert refused > len(files)
    (saved / "3" / "meta" / "metadata").write_text('{"tok')
    with pytest.raises(UserError, match="damaged"):
        load_meta(saved)


def test_an_interrupted_step_is_no_step_and_is_saved_anew(saved, tree):
    params = tree["train"].params
    shutil.copytree(saved / "3", saved / "7")
    (saved / "7" / "commit_success.txt").unlink()
    (saved / "8").mkdir()
    assert load_item(saved, "params", abstract(params)) is not None
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [3]
        checkpoints.save(7, {"params": jax.tree.map(lambda x: x + 1, params)}, {})
        back = checkpoints.restore(7, "params", abstract(params))
        assert same(back, jax.tree.map(lambda x: x + 1, params))


SAVER = """
import sys
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
from instructax.runtime.checkpoint import Checkpoints

folder = sys.argv[1]
trees = jax.jit(lambda step: {f"w{i}": jnp.full((100, 100), step) for i in range(20)})
with Checkpoints(folder) as checkpoints:
    step = checkpoints.latest() or 0
    if step:
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trees(0.0))
        back = checkpoints.restore(step, "params", target)
        assert all(bool((leaf == step).all()) for leaf in back.values()), "a mixture of steps"
        assert checkpoints.meta(step) == {"step": step}
    print("ready", step, flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"params": trees(float(step)), "ema": trees(float(step))},
                         {"step": step})
        print("saved", step, flush=True)
"""


def kill_repeatedly(folder, times: int, seed: int) -> None:
    draw, newest = random.Random(seed), 0
    for _ in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVER), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            word, _, step = process.stdout.readline().partition(" ")
            assert word == "ready", "the saver did not come up on what the kill had left"
            assert int(step) >= newest
            last = int(step) + 3
            for line in process.stdout:
                if line == f"saved {last}\n":
                    break
            time.sleep(draw.uniform(0, 0.3))
        finally:
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate()
        # A step is whole, at the latest, when the save of the next one has returned.
        said = [line for line in output.splitlines(keepends=True) if line.endswith("\n")]
        newest = (int(said[-1].split()[1]) if said else last) - 1
        steps = sorted(int(path.parent.name) for path in folder.glob("*/commit_success.txt"))
        assert steps[-1] >= newest
        assert [load_meta(folder, step) for step in steps] == [{"step": step} for step in steps]


def test_kill_during_saves_leaves_the_previous_step(tmp_path):
    kill_repeatedly(tmp_path / "c", times=3, seed=0)


@pytest.mark.slow
def test_many_kills_during_saves(tmp_path):
    kill_repeatedly(tmp_path / "c", times=20, seed=1)
