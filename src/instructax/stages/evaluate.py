"""`instructax evaluate`: the run's policies on held-out prompts, against each other and against gold.

A prompt's judge is the gold grade where the data has one, else the reward model (and the figures
say so). Wins count 1, ties half; intervals are bootstrapped over content keys.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructax.config import Config, UserError
from instructax.records import prompt_text
from instructax.runtime.distributed import on_main
from instructax.stages import data
from instructax.stages.context import Run, load_params, open_run, run_folder, stands, write_json
from instructax.stages.pretrain import held_out_nll
from instructax.stages.sampling import Sample, Sampler
from instructax.stages.trajectories import trajectory
from instructax.stages.winrates import by_content, interval, length_matched, wins

Params = Any
BASELINE, BEST_OF_N, BASE = "sft", "best_of_n", "base"
_TEXTS = ("prompts_evaluation", "pretrain_validation")
COMPONENTS = ("helpful", "truthful", "harmless", "total")


def run(config: Config) -> None:
    """Measure every policy and write ``evaluate.json`` into the run's folder."""
    names = subjects(config)
    if not on_main((run_folder(config) / _stage(BASE)).is_dir):
        names = [name for name in names if name != BASE]
    measure(config, names)
    compare(config, names)


def subjects(config: Config) -> list[str]:
    """What is measured: the policies, the best of n of the baseline, and the pretrained model's loss."""
    best = [BEST_OF_N] if config.evaluate.best_of > 1 else []
    base = [BASE] if data.exists(config, "pretrain_validation") else []
    return [*config.evaluate.policies, *best, *base]


def _stage(name: str) -> str:
    """The stage or arm whose weights stand behind a subject of the evaluation."""
    return {BEST_OF_N: BASELINE, BASE: "pretrain"}.get(name, name)


def measure(config: Config, names: Sequence[str]) -> None:
    """Samples and losses of some subjects, each into ``evaluate/<name>.json``."""
    run = open_run(config)
    with jax.set_mesh(run.mesh):
        one = _measuring(run)
        for name in names:
            figures = one(name) | {"by": _settings(config)}
            write_json(_measured(run.folder, name), figures)


def unmeasured(config: Config, names: Sequence[str]) -> list[str]:
    """Those that :func:`measure` has not seen yet, or with other settings, weights or records."""
    texts = [name for name in _TEXTS if data.exists(config, name)]
    return on_main(lambda: [name for name in names if not _is_measured(config, name, texts)])


def is_done(config: Config) -> bool:
    """Whether ``evaluate.json`` compares the subjects as they are now."""
    folder, names = run_folder(config), subjects(config)
    measured = [_measured(folder, name) for name in names]
    return not unmeasured(config, names) and on_main(
        lambda: stands(folder / "evaluate.json", measured)
    )


def _is_measured(config: Config, name: str, texts: Sequence[str]) -> bool:
    path = _measured(run_folder(config), name)
    return stands(
        path, [*_made_from(config, name), *(data.place(config, text) for text in texts)]
    ) and json.loads(path.read_text("utf-8"))["by"] == _settings(config)


def _made_from(config: Config, name: str) -> list[Path]:
    """The files that are written when the weights behind a subject's figures are."""
    folder = run_folder(config)
    stage = folder / _stage(name)
    chosen = stage / "chosen.json"
    weights = [stage / "metrics.jsonl", *([chosen] if chosen.is_file() else [])]
    return [*weights, folder / "init" / "metrics.jsonl", folder / "reward" / "validation.json"]


def _measured(folder: Path, name: str) -> Path:
    return folder / "evaluate" / f"{name}.json"


def _settings(config: Config) -> dict[str, Any]:
    c = config.evaluate
    return {"temperature": c.temperature, "use_ema": c.use_ema, "best_of": c.best_of}


