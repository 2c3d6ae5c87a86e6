"""The same run on any mesh and any number of processes: losses, gradients, texts, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import on_mesh
import pytest
import recipe

from instructax import resolve
from instructax.config import Config

TESTS = Path(__file__).parent
TOLERANCE = 1e-5
_starts = itertools.count()


def start(
    processes: int, devices: int, program: Sequence[str], changes: Sequence[Sequence[str]] = ()
) -> list[tuple[int, str]]:
    """(exit code, output) of each of the processes; ``changes`` are further arguments of each."""
    port = 20_000 + (os.getpid() * 7 + next(_starts) * 13) % 12_000
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        # Nearly all of their time is compilation.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "INSTRUCTAX_HEARTBEAT_SECONDS": "10",
        "JAX_COMPILATION_CACHE_DIR": str(TESTS.parent / ".cache" / "jax-processes"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    if processes > 1:
        environ |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
        }
    running = [
        subprocess.Popen(
            [sys.executable, *program, *(changes[index] if changes else ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ | ({"JAX_PROCESS_ID": str(index)} if processes > 1 else {}),
            text=True,
        )
        for index in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, out) for process, out in zip(running, outputs, strict=True)]


def computed(
    folder: Path,
    processes: int,
    devices: int,
    meshes: Sequence[Sequence[int]],
    states: Sequence[Path],
) -> list[dict[str, np.ndarray]]:
    """What ``on_mesh`` finds on each mesh, run as so many processes."""
    folder.mkdir()
    names = [on_mesh.name_of(shape) for shape in meshes]
    program = [str(TESTS / "on_mesh.py"), str(folder), *names, "--", *map(str, states)]
    for code, output in start(processes, devices, program):
        assert code == 0, output
    return [dict(np.load(folder / f"{name}.npz")) for name in names]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(folder, figures) of one device of one process."""
    folder = tmp_path_factory.mktemp("meshes") / "1x1"
    (found,) = computed(folder, 1, 1, [on_mesh.ONE], [])
    return folder, found


def assert_equal(found: dict[str, np.ndarray], one: dict[str, np.ndarray]) -> None:
    """Everything that ``one`` names within the tolerance; texts identical."""
    for name, value in one.items():
        if value.dtype.kind == "U":
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(
                found[name], value, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
            )


def assert_continued(found: dict[str, np.ndarray], one: dict[str, np.ndarray]) -> int:
    """Every second iteration from a state of another mesh is the undisturbed one; how many there were."""
    starts = {name.split("/")[0] for name in found if name.startswith("from ")}
    whole = {name: value for name, value in one.items() if name.startswith("ppo/second/")}
    assert whole
    for start_name in starts:
        prefix = f"{start_name}/second/"
        resumed = {
            name.replace(prefix, "ppo/second/"): value
            for name, value in found.items()
            if name.startswith(prefix)
        }
        assert_equal(resumed, whole)
    return len(starts)


def test_the_figures_are_of_something(one):
    """Gradients, clipping, two different texts: a comparison of zeros would prove nothing."""
    _, found = one
    assert len(set(found["texts/text"])) > 5
    assert np.abs(found["texts/kl"]).max() > 0.01
    assert found["ppo/first/metrics/objective/kl"] != 0
    assert found["ppo/first/metrics/ppo/policy/clipfrac"] > 0
    for name in ("sft", "reward"):
        assert found[f"{name}/metrics/0/grad_norm"] > on_mesh.RATE.max_grad_norm


CASES = [
    pytest.param(
        *layout,
        shape,
        id=f"{layout[0]}x{layout[1]}-{on_mesh.name_of(shape)}",
        marks=() if (layout, shape) == ((2, 4), (2, 2, 2)) else pytest.mark.slow,
    )
    for layout in ((1, 8), (2, 4), (4, 2))
    for shape in on_mesh.MESHES
]


@pytest.mark.parametrize("processes, devices, shape", CASES)
def test_a_mesh_computes_and_continues_what_one_device_does(
    processes, devices, shape, one, tmp_path
):
    folder, whole = one
    (found,) = computed(tmp_path / "many", processes, devices, [shape], [folder / "1,1,1"])
    assert_equal(found, whole)
    assert assert_continued(found, whole) == 1
    # And the other way round: what the processes saved goes on with one device.
    saved = tmp_path / "many" / on_mesh.name_of(shape)
    (back,) = computed(tmp_path / "again", 1, 1, [on_mesh.ONE], [saved])
    assert assert_continued(back, whole) == 1


