"""`instructax reward`: the SFT model with a scalar head, trained on K-way rankings."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from instructax.batches import ComparisonBatch
from instructax.config import Config, RewardConfig
from instructax.data import comparisons
from instructax.data.pipeline import derive_seed
from instructax.losses.ranking import ranked_pairs
from instructax.models import functional as model
from instructax.records import prompt_text
from instructax.runtime import mesh
from instructax.runtime.stopping import leave_if_stopped
from instructax.stages import data
from instructax.stages.context import Run, load_params, longest_example, open_run, write_json
from instructax.stages.training import train
from instructax.steps.optimizer import learning_rate, make_optimizer
from instructax.steps.reward import reward_step, scores

Params = Any

SAVES = 10  # checkpoints of a run, so that an interruption costs at most a tenth of it


def run(config: Config) -> None:
    context = open_run(config)
    c, model_config = config.reward, context.reward_model
    stream = _stream(context, "comparisons", seed=derive_seed(config.seed, "reward"))
    total = sum(stream.steps_per_epoch(epoch) for epoch in range(c.epochs))
    optimizer = make_optimizer(c.optimizer, total)
    rate = learning_rate(c.optimizer, total)
    dropout_key = context.key("reward/dropout") if c.dropout != 0.0 else None
    evaluate, demonstration_mean = Evaluator(context), DemonstrationMean(context)
    last: dict[str, Any] = {}

    def look(params: Params) -> dict[str, float]:
        last.update(evaluate(params))
        return {"eval/accuracy": last["accuracy"]}

    def step(state, batch):
        new, metrics = reward_step(
            state,
            batch,
            dropout_key,
            model_config=model_config,
            optimizer=optimizer,
            loss=c.loss,
            microbatches=c.grad_accumulation,
        )
        return new, metrics | {"lr": rate(state.step)}

    def start() -> Params:
        lm = load_params(context, c.init_from or "sft", model_config, "lm")
        return jax.jit(model.replace_head, static_argnums=2)(
            context.key("reward/head"), lm, model_config
        )

    def centred(params: Params) -> Params:
        """Demonstrations average 0; the shift lives in the head's bias, so every user inherits it."""
        if not c.center_on_demonstrations:
            return params
        return model.shift_scalars(params, -demonstration_mean(params))

    looks, saves = marks(total, c.evaluations), marks(total, SAVES)
    params = train(
        context,
        "reward",
        model_config=model_config,
        head="scalar",
        start_params=start,
        optimizer=optimizer,
        step=step,
        batches=stream,
        total_steps=total,
        save_at=lambda done: done in saves,
        batch_size=c.batch_size,
        evaluate=look,
        evaluate_at=lambda done: done in looks,
        finish=centred,
        show=("loss/loss", "loss/accuracy", "eval/accuracy"),
    )
    with jax.set_mesh(context.mesh):
        # The last look was at these parameters: centring shifts all scores alike, no pair changes.
        figures = (last or evaluate(params)) | {"demonstrations": demonstration_mean(params)}
    write_json(context.folder / "reward" / "validation.json", figures)
    print(f"reward: accuracy {figures['accuracy']:.3f} on {figures['pairs']} held-out pairs")


def _scores(run: Run) -> Callable[..., Any]:
    """Scores outside training, in as many microbatches as there."""
    return functools.partial(
        scores,
        model_config=run.reward_model,
        microbatches=run.config.reward.grad_accumulation,
    )


def marks(total: int, count: int) -> set[int]:
    """``count`` steps at even distances up to ``total``, which is among them; all where there are fewer."""
    return {math.ceil(total * i / count) for i in range(1, count + 1)}


def _examples(run: Run, name: str, records):
    config = run.config
    examples = comparisons.tokenise(
        records,
        run.tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_length=longest_example(config, run.reward_model),
        max_slots=config.reward.row_length,
        chat_template=config.data.chat_template,
    )
    if any(examples.dropped.values()):
        print(f"reward: {len(examples)} {name}, left out: {examples.dropped}")
    return examples


