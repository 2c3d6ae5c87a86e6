"""A run that is stopped or killed ends as if nothing had happened, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe

from instructax import resolve
from instructax.runtime.stopping import StopSignal
from instructax.stages import ppo, pretrain, reward, sft
from instructax.stages.context import run_folder

ITEMS = ("params", "ema", "value", "rest")
ITERATIONS = 12

PROGRAM = """
import sys, pathlib, jax
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from instructax import resolve
from instructax.stages import ppo
import json
config = resolve.from_dict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
print("begun", flush=True)
ppo.run(config, sys.argv[3])
"""


@pytest.fixture(scope="module")
def config(mini_run):
    """PPO-ptx with everything that has a state: adaptive beta, average, inner epochs, a schedule."""
    c = recipe.of_seed(recipe.config(mini_run.parent))
    changes = dataclasses.replace(
        c.ppo,
        episodes=ITERATIONS * c.ppo.batch_size,
        inner_epochs=2,
        kl_controller="adaptive",
        kl_target=0.5,
        kl_horizon=100,
        sample_every=3,
    )
    return dataclasses.replace(c, ppo=changes)


@pytest.fixture(scope="module")
def said(config):
    """What the run that nobody disturbed printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        ppo.run(config, "whole")
    return out.getvalue()


@pytest.fixture(scope="module")
def whole(config, said):
    """The folder of that run."""
    folder = run_folder(config) / "whole"
    betas = {row["objective/kl_coef"] for row in recipe.iterations(folder)}
    assert len(betas) > 3, "beta must have moved"
    return folder


def test_every_program_is_named_once_when_it_first_runs(said):
    named = [line for line in said.splitlines() if "new program" in line]
    assert len(named) == len(set(named))
    kinds = {line.removeprefix("whole: new program, ").split()[0] for line in named}
    assert kinds == {"sampling,", "scoring", "updates"}


class Process:
    """PPO in a process of its own, to be killed."""

    def __init__(self, config, arm: str, folder: Path):
        self.metrics = run_folder(config) / arm / "metrics.jsonl"
        file = folder / "config.json"
        file.write_text(json.dumps(resolve.dump(config)), "utf-8")
        cache = Path(__file__).parent.parent / ".cache" / "jax-resume"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(file), str(cache), arm],
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr.txt").open("a"),
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == "begun"

    def rows(self) -> int:
        return self.metrics.read_text("utf-8").count("\n") if self.metrics.is_file() else 0

    def wait_for_row(self, row: int) -> None:
        """Return when that row is written, or the process has ended."""
        while self.process.poll() is None and self.rows() < row:
            time.sleep(0.002)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.finish()

    def finish(self) -> int:
        self.process.communicate(timeout=300)  # reads on: a closed pipe would break its prints
        return self.process.returncode


def assert_as_undisturbed(folder: Path, whole: Path) -> None:
    recipe.assert_same(recipe.saved(folder, ITEMS), recipe.saved(whole, ITEMS))
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_clocks(folder / name) == without_clocks(whole / name)


def without_clocks(path: Path) -> list[dict]:
    clocks = ("time", "elapsed/", "timing/")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in recipe.rows(path)]


def kill(config, whole: Path, arm: str, scratch: Path, rng: random.Random, kills: int) -> list[int]:
    """Kill runs at random moments, resume each until it ends, compare; rows written at each kill."""
    hit: list[int] = []
    folder = run_folder(config) / arm
    while len(hit) < kills:
        for _ in range(min(4, kills - len(hit))):
            process = Process(config, arm, scratch)
            # From inside start-up (no row more) to several iterations on; each saves a checkpoint.
            row = process.rows() + rng.randint(0, 3)
            process.wait_for_row(row)
            time.sleep(rng.random() * (0.2 if row else 4.0))
            if process.end(signal.SIGKILL) != -signal.SIGKILL:
                break  # it was faster
            hit.append(process.rows())
        assert Process(config, arm, scratch).finish() == 0
        assert_as_undisturbed(folder, whole)
        shutil.rmtree(folder)
    assert max(hit) > 0, "no kill came after start-up"
    return hit


def test_a_run_killed_twice_is_bit_identical(config, whole, tmp_path):
    kill(config, whole, "killed", tmp_path, random.Random(5), kills=2)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(config, whole, tmp_path):
    print(
        "killed after rows", kill(config, whole, "soaked", tmp_path, random.Random(2024), kills=20)
    )


def test_sigterm_saves_at_the_step_and_the_next_start_goes_on(config, whole, tmp_path):
    process = Process(config, "terminated", tmp_path)
    process.wait_for_row(2)
    assert process.end(signal.SIGTERM) == 128 + signal.SIGTERM
    folder = run_folder(config) / "terminated"
    done = int(recipe.saved(folder, ())["step"])
    assert done == len(recipe.iterations(folder)) < ITERATIONS
    assert "all saved" in (tmp_path / "stderr.txt").read_text()
    assert Process(config, "terminated", tmp_path).finish() == 0
    assert_as_undisturbed(folder, whole)


def stop_before(monkeypatch, step: int) -> None:
    """As if SIGTERM had come while ``step`` ran."""

    def requested(self, done):
        if done == step:
            self.signal = signal.SIGTERM
        return self.signal is not None

    monkeypatch.setattr(StopSignal, "requested", requested)


def stopped_and_resumed(monkeypatch, run, step: int) -> None:
    with monkeypatch.context() as patched:
        stop_before(patched, step)
        with pytest.raises(SystemExit) as stopped:
            run()
        assert stopped.value.code == 128 + signal.SIGTERM
    run()


def test_ppo_stopped_in_process(config, whole, monkeypatch):
    stopped_and_resumed(monkeypatch, lambda: ppo.run(config, "stopped"), 3)
    assert_as_undisturbed(run_folder(config) / "stopped", whole)


@pytest.fixture(scope="module")
def elsewhere(mini_run):
    """The recipe's config for a second run beside the first, on the same data and weights."""
    c = recipe.of_seed(recipe.config(mini_run.parent))
    first = run_folder(c)
    second = dataclasses.replace(
        c,
        name="mini/elsewhere",
        sft=dataclasses.replace(c.sft, init_from=str(first / "pretrain")),
        reward=dataclasses.replace(c.reward, init_from=str(mini_run / "chosen_by_loss")),
    )
    shutil.copytree(first / "data", run_folder(second) / "data")
    # The reward model began from the epoch chosen by loss; later the reward model chose anew.
    shutil.copytree(first / "sft", mini_run / "chosen_by_loss")
    candidates = json.loads((first / "sft/candidates.json").read_text())
    best = min(candidates, key=lambda candidate: candidate["nll"])
    (mini_run / "chosen_by_loss/chosen.json").write_text(json.dumps(best))
    return second


@pytest.mark.parametrize(
    "name, module, step", [("pretrain", pretrain, 7), ("sft", sft, 9), ("reward", reward, 3)]
)
def test_other_stages_stopped_in_process(name, module, step, elsewhere, mini_run, monkeypatch):
    stopped_and_resumed(monkeypatch, lambda: module.run(elsewhere), step)
    first, second = (
        run_folder(c) / name for c in (recipe.of_seed(recipe.config(mini_run.parent)), elsewhere)
    )
    items = ("params", "optimizer")
    recipe.assert_same(recipe.saved(second, items), recipe.saved(first, items))
