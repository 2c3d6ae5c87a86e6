"""Comparisons from the run's own samples: K responses a prompt, ranked by labelers.

The responses of a prompt come from the checkpoints of all SFT epochs in turn. A reward model that has
seen the last epoch alone misjudges the others, and with them the choice among epochs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from instructax.config import Config
from instructax.records import Record
from instructax.runtime import checkpoint
from instructax.runtime.distributed import on_main
from instructax.stages import data
from instructax.stages.context import Run, abstract_params, open_run
from instructax.stages.sampling import Sample, Sampler

NUM_RESPONSES = range(4, 10)  # K = 4..9 (InstructGPT section 3.5)

# Held-out pairs are judged by one labeler of each group, so that accuracies compare alike.
GROUPS = {"comparisons": ("train",), "comparisons_validation": ("heldout", "train")}


def run(config: Config, name: str) -> None:
    """Write ``comparisons`` or ``comparisons_validation``, unless the run has them."""
    if data.exists(config, name):
        return
    train_ids, heldout_ids, rank = data.labelers(config)
    labelers = {"train": train_ids, "heldout": heldout_ids}
    context = open_run(config)
    with jax.set_mesh(context.mesh):
        policies = _candidates(context)
        prompts = data.records(config, name.replace("comparisons", "prompts_reward"))
        sampler = Sampler(context, prompts, batch_size=config.evaluate.batch_size)
        rounds = _rounds(context, policies, sampler, name)
        judge = functools.partial(_judge, config, sampler.records, rounds, labelers, rank, name)
        on_main(judge)


def _candidates(run: Run) -> list[Any]:
    """Parameters of every SFT epoch."""
    abstract = abstract_params(run, run.config.model, "lm")
    folder = run.folder / "sft"
    epochs = on_main(lambda: json.loads((folder / "candidates.json").read_text("utf-8")))
    return [
        checkpoint.load_item(folder / "checkpoints", "params", abstract, epoch["step"])
        for epoch in epochs
    ]


def _rounds(run: Run, policies, sampler: Sampler, name: str) -> list[list[Sample]]:
    """As many samples of every prompt as the largest K takes; a policy reads a prompt once."""
    key = run.key(f"collect/{name}")
    keys = [jax.random.fold_in(key, k) for k in range(NUM_RESPONSES.stop - 1)]
    turns = len(policies)
    of_policy = [
        sampler.rounds(p, keys[i::turns]) for i, p in enumerate(policies) if keys[i::turns]
    ]
    return [of_policy[k % turns][k // turns] for k in range(len(keys))]


def _judge(
    config: Config,
    records: Sequence[Record],
    rounds: Sequence[Sequence[Sample]],
    labelers: Mapping[str, Sequence[str]],
    rank,
    name: str,
) -> None:
    """Let a labeler of every group rank the samples, and write the comparisons."""
    grade = data.grader(config)
    assert grade is not None, "labelers and gold come from the same world"
    rng = np.random.default_rng([config.seed, len(name)])
    rows = []
    for i, record in enumerate(records):
        samples = [samples[i] for samples in rounds[: rng.choice(NUM_RESPONSES)]]
        texts = [s.text for s in samples]
        done = [s.finished for s in samples]
        gold = [grade(record, s.text, s.finished)["total"] for s in samples]
        for group in GROUPS[name]:
            labeler = str(rng.choice(labelers[group]))
            judged = rank(record, texts, done, labeler, name)
            rows.append(
                {
                    **{k: v for k, v in record.items() if k not in ("labeler_id", "source")},
                    "responses": texts,
                    "finished": done,
                    "labeler_id": labeler,
                    "labeler_group": group,
                    "gold": gold,
                    **judged,
                }
            )
    data.add_records(config, name, rows)
    print(f"collect: {name} {len(rows)}")