def _stream(run: Run, name: str, *, seed: int):
    c = run.config.reward
    examples = _examples(run, name, data.records(run.config, name))
    return _laid_out(
        run, examples, c.batch_size, packed=c.packed, max_responses=c.max_responses, seed=seed
    )


def _laid_out(run: Run, examples, prompts: int, *, packed: bool, max_responses: int, seed: int):
    """Batches of so many prompts, in rows that fit the mesh and the platform's attention."""
    row_length = run.config.reward.row_length
    return comparisons.stream(
        examples,
        batch_size=prompts,
        row_length=row_length,
        max_responses=max_responses,
        rows=_rows(run, examples, prompts) if packed else None,
        row_multiple=_row_multiple(run),
        row_scores=model.row_scores(row_length),
        tile=model.family_tile(),
        seed=seed,
    )


def even_families(c: RewardConfig) -> comparisons.FamilySizes | None:
    """Those of rows of which a prompt takes half, and as many responses as there may be the rest; what a plan takes."""
    prompt = c.row_length // 2
    return comparisons.family_sizes(
        [prompt],
        [max(1, (c.row_length - prompt) // c.max_responses)],
        ways=c.max_responses,
        most_in_row=1,
        row_scores=model.row_scores(c.row_length),
        tile=model.family_tile(),
    )


def _row_multiple(run: Run) -> int:
    """Every microbatch divides over the mesh."""
    return mesh.shards(run.mesh) * run.config.reward.grad_accumulation


def _rows(run: Run, examples, prompts: int) -> int:
    """Rows that hold so many prompts of mean size, with a tenth to spare for what does not fit.

    A batch has as many prompts, at most so many, as fit into them.
    """
    c = run.config.reward
    slots = prompts * float(examples.slots_n.mean()) * 1.1
    return max(1, math.ceil(slots / c.row_length))


class Evaluator:
    """params -> accuracy over held-out pairs: overall, by K, by labeler group, and calibration."""

    def __init__(self, run: Run):
        self._records = data.records(run.config, "comparisons_validation")
        stream = _stream(run, "comparisons_validation", seed=0)
        in_order = stream.in_order()
        self._batches = [
            (mesh.put_batch(run.mesh, in_order[i]), in_order.record_indices(i))
            for i in range(len(in_order))
        ]

        def pairs(params, batch):
            score_NxK = _scores(run)(params, batch=batch)
            return score_NxK, *ranked_pairs(score_NxK, batch.rank_NxK, batch.valid_NxK)

        self._pairs = jax.jit(pairs)

    def __call__(self, params: Params) -> dict[str, Any]:
        probabilities: list[float] = []
        by_k: dict[int, list[float]] = defaultdict(list)
        by_group: dict[str, list[float]] = defaultdict(list)
        against_gold: list[float] = []
        gold_on_labels: list[float] = []
        for batch, indices in self._batches:
            leave_if_stopped()
            score_NxK, p_NxKxK, preferred_NxKxK = mesh.to_host(self._pairs(params, batch))
            for n, i in enumerate(indices):
                record: Mapping[str, Any] = self._records[i]
                labelled = _different(record, np.argwhere(preferred_NxKxK[n]))
                p = [float(p_NxKxK[n, w, lo]) for w, lo in labelled]
                probabilities += p
                by_k[len(record["responses"])] += p
                by_group[str(record.get("labeler_group", "all"))] += p
                if "gold" in record:
                    score_K, gold_K = score_NxK[n], np.asarray(record["gold"])
                    gold_on_labels += [
                        0.5 + 0.5 * np.sign(gold_K[w] - gold_K[lo]) for w, lo in labelled
                    ]
                    better = np.argwhere(gold_K[:, None] > gold_K[None, :])
                    against_gold += [
                        0.5 + 0.5 * np.sign(score_K[w] - score_K[lo])
                        for w, lo in _different(record, better)
                    ]
        return {
            "accuracy": accuracy(probabilities),
            "pairs": len(probabilities),
            "accuracy_by_k": {str(k): accuracy(p) for k, p in sorted(by_k.items())},
            "accuracy_by_group": {g: accuracy(p) for g, p in sorted(by_group.items())},
            "calibration": calibration(probabilities),
            "agreement": agreement(self._records),
            # The gold score's own accuracy on the labelers' pairs, and ours on gold's.
            "ceiling": float(np.mean(gold_on_labels)) if gold_on_labels else None,
            "accuracy_gold": float(np.mean(against_gold)) if against_gold else None,
        }


def _different(record: Mapping[str, Any], pairs: np.ndarray) -> list[tuple[int, int]]:
    """Pairs whose texts differ: nobody can prefer one of two equal responses."""
    texts = record["responses"]
    return [(int(w), int(lo)) for w, lo in pairs if texts[w] != texts[lo]]


def agreement(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of pairs that two labelers of the same responses order alike, where neither sees a tie."""
    seen: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        seen[json.dumps([prompt_text(record), record["responses"]])].append(record)
    same: list[bool] = []
    for judged in seen.values():
        for a, b in itertools.combinations(judged, 2):
            rank_a, rank_b = np.asarray(a["ranks"]), np.asarray(b["ranks"])
            for w, lo in _different(a, np.argwhere(rank_a[:, None] < rank_a[None, :])):
                if rank_b[w] != rank_b[lo]:
                    same.append(bool(rank_b[w] < rank_b[lo]))
    return float(np.mean(same)) if same else None


def accuracy(winner_p: list[float]) -> float:
    """Share of pairs whose preferred response scores higher; equal scores count half."""
    p = np.asarray(winner_p)
    return float(np.mean((p > 0.5) + 0.5 * (p == 0.5))) if p.size else float("nan")


def calibration(winner_p: list[float], bins: int = 10) -> list[dict[str, float]]:
    """How often the response that the model prefers with confidence p in [.5, 1] is the preferred one."""
    p = np.asarray(winner_p)
    confidence = np.maximum(p, 1 - p)
    which = np.minimum((confidence - 0.5) * 2 * bins, bins - 1).astype(int)
    rows = []
    for b in range(bins):
        inside = which == b
        if inside.any():
            right = (p[inside] > 0.5) + 0.5 * (p[inside] == 0.5)
            rows.append(
                {
                    "p": float(confidence[inside].mean()),
                    "frequency": float(right.mean()),
                    "n": int(inside.sum()),
                }
            )
    return rows


class DemonstrationMean:
    """params -> mean score of the training demonstrations, each read at its EOS."""

    def __init__(self, run: Run):
        self._run = run
        self._score = jax.jit(_scores(run))

    @functools.cached_property
    def _batches(self) -> list[ComparisonBatch]:
        as_rankings = [
            {k: record[k] for k in ("prompt", "messages") if k in record}
            | {"responses": [record["response"]], "ranks": [0]}
            for record in data.records(self._run.config, "demonstrations")
        ]
        c = self._run.config.reward
        examples = _examples(self._run, "demonstrations", as_rankings)
        # Packed into about as many rows as a batch of rankings has: a prompt comes with one response.
        stream = _laid_out(
            self._run, examples, c.batch_size * 4, packed=True, max_responses=1, seed=0
        )
        return list(stream.in_order())

    def __call__(self, params: Params) -> float:
        total, count = 0.0, 0
        for host in self._batches:
            leave_if_stopped()
            batch = mesh.put_batch(self._run.mesh, host)
            score_NxK = mesh.to_host(self._score(params, batch=batch))
            total += float(score_NxK[host.valid_NxK].sum())
            count += int(host.valid_NxK.sum())
        return total / count
