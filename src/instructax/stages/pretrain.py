"""`instructax pretrain`: next-token prediction on text (GPT-3's recipe)."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax

from instructax.config import Config, ModelConfig
from instructax.data import pretraining
from instructax.data.pipeline import derive_seed
from instructax.models import functional as model
from instructax.records import Record
from instructax.runtime import mesh
from instructax.runtime.stopping import leave_if_stopped
from instructax.stages import data
from instructax.stages.context import Run, load_params, open_run
from instructax.stages.training import train
from instructax.steps.accumulate import measure
from instructax.steps.optimizer import learning_rate, make_optimizer
from instructax.steps.sft import lm_objective, lm_step

Params = Any


def run(config: Config) -> None:
    context = open_run(config)
    c = config.pretrain
    optimizer = make_optimizer(c.optimizer, c.steps)
    rate = learning_rate(c.optimizer, c.steps)
    documents = pretraining.tokenise(data.records(config, "pretrain"), context.tokenizer)
    stream = pretraining.stream(
        documents,
        batch_size=c.batch_size,
        row_length=c.row_length,
        seed=derive_seed(config.seed, "pretrain"),
        cross_document_mask=c.cross_document_mask,
    )
    mesh.check_rows(context.mesh, "pretrain.batch_size", c.batch_size, c.grad_accumulation)
    evaluate = held_out_nll(context, config.model, c.row_length, c.batch_size, c.grad_accumulation)

    def step(state, batch):
        new, metrics = lm_step(
            state,
            batch,
            None,
            model_config=config.model,
            optimizer=optimizer,
            microbatches=c.grad_accumulation,
        )
        return new, metrics | {"lr": rate(state.step)}

    train(
        context,
        "pretrain",
        model_config=config.model,
        head="lm",
        start_params=functools.partial(_start, context, c.init_from),
        optimizer=optimizer,
        step=step,
        batches=stream,
        total_steps=c.steps,
        save_at=lambda done: done % c.checkpoint_every == 0,
        batch_size=c.batch_size,
        evaluate=lambda params: {"eval/nll": evaluate(params)["all"]},
        evaluate_at=lambda done: done % c.evaluate_every == 0 or done == c.steps,
        show=("loss/nll", "eval/nll"),
    )


def _start(run: Run, init_from: str) -> Params:
    if init_from:
        return load_params(run, init_from, run.config.model, "lm")
    config = run.config.model
    return mesh.init_sharded(
        run.mesh, lambda: model.init(run.key("init"), config, "lm"), over=config.shard_over
    )


def held_out_nll(
    run: Run, model_config: ModelConfig, row_length: int, batch_size: int, microbatches: int = 1
) -> Callable[[Params], dict[str, float]]:
    """params -> {"all": nats a token, topic: ...} on the held-out pretraining text.

    Documents are masked from each other here, so that a topic's figure is of that topic alone.
    """
    by_topic: dict[str, list[Record]] = defaultdict(list)
    for record in data.records(run.config, "pretrain_validation"):
        by_topic[str(record.get("topic", "all"))].append(record)
    batches = {
        topic: list(_in_order(run, records, row_length, batch_size))
        for topic, records in sorted(by_topic.items())
    }
    objective = lm_objective(model_config)
    measured = jax.jit(functools.partial(measure, objective, microbatches=microbatches))

    def evaluate(params: Params) -> dict[str, float]:
        total = tokens = 0.0
        nll = {}
        for topic, of_topic in batches.items():
            leave_if_stopped()
            results = jax.device_get([measured(params, batch) for batch in of_topic])
            count = float(sum(r["tokens"] for r in results))
            summed = float(sum(r["nll"] * r["tokens"] for r in results))
            nll[topic] = summed / count
            total, tokens = total + summed, tokens + count
        return nll | {"all": total / tokens}

    return evaluate


def _in_order(run: Run, records: Sequence[Record], row_length: int, batch_size: int):
    stream = pretraining.stream(
        pretraining.tokenise(list(records), run.tokenizer),
        batch_size=batch_size,
        row_length=row_length,
        seed=0,
        cross_document_mask=True,
    )
    for batch in stream.in_order():
        yield mesh.put_batch(run.mesh, batch)