@pytest.mark.slow
def test_a_state_goes_from_four_processes_to_two_of_another_mesh(one, tmp_path):
    _, whole = one
    computed(tmp_path / "four", 4, 2, [(1, 8, 1)], [])
    (found,) = computed(tmp_path / "two", 2, 4, [(2, 1, 4)], [tmp_path / "four" / "1,8,1"])
    assert assert_continued(found, whole) == 1


def test_processes_that_differ_refuse_on_both_with_one_line(tmp_path):
    program = ["-m", "instructax", "report", "--run-dir", str(tmp_path)]
    both = start(2, 1, program, [[], ["--seed", "7"]])
    for code, output in both:
        said = [line for line in output.splitlines() if line.startswith("instructax:")]
        assert code == 2 and len(said) == 1 and "Traceback" not in output, output
        assert "process 1 has seed = 7, not 0" in said[0]
    assert not list(tmp_path.iterdir())


def small(run_dir: Path) -> Config:
    """The miniature recipe with one arm, and Adam that makes no steps of rounding (see on_mesh)."""
    c = recipe.config(run_dir)

    def calm(section, *names: str):
        rates = {name: dataclasses.replace(getattr(section, name), eps=1e-3) for name in names}
        return dataclasses.replace(section, **rates)

    return dataclasses.replace(
        c,
        pretrain=calm(c.pretrain, "optimizer"),
        sft=calm(c.sft, "optimizer"),
        init=calm(c.init, "optimizer"),
        reward=calm(c.reward, "optimizer"),
        ppo=calm(c.ppo, "policy_optimizer", "value_optimizer"),
        arms=c.arms[:1],
        evaluate=dataclasses.replace(c.evaluate, policies=("sft", "init", "ppo_ptx"), best_of=2),
    )


