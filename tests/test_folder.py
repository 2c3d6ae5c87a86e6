"""A stage's folder is continued with the config it was made with, or not at all."""

from __future__ import annotations

import json

import pytest

from instructax.config import (
    Config,
    ModelConfig,
    PpoConfig,
    SftConfig,
    UserError,
    WorldConfig,
    replace,
)
from instructax.runtime.folder import open_run

CONFIG = Config(name="first")


def test_config_and_environment_are_written(tmp_path):
    folder = open_run(tmp_path / "run" / "sft", CONFIG, stage="sft")
    stored = json.loads((folder / "config.json").read_text())
    assert stored["sft"]["dropout"] == CONFIG.sft.dropout and stored["name"] == "first"
    assert json.loads((folder / "environment.json").read_text())["packages"]["jax"]
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "environment.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "second", "run_dir": "elsewhere"},
        {"ppo": PpoConfig(kl_coef=0.5)},
        {"mesh": replace(CONFIG.mesh, fsdp=2)},
    ],
)
def test_what_the_stage_does_not_read_may_change_and_is_written_down(tmp_path, changes):
    open_run(tmp_path, CONFIG, stage="sft")
    open_run(tmp_path, replace(CONFIG, **changes), stage="sft")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["name"] == changes.get("name", "first")


def test_how_often_a_stage_saves_or_looks_and_its_microbatches_may_change(tmp_path):
    open_run(tmp_path, CONFIG, stage="ppo")
    often = replace(CONFIG.ppo, checkpoint_every=1, sample_every=1, grad_accumulation=4)
    open_run(tmp_path, replace(CONFIG, ppo=often), stage="ppo")
    open_run(tmp_path / "reward", CONFIG, stage="reward")
    once = replace(CONFIG.reward, evaluations=1)
    open_run(tmp_path / "reward", replace(CONFIG, reward=once), stage="reward")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sft": SftConfig(dropout=0.0)}, "sft.dropout: 0.2 -> 0.0"),
        ({"data": replace(CONFIG.data, world=WorldConfig())}, "data.world: null -> {"),
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"model": ModelConfig(attention_pattern=("dense", "banded"))}, "model.attention_pattern"),
    ],
)
def test_a_change_that_matters_is_refused_by_name(tmp_path, changes, line):
    open_run(tmp_path, CONFIG, stage="sft")
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match="cannot be continued") as refused:
        open_run(tmp_path, replace(CONFIG, **changes), stage="sft")
    assert line in str(refused.value) and "ppo" not in str(refused.value)
    assert (tmp_path / "config.json").read_text() == before


def test_a_config_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"na')
    with pytest.raises(UserError, match="config.json cannot be read"):
        open_run(tmp_path, CONFIG, stage="sft")