def _measuring(run: Run) -> Callable[[str], dict[str, Any]]:
    c, config = run.config.evaluate, run.config
    sampler = Sampler(
        run,
        data.records(config, "prompts_evaluation"),
        batch_size=c.batch_size,
        temperature=c.temperature,
    )
    reward = load_params(run, "reward", run.reward_model, "scalar")
    reference = load_params(run, "init", config.model, "lm")
    nll = None
    if data.exists(config, "pretrain_validation"):
        nll = held_out_nll(run, config.model, config.pretrain.row_length, c.batch_size)

    def one(name: str) -> dict[str, Any]:
        params = _weights(run, _stage(name))
        loss = {} if nll is None or name == BEST_OF_N else nll(params)
        if name == BASE:
            return {"nll_by_topic": loss}
        if name == BEST_OF_N:
            samples = _best_of(run, sampler, params, reward, c.best_of)
        else:
            key = run.key(f"evaluate/{name}")
            samples = sampler.sample(params, key, reward=reward, reference=reference)
        return {
            "nll_by_topic": loss,
            "samples": [dataclasses.asdict(sample) for sample in samples],
            "records": sampler.record_index,
            "left_out": sampler.dropped,
        }

    return one


def compare(config: Config, names: Sequence[str]) -> None:
    """``evaluate.json``: what was measured, against each other and against gold."""
    winrate = on_main(lambda: _compare(config, names))
    for name, rate in winrate.items():
        print(f"evaluate: {name} {rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]")


def _compare(config: Config, names: Sequence[str]) -> dict[str, dict[str, float]]:
    c, folder = config.evaluate, run_folder(config)
    found = {name: json.loads(_measured(folder, name).read_text("utf-8")) for name in names}
    samples = {
        name: [Sample(**sample) for sample in m["samples"]]
        for name, m in found.items()
        if "samples" in m
    }
    some: dict[str, Any] = next(
        (m for m in found.values() if "samples" in m), {"records": [], "left_out": {}}
    )
    if other := [name for name in samples if found[name]["records"] != some["records"]]:
        raise UserError(
            f"{other[0]} was measured on other prompts than {next(iter(samples))}; remove "
            f"{_measured(folder, other[0])} to measure it again"
        )
    everything = data.records(config, "prompts_evaluation")
    records = [everything[i] for i in some["records"]]
    grade = data.grader(config)
    keys = np.asarray([data.content_key(record) for record in records])
    gold = {name: _gold(grade, records, s) for name, s in samples.items()} if grade else {}
    judged = {
        name: np.asarray(gold[name]["total"] if gold else [s.score for s in rows])
        for name, rows in samples.items()
    }
    winrate = _winrates(judged, samples, keys, c.bootstrap, config.seed)
    figures = {
        "judge": "gold" if gold else "reward model",
        "weights_judged": "ema" if c.use_ema else "raw",
        "prompts": len(records),
        "prompts_left_out": some["left_out"],
        "winrate": winrate,
        "gold": {name: {k: float(v.mean()) for k, v in g.items()} for name, g in gold.items()}
        | _demonstration_gold(config, grade),
        "by_kind": {name: _by_kind(records, values) for name, values in judged.items()},
        "kl": {
            name: float(np.mean([s.kl for s in rows]))
            for name, rows in samples.items()
            if name != BEST_OF_N
        },
        "score": {name: float(np.mean([s.score for s in rows])) for name, rows in samples.items()},
        "length": {
            name: float(np.mean([s.tokens for s in rows])) for name, rows in samples.items()
        },
        "finished": {
            name: float(np.mean([s.finished for s in rows])) for name, rows in samples.items()
        },
        "nll_by_topic": {name: m["nll_by_topic"] for name, m in found.items() if m["nll_by_topic"]},
        "pairs": {
            name: by_content(wins(judged[name], judged[BASELINE]), keys)
            for name in judged
            if name != BASELINE and BASELINE in judged
        },
        "trajectories": _trajectories(config, grade),
        "samples": _side_by_side(records, samples, gold),
    }
    write_json(folder / "evaluate.json", figures)
    return winrate


