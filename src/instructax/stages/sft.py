"""`instructax sft` and `instructax init`: demonstrations, with or without a share of pretraining text."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructax.config import Config, ModelConfig, SftConfig
from instructax.data import demonstrations, pretraining
from instructax.data.mixture import mix_lm
from instructax.data.pipeline import derive_seed
from instructax.runtime import checkpoint, mesh
from instructax.runtime.distributed import on_main
from instructax.stages import data
from instructax.stages.context import (
    Run,
    abstract_params,
    load_params,
    longest_example,
    open_run,
    stands,
    write_json,
)
from instructax.stages.sampling import Sampler, mean_reward
from instructax.stages.training import train
from instructax.steps.accumulate import measure
from instructax.steps.optimizer import learning_rate, make_optimizer
from instructax.steps.sft import lm_objective, lm_step

Params = Any


def network(model: ModelConfig, c: SftConfig) -> ModelConfig:
    """The model as a fine-tuning stage trains it."""
    remat = model.remat if c.remat == "model" else c.remat
    return dataclasses.replace(model, dropout=c.dropout, remat=remat)


def run(config: Config, init: bool = False) -> None:
    """Fine-tune; every epoch's checkpoint is a candidate. ``init`` is the RL init's own recipe."""
    stage = "init" if init else "sft"
    context = open_run(config)
    c = config.init if init else config.sft
    mesh.check_rows(context.mesh, f"{stage}.batch_size", c.batch_size, c.grad_accumulation)
    stream = _batches(context, c, stage)
    ends = tuple(np.cumsum([stream.steps_per_epoch(e) for e in range(c.epochs)]).tolist())
    optimizer = make_optimizer(c.optimizer, ends[-1])
    rate = learning_rate(c.optimizer, ends[-1])
    model_config = network(config.model, c)
    dropout_key = context.key(f"{stage}/dropout") if c.dropout != 0.0 else None
    evaluate = _validation_nll(context, c, model_config)

    def step(state, batch):
        new, metrics = lm_step(
            state,
            batch,
            dropout_key,
            model_config=model_config,
            optimizer=optimizer,
            microbatches=c.grad_accumulation,
        )
        return new, metrics | {"lr": rate(state.step)}

    train(
        context,
        stage,
        model_config=model_config,
        head="lm",
        start_params=functools.partial(
            load_params, context, c.init_from or "pretrain", config.model, "lm"
        ),
        optimizer=optimizer,
        step=step,
        batches=stream,
        total_steps=ends[-1],
        save_at=lambda done: done in ends,
        batch_size=c.batch_size,
        keep_all=c.select_by != "last",
        evaluate=lambda params: {"eval/nll": evaluate(params)},
        evaluate_at=lambda done: done in ends,
        show=("loss/nll", "eval/nll"),
    )
    if c.select_by != "last":
        select(config, stage)


def _batches(run: Run, c: SftConfig, stage: str):
    config = run.config
    examples = demonstrations.tokenise(
        data.records(config, "demonstrations"),
        run.tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_length=min(c.row_length, longest_example(config, config.model)),
        chat_template=config.data.chat_template,
    )
    if any(examples.dropped.values()):
        print(f"{stage}: {len(examples)} demonstrations, left out: {examples.dropped}")
    stream = demonstrations.stream(
        examples,
        batch_size=c.batch_size,
        row_length=c.row_length,
        packed=c.packed,
        seed=derive_seed(config.seed, stage),
        prompt_loss_weight=c.prompt_loss_weight,
    )
    if c.pretrain_mix == 0.0:
        return stream
    text = pretraining.stream(
        pretraining.tokenise(data.records(config, "pretrain"), run.tokenizer),
        batch_size=c.batch_size,
        row_length=c.row_length,
        seed=derive_seed(config.seed, f"{stage}/pretrain"),
        # Rows may be longer than a context: documents keep to themselves, so positions stay short.
        cross_document_mask=c.row_length > config.model.context_length,
    )
    return mix_lm(stream, text, c.pretrain_mix)


def _validation_nll(run: Run, c: SftConfig, model_config: ModelConfig):
    examples = demonstrations.tokenise(
        data.records(run.config, "demonstrations_validation"),
        run.tokenizer,
        max_prompt_tokens=run.config.data.max_prompt_tokens,
        max_length=min(c.row_length, longest_example(run.config, model_config)),
        chat_template=run.config.data.chat_template,
    )
    stream = demonstrations.stream(
        examples, batch_size=c.batch_size, row_length=c.row_length, packed=c.packed, seed=0
    )
    batches = [mesh.put_batch(run.mesh, batch) for batch in stream.in_order()]
    objective = lm_objective(model_config)
    measured = jax.jit(functools.partial(measure, objective, microbatches=c.grad_accumulation))

    def evaluate(params: Params) -> float:
        results = jax.device_get([measured(params, batch) for batch in batches])
        tokens = sum(float(r["tokens"]) for r in results)
        return sum(float(r["nll"]) * float(r["tokens"]) for r in results) / tokens

    return evaluate


def select(config: Config, stage: str = "sft") -> Mapping[str, Any]:
    """Choose among the epochs' checkpoints and write ``chosen.json`` and ``candidates.json``.

    By the mean reward-model score of ``select_samples`` samples for each validation prompt
    (InstructGPT section 3.5) where the run has a reward model, else by validation loss.
    """
    context = open_run(config)
    c = config.init if stage == "init" else config.sft
    folder = context.folder / stage
    nll = dict(on_main(lambda: _validation_losses(folder / "metrics.jsonl")))
    candidates = [
        {"epoch": epoch, "step": step, "nll": nll[step]}
        for epoch, step in enumerate(sorted(nll), start=1)
    ]
    # A reward model still in training must not choose: a run cut short would choose differently.
    has_reward = on_main((context.folder / "reward" / "validation.json").is_file)
    by = c.select_by
    if by == "auto":
        by = "reward" if has_reward else "loss"
    how = {"by": by} | ({"samples": c.select_samples} if by == "reward" else {})
    inputs = [folder / "metrics.jsonl"]
    inputs += [context.folder / "reward" / "validation.json"] if by == "reward" else []
    if (before := on_main(lambda: _chosen(folder / "chosen.json", how, inputs))) is not None:
        return before
    if by == "reward":
        with jax.set_mesh(context.mesh):
            _score_candidates(context, folder, candidates, c.select_samples)
        chosen = max(candidates, key=lambda candidate: candidate["reward"])
    else:
        chosen = min(candidates, key=lambda candidate: candidate["nll"])
    write_json(folder / "candidates.json", candidates)
    write_json(folder / "chosen.json", chosen | how)
    print(f"{stage}: epoch {chosen['epoch']} of {len(candidates)} chosen by {by}")
    return chosen


def _chosen(path: Path, how: Mapping[str, Any], inputs: Sequence[Path]) -> dict[str, Any] | None:
    """An earlier choice that still stands: made the same way, and later than all it depends on."""
    if not stands(path, inputs):
        return None
    chosen = json.loads(path.read_text("utf-8"))
    return chosen if how.items() <= chosen.items() else None


def _validation_losses(path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(row["step"], row["eval/nll"]) for row in rows if "eval/nll" in row]


def _score_candidates(run: Run, folder, candidates: list[dict[str, Any]], num_samples: int) -> None:
    """Adds ``reward`` and ``reward_se``; all candidates draw with the same keys, so luck is shared."""
    prompts = data.records(run.config, "prompts_validation")
    sampler = Sampler(run, prompts, batch_size=run.config.evaluate.batch_size)
    reward = load_params(run, "reward", run.reward_model, "scalar")
    abstract = abstract_params(run, run.config.model, "lm")
    for candidate in candidates:
        params = checkpoint.load_item(folder / "checkpoints", "params", abstract, candidate["step"])
        candidate["reward"], candidate["reward_se"] = mean_reward(
            sampler, params, reward, run.key("select"), num_samples
        )
