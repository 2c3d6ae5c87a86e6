"""The whole recipe in miniature: a small world, a model of one layer, a few steps of every stage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from instructax.config import (
    Arm,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    TokenizerConfig,
    WorldConfig,
)
from instructax.runtime import checkpoint
from instructax.stages import pipeline
from instructax.stages.context import run_folder

VOCABULARY, PROMPT, RESPONSE = 384, 96, 8


def config(run_dir: Path) -> Config:
    world = WorldConfig(
        num_entities=8,
        num_attributes=2,
        pretrain_documents=200,
        pretrain_heldout_documents=20,
        train_demonstrations=64,
        validation_demonstrations=16,
        comparison_prompts=16,
        comparison_validation_prompts=8,
        ppo_prompts=64,
        validation_prompts=16,
        eval_prompts=24,
        heavy_prompts=10,
    )
    rate = OptimizerConfig(learning_rate=3e-3, schedule="constant", warmup_steps=2)
    sft = SftConfig(
        optimizer=rate,
        batch_size=4,
        row_length=144,
        epochs=2,
        dropout=0.1,
        pretrain_mix=0.25,
        select_samples=2,
    )
    return Config(
        name="mini",
        run_dir=str(run_dir),
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY, kind="unigram"),
        data=DataConfig(
            world=world,
            dedup_prefix_chars=96,
            max_prompt_tokens=PROMPT,
            max_response_tokens=RESPONSE + 40,
        ),
        model=ModelConfig(
            num_layers=1,
            d_model=16,
            num_heads=2,
            vocab_size=VOCABULARY,
            context_length=160,
            remat="none",
        ),
        pretrain=PretrainConfig(
            optimizer=rate,
            batch_size=4,
            row_length=32,
            steps=12,
            checkpoint_every=5,
            evaluate_every=6,
        ),
        sft=sft,
        init=dataclasses.replace(sft, epochs=1, pretrain_mix=0.1, dropout=0.0, select_by="last"),
        reward=RewardConfig(
            optimizer=rate, batch_size=4, row_length=320, epochs=2, dropout=0.1, evaluations=2
        ),
        ppo=PpoConfig(
            kl_coef=0.1,
            ptx_coef=1.0,
            episodes=3 * 16,
            batch_size=16,
            minibatch_size=8,
            policy_optimizer=rate,
            value_optimizer=rate,
            ema_decay=0.5,
            normalize_reward=True,
            missing_eos="none",
            normalize_samples=32,
            ptx_examples_per_episode=1,
            ptx_row_length=32,
            prompt_length=PROMPT,
            response_length=RESPONSE,
            checkpoint_every=1,
            sample_every=2,
            log_prompts=4,
        ),
        arms=(
            Arm("ppo_ptx"),
            Arm("ppo", (("ptx_coef", 0.0),)),
            Arm("shuffled", (("score_control", "shuffled"), ("ptx_coef", 0.0))),
            Arm("ptx_only", (("rl_coef", 0.0),)),
        ),
        evaluate=EvaluateConfig(
            policies=("sft", "init", "ppo", "ppo_ptx", "shuffled", "ptx_only"),
            best_of=3,
            bootstrap=50,
            batch_size=24,
        ),
    )


def make(run_dir: Path) -> None:
    """Run it, or go on with it; a finished one costs a second."""
    keep = jax.config.values["jax_compilation_cache_dir"]
    try:
        pipeline.run(config(run_dir))
    finally:
        jax.config.update("jax_compilation_cache_dir", keep)


def copy(run: Path, run_dir: Path, *left_out: str) -> Path:
    """The same run in another run_dir, file times and all, to write into."""
    folder = run_dir / run.name
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*left_out))
    for path in folder.rglob("config.json"):
        times = path.stat()
        path.write_text(path.read_text("utf-8").replace(str(run.parent), str(run_dir)), "utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return folder


def of_seed(c: Config) -> Config:
    """The config of the recipe's one seed, as the pipeline hands it to the stages."""
    tokenizer = dataclasses.replace(c.tokenizer, path=str(run_folder(c) / "tokenizer.model"))
    return dataclasses.replace(c, name=f"{c.name}/seed{c.seed}", tokenizer=tokenizer)


def iterations(folder: Path) -> list[dict]:
    """The rows of PPO's metrics, without what was measured before its first iteration."""
    return [row for row in rows(folder / "metrics.jsonl") if row["step"] > 0]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def saved(stage: Path, items: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint of a stage's folder, by item and path."""
    import orbax.checkpoint as ocp

    step = max(int(p.name) for p in (stage / "checkpoints").iterdir() if p.name.isdigit())
    assert checkpoint.load_meta(stage / "checkpoints", step)
    arrays = {"step": np.asarray(step)}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in items:
        where = stage / "checkpoints" / str(step) / item
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            # On this device, whatever mesh it was saved from.
            target = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                reader.metadata(where).item_metadata.tree,
            )
            tree = reader.restore(where, args=ocp.args.StandardRestore(target))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and value.tobytes() == b[name].tobytes(), name