def _trajectories(config: Config, grade) -> list[dict[str, Any]]:
    folder = run_folder(config)
    records = {
        str(record.get("id", i)): record
        for i, record in enumerate(data.records(config, "prompts_validation"))
    }
    arms = [arm.name for arm in config.arms if (folder / arm.name / "samples.jsonl").is_file()]
    return [row for arm in arms for row in trajectory(folder, arm, records, grade)]


def _weights(run: Run, name: str) -> Params:
    """The weights that are judged: a PPO arm's average or its raw parameters."""
    is_arm = name not in ("sft", "init", "pretrain") and on_main(
        (run.folder / name / "checkpoints").is_dir
    )
    item = "ema" if is_arm and run.config.evaluate.use_ema else "params"
    return load_params(run, name, run.config.model, "lm", item=item)


def _best_of(run: Run, sampler: Sampler, params, reward, n: int) -> list[Sample]:
    """The highest-scoring of n samples a prompt: the baseline without RL.

    Without a KL: log-ratios of the chosen are no sample of the chooser's KL, which is at most
    log n - (n - 1) / n.
    """
    key = run.key(f"evaluate/{BEST_OF_N}")
    keys = [jax.random.fold_in(key, k) for k in range(n)]
    rounds = sampler.rounds(params, keys, reward=reward)
    return [max(drawn, key=lambda sample: sample.score) for drawn in zip(*rounds, strict=True)]


def _gold(grade, records, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    grades = [grade(r, s.text, s.finished) for r, s in zip(records, samples, strict=True)]
    return {name: np.asarray([g[name] for g in grades]) for name in COMPONENTS}


def _demonstration_gold(config: Config, grade) -> dict[str, dict[str, float]]:
    """Gold of the held-out demonstrations themselves: what SFT imitates."""
    if grade is None:
        return {}
    rows = data.records(config, "demonstrations_validation")
    grades = [grade(row, row["response"], True) for row in rows]
    return {
        "demonstrations": {name: float(np.mean([g[name] for g in grades])) for name in COMPONENTS}
    }


def _winrates(judged, samples, keys, resamples: int, seed: int) -> dict[str, dict[str, float]]:
    if BASELINE not in judged:
        return {}
    rates = {}
    tokens = {name: np.asarray([s.tokens for s in rows]) for name, rows in samples.items()}
    for name, values in judged.items():
        if name == BASELINE:
            continue
        won = wins(values, judged[BASELINE])
        rates[f"{name}_vs_{BASELINE}"] = interval(won, keys, resamples, seed)
        near = length_matched(tokens[name], tokens[BASELINE])
        if near.any():
            rates[f"{name}_vs_{BASELINE}_length_matched"] = interval(
                won[near], keys[near], resamples, seed
            )
    return rates


def _by_kind(records, values: np.ndarray) -> dict[str, dict[str, float]]:
    of_kind: dict[str, list[float]] = defaultdict(list)
    for record, value in zip(records, values, strict=True):
        of_kind[str(record.get("kind", "all"))].append(float(value))
    return {
        kind: {"mean": float(np.mean(v)), "sd": float(np.std(v)), "n": len(v)}
        for kind, v in sorted(of_kind.items())
    }


def _side_by_side(records, samples: Mapping[str, Sequence[Sample]], gold, per_kind: int = 3):
    """A few prompts of each kind, the first ones, with every policy's response."""
    shown: dict[str, int] = defaultdict(int)
    rows = []
    for i, record in enumerate(records):
        kind = str(record.get("kind", "all"))
        shown[kind] += 1
        if shown[kind] > per_kind:
            continue
        responses: dict[str, dict[str, Any]] = {}
        for name, drawn in samples.items():
            responses[name] = {"text": drawn[i].text, "score": drawn[i].score}
            if name in gold:
                responses[name]["gold"] = {k: float(v[i]) for k, v in gold[name].items()}
        rows.append(
            {
                "id": str(record.get("id", i)),
                "prompt": prompt_text(record),
                "kind": kind,
                "responses": responses,
            }
        )
    return rows
