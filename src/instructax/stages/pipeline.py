"""`instructax run`: the whole recipe, stage after stage, seed after seed; then figures and report."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from instructax.config import Arm, Config, replace
from instructax.report import page
from instructax.resolve import apply_arm
from instructax.runtime.distributed import join, on_main
from instructax.runtime.environment import enable_compile_cache, peak_rss_bytes
from instructax.runtime.folder import open_run as open_folder
from instructax.runtime.workers import Piece, check, side_by_side
from instructax.stages import collect, data, evaluate, ppo, pretrain, reward, sft, tokenizer
from instructax.stages.context import run_folder, write_json
from instructax.stages.winrates import interval_over_seeds


def run(config: Config) -> None:
    """Every stage goes on from where it was, so the same command continues a run cut short."""
    join(config)
    check(config.workers)
    folder = run_folder(config)
    open_folder(folder, config, stage="run")
    enable_compile_cache(Path(config.run_dir) / ".compile_cache")
    with _Spent(folder / "spent.json", config.workers) as spent:
        if not on_main((folder / "data" / "curation.json").is_file):
            data.run(config)
        if not config.tokenizer.path:
            tokenizer.run(config)
            model_file = str(folder / "tokenizer.model")
            config = replace(config, tokenizer=replace(config.tokenizer, path=model_file))
        seeds = range(config.seed, config.seed + config.seeds)
        of_seed = [replace(config, name=f"{config.name}/seed{s}", seed=s) for s in seeds]
        unfinished = [c for c in of_seed if not evaluate.is_done(c)]
        side_by_side([piece for c in unfinished for piece in _pieces(c)], config.workers)
        for c in unfinished:
            evaluate.compare(c, evaluate.subjects(c))
    on_main(lambda: _report(config, spent))


def _report(config: Config, spent: _Spent) -> None:
    folder, seeds = run_folder(config), [config.seed + i for i in range(config.seeds)]
    write_json(folder / "summary.json", summarise(config, seeds, spent))
    print(f"report: {page.write_report(folder)}")


def _pieces(config: Config) -> list[Piece]:
    """One seed (InstructGPT figure 2): demonstrations, comparisons, reinforcement learning."""
    pieces: list[Piece] = []

    def add(name: str, call: Callable[..., object], *arguments: Any, after=()):
        waits = tuple(f"{config.name}/{other}" for other in after)
        work = functools.partial(call, config, *arguments)
        pieces.append(Piece(f"{config.name}/{name}", work, waits))

    add("pretrain", pretrain.run)
    add("sft", sft.run, after=["pretrain"])
    add("init", sft.run, True, after=["pretrain"])
    # The embedded world's labelers rank this run's samples; a user's comparisons are there already.
    own = config.data.world is None and data.exists(config, "comparisons")
    collected = [] if own else list(collect.GROUPS)
    for name in collected:
        add(name, collect.run, name, after=["sft"])
    add("reward", reward.run, after=["sft", *collected])
    add("baselines", _baselines, after=["init", "reward"])
    for arm in config.arms:
        from_sft = apply_arm(config, arm).ppo.init_from == "sft"
        add(arm.name, _arm, arm, after=["baselines" if from_sft else "init", "reward"])
    return pieces


def _baselines(config: Config) -> None:
    """The reward model, itself begun from the epoch that is best by loss, chooses among SFT's epochs."""
    sft.select(config)
    arms = {arm.name for arm in config.arms}
    _measure(config, [name for name in evaluate.subjects(config) if name not in arms])


def _arm(config: Config, arm: Arm) -> None:
    ppo.run(apply_arm(config, arm), arm.name)
    if arm.name in config.evaluate.policies:
        _measure(config, [arm.name])


def _measure(config: Config, names: Sequence[str]) -> None:
    if left := evaluate.unmeasured(config, names):
        evaluate.measure(config, left)


class _Spent:
    """Seconds of work on a run and its largest memory, over all its continuations.

    Of the main process, which writes them.
    """

    def __init__(self, path: Path, workers: int):
        self._path, self._workers = path, workers
        before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.seconds: float = before.get("seconds", 0.0)
        self.peak_rss_bytes: int = before.get("peak_rss_bytes", 0)

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._start
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes(self._workers))
        spent = {"seconds": self.seconds, "peak_rss_bytes": self.peak_rss_bytes}
        write_json(self._path, spent)


def summarise(config: Config, seeds: list[int], spent: _Spent) -> dict[str, Any]:
    """The figures of the report, nested, over the run's seeds."""
    folder = run_folder(config)
    runs = [folder / f"seed{seed}" for seed in seeds]
    figures = [json.loads((run / "evaluate.json").read_text("utf-8")) for run in runs]
    rewards = [json.loads((run / "reward/validation.json").read_text("utf-8")) for run in runs]
    summary: dict[str, Any] = {
        "seconds": spent.seconds,
        "peak_rss_bytes": spent.peak_rss_bytes,
        "seeds": seeds,
        "judge": figures[0]["judge"],
        "weights_judged": figures[0]["weights_judged"],
        "prompts": figures[0]["prompts"],
        "labelers": {"agreement": _mean(r.get("agreement") for r in rewards)},
        "reward": _reward_figures(rewards),
        "winrate": {
            f"{name}_vs_{evaluate.BASELINE}": interval_over_seeds(
                [f["pairs"][name] for f in figures], config.evaluate.bootstrap, config.seed
            )
            for name in figures[0]["pairs"]
        },
        "winrate_by_seed": {
            name: [f["winrate"][name] for f in figures] for name in figures[0]["winrate"]
        },
        "pretrain_nll": _means(
            [{n: t["all"] for n, t in f["nll_by_topic"].items()} for f in figures]
        ),
        "gold": {name: _means([f["gold"][name] for f in figures]) for name in figures[0]["gold"]},
        "kl": _means([f["kl"] for f in figures]),
        "length": _means([f["length"] for f in figures]),
        "by_kind_gap": _kind_gaps(figures),
        "overoptimisation": figures[0]["trajectories"],
    }
    return summary


def _reward_figures(rewards: list[dict[str, Any]]) -> dict[str, Any]:
    groups = [r["accuracy_by_group"] for r in rewards]
    return {
        "accuracy": _mean(r["accuracy"] for r in rewards),
        "accuracy_train_labelers": _mean(g.get("train") for g in groups),
        "accuracy_heldout": _mean(g.get("heldout") for g in groups),
        "ceiling": _mean(r.get("ceiling") for r in rewards),
        "accuracy_gold": _mean(r.get("accuracy_gold") for r in rewards),
        "demonstrations": _mean(r["demonstrations"] for r in rewards),
    }


def _mean(values) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _kind_gaps(figures: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """(mean of the arm - mean of SFT) / SFT's standard deviation, by kind; negative is a loss."""
    gaps: dict[str, dict[str, float]] = {}
    for name in figures[0]["by_kind"]:
        if name == evaluate.BASELINE:
            continue
        gaps[name] = {}
        for kind in figures[0]["by_kind"][name]:
            of_seed = []
            for f in figures:
                arm, base = f["by_kind"][name][kind], f["by_kind"][evaluate.BASELINE][kind]
                of_seed.append((arm["mean"] - base["mean"]) / max(base["sd"], 1e-9))
            gaps[name][kind] = float(np.mean(of_seed))
    return gaps