def recipe_run(run_dir: Path, launcher: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """The run's folder after `instructax run` by a launcher."""
    file = run_dir.with_suffix(".py")
    plain = json.dumps(resolve.dump(small(run_dir)))
    file.write_text(
        "import json\nfrom instructax.resolve import from_dict\n"
        f"def config():\n    return from_dict(json.loads({plain!r}))\n"
    )
    launch, *options = launcher
    done = subprocess.run(
        [TESTS.parent / "launch" / launch, *options, "--", "run", "--config", file, *flags],
        env=os.environ
        | {
            "INSTRUCTAX": f"{sys.executable} -m instructax",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return run_dir / "mini"


def figures(path: Path) -> dict[str, np.ndarray]:
    """The numbers and texts of a JSON file, or of the rows of a .jsonl file, without the clocks."""
    plain = recipe.rows(path) if path.suffix == ".jsonl" else json.loads(path.read_text("utf-8"))
    clocks = ("time", "timing", "elapsed", "seconds", "peak_rss_bytes")
    named = ((jax.tree_util.keystr(p, simple=True, separator="/"), leaf)
             for p, leaf in jax.tree_util.tree_leaves_with_path(plain))  # fmt: skip
    return {n: np.asarray(leaf) for n, leaf in named if not set(n.split("/")) & set(clocks)}


@pytest.mark.slow
def test_a_whole_run_on_two_processes_is_the_run_of_one(tmp_path):
    """World, tokenizer, every stage, an arm of PPO and the evaluation, on (1, 2, 2) and on one device."""
    one = recipe_run(tmp_path / "one", ["local.sh", "--flags", "cpu"])
    many = recipe_run(
        tmp_path / "many",
        ["processes.sh", "2", "--devices", "2", "--max-restarts", "0", "--logs", tmp_path / "logs"],
        ["--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.model", "2"],
    )
    assert json.loads((many / "environment.json").read_text())["processes"] == 2
    written = {
        path.relative_to(one) for path in one.rglob("*.json*") if "checkpoints" not in path.parts
    }
    assert {Path("summary.json"), Path("spent.json"), Path("seed0/ppo_ptx/metrics.jsonl")} < written
    for path in sorted(written - {Path("spent.json")}):
        if path.parts[-2:-1] == ("data",):
            assert (many / path).read_bytes() == (one / path).read_bytes(), path
        elif path.name not in ("config.json", "environment.json"):
            assert_equal(figures(many / path), figures(one / path))
    assert (many / "tokenizer.model").read_bytes() == (one / "tokenizer.model").read_bytes()
    assert (many / "report.html").is_file()
    for stage, items in (
        ("pretrain", ("params", "optimizer")),
        ("sft", ("params", "optimizer")),
        ("reward", ("params", "optimizer")),
        ("init", ("params", "optimizer")),
        ("ppo_ptx", ("params", "ema", "value", "rest")),
    ):
        found, whole = (recipe.saved(run / "seed0" / stage, items) for run in (many, one))
        assert_equal(found, whole)
    said = (tmp_path / "logs" / "process-1.log").read_text()
    # Gloo's ranks, several to a process, write at once: one's line may stand in the middle of another's.
    assert not [line for line in said.splitlines() if not re.search("Gloo|peer ranks", line)], said


def worker_pids(launcher: int) -> list[int]:
    """The processes of instructax that a launcher has running."""
    parent: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            after_name = path.read_text().rpartition(")")[2].split()
            parent[int(path.parent.name)] = int(after_name[1])

    def is_below(pid: int) -> bool:
        while pid in parent and pid != launcher:
            pid = parent[pid]
        return pid == launcher

    def is_python(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return b"instructax\0ppo" in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

    return sorted(pid for pid in parent if is_below(pid) and is_python(pid))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_of_one_of_two_processes(mini_run, tmp_path):
    """At random moments, from start-up on; the launcher starts both again, and the end is the same."""
    kills, iterations = 20, 60
    c = recipe.of_seed(recipe.config(mini_run.parent))
    ppo = dataclasses.replace(c.ppo, episodes=iterations * c.ppo.batch_size, inner_epochs=2)
    c = dataclasses.replace(c, ppo=ppo, mesh=dataclasses.replace(c.mesh, fsdp=2))

    def launched(name: str) -> subprocess.Popen:
        own = dataclasses.replace(c, name=f"{c.name}-{name}")
        file = tmp_path / f"{name}.py"
        plain = json.dumps(resolve.dump(own))
        file.write_text(
            "import json\nfrom instructax.resolve import from_dict\n"
            f"def config():\n    return from_dict(json.loads({plain!r}))\n"
        )
        if not (folder_of(name) / "init").exists():
            for stage in ("init", "reward", "data"):
                source = mini_run / "data" if stage == "data" else mini_run / "seed0" / stage
                shutil.copytree(source, folder_of(name) / stage)
        log = (tmp_path / f"{name}.log").open("w")
        return subprocess.Popen(
            [
                *(TESTS.parent / "launch/processes.sh", "2", "--max-restarts", str(2 * kills)),
                *("--logs", tmp_path / f"{name}-logs", "--", "ppo", "--config", file),
            ],
            env=os.environ | {"INSTRUCTAX": f"{sys.executable} -m instructax"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def folder_of(name: str) -> Path:
        return mini_run / f"seed0-{name}"

    def rows(name: str) -> int:
        path = folder_of(name) / "ppo/metrics.jsonl"
        return path.read_text("utf-8").count("\n") if path.is_file() else 0

    undisturbed = launched("undisturbed")
    assert undisturbed.wait(timeout=900) == 0, (tmp_path / "undisturbed.log").read_text()
    rng = random.Random(2024)
    disturbed = launched("disturbed")
    hit: list[int] = []
    while len(hit) < kills and disturbed.poll() is None:
        before, wanted = rows("disturbed"), rng.randint(0, 3)
        end = time.monotonic() + 60
        while rows("disturbed") < before + wanted and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.random() * (0.3 if wanted else 8.0))
        if len(pids := worker_pids(disturbed.pid)) == 2:
            os.kill(rng.choice(pids), signal.SIGKILL)
            hit.append(rows("disturbed"))
            while set(pids) & set(worker_pids(disturbed.pid)) and disturbed.poll() is None:
                time.sleep(0.1)
    assert disturbed.wait(timeout=900) == 0, (tmp_path / "disturbed.log").read_text()
    said = (tmp_path / "disturbed.log").read_text()
    print("killed after rows", hit, "; restarts", said.count(": restart "))
    assert len(hit) == kills and 0 < max(hit) and len(set(hit)) > 5
    items = ("params", "ema", "value", "rest")
    ends = [recipe.saved(folder_of(name) / "ppo", items) for name in ("disturbed", "undisturbed")]
    recipe.assert_same(*ends)
    first, second = (
        figures(folder_of(name) / "ppo/metrics.jsonl") for name in ("disturbed", "undisturbed")
    )
    assert first.keys() == second.keys() and len(first) > iterations
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)
