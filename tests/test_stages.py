"""The recipe from data to report, in miniature: what it leaves behind, and that it ends where it ended."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time

import jax
import numpy as np
import pytest
import recipe

from instructax.config import UserError
from instructax.stages import evaluate, pipeline, ppo, sft
from instructax.stages.context import run_folder

INTERVAL = ("mean", "low", "high")
GRADES = ("helpful", "truthful", "harmless", "total")
SUMMARY = {
    "seconds": None,
    "peak_rss_bytes": None,
    "seeds": None,
    "labelers": {"agreement": None},
    "reward": dict.fromkeys(
        ("accuracy_train_labelers", "accuracy_heldout", "ceiling", "accuracy_gold")
    ),
    "winrate": {
        f"{name}_vs_sft": dict.fromkeys(INTERVAL)
        for name in ("ppo_ptx", "ppo", "best_of_n", "shuffled")
    },
    "pretrain_nll": dict.fromkeys(("base", "sft", "init", "ppo", "ppo_ptx", "ptx_only")),
    "gold": {
        name: dict.fromkeys(GRADES)
        for name in ("demonstrations", "sft", "ppo", "ppo_ptx", "best_of_n")
    },
    "kl": dict.fromkeys(("ppo", "ppo_ptx")),
    "length": dict.fromkeys(("sft", "ppo", "ppo_ptx")),
}


def missing(wanted: dict, found: dict, path: str = "") -> list[str]:
    out = []
    for name, below in wanted.items():
        if name not in found:
            out.append(path + name)
        elif below is not None:
            out += missing(below, found[name], f"{path}{name}.")
    return out


@pytest.fixture(scope="module")
def seed0(mini_run):
    return mini_run / "seed0"


@pytest.fixture(scope="module")
def config(mini_run):
    return recipe.config(mini_run.parent)


def figures(folder, name):
    return json.loads((folder / name).read_text("utf-8"))


def test_the_summary_has_every_figure(mini_run):
    summary = figures(mini_run, "summary.json")
    assert missing(SUMMARY, summary) == []
    assert summary["seeds"] == [0] and summary["seconds"] > 0
    assert summary["peak_rss_bytes"] > 2**27
    for rate in summary["winrate"].values():
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
    assert all(
        0 < nll < math.log(recipe.VOCABULARY) + 1 for nll in summary["pretrain_nll"].values()
    )
    assert missing({"a": {"b": None}}, {"a": {}}) == ["a.b"]


def test_running_again_changes_nothing(mini_run, seed0, config):
    # Other tests write arms of their own beside these.
    stages = ("pretrain", "sft", "reward", "init", "evaluate", *(arm.name for arm in config.arms))
    folders = [mini_run / "data", seed0 / "data", *(seed0 / name for name in stages)]

    def state():
        files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}

    before, summary = state(), figures(mini_run, "summary.json")
    recipe.make(mini_run.parent)
    assert state() == before
    again = figures(mini_run, "summary.json")
    for changing in ("seconds", "peak_rss_bytes"):
        summary.pop(changing), again.pop(changing)
    assert again == summary


@pytest.mark.slow
def test_workers_side_by_side_leave_the_same_run(mini_run, seed0, config, tmp_path):
    """Two processes at a time and two seeds, the first from pretraining on: same choices, samples and figures."""
    beside = dataclasses.replace(config, run_dir=str(tmp_path), workers=2, seeds=2)
    later = ("sft", "init", "reward", "evaluate*", "summary.json", "report.html", "spent.json")
    copy = recipe.copy(mini_run, tmp_path, "cut", *later, *(arm.name for arm in config.arms))
    pipeline.run(beside)
    for name in ("evaluate.json", "sft/candidates.json", "reward/validation.json"):
        assert_close(figures(copy / "seed0", name), figures(seed0, name))
    for arm in config.arms:
        samples = [
            recipe.rows(run / "seed0" / arm.name / "samples.jsonl") for run in (mini_run, copy)
        ]
        assert_close(*samples)
    summary = figures(copy, "summary.json")
    assert summary["seeds"] == [0, 1]
    of_seed = summary["winrate_by_seed"]["ppo_vs_sft"]
    first, second = (figures(copy / f"seed{i}", "evaluate.json")["winrate"] for i in range(2))
    assert of_seed == [first["ppo_vs_sft"], second["ppo_vs_sft"]]


def assert_close(found, wanted):
    """Texts alike, numbers up to the rounding of another number of threads."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for leaf, other in pairs:
        assert leaf == (
            other if isinstance(other, str) else pytest.approx(other, rel=1e-3, abs=1e-4)
        )


def test_sft_is_chosen_by_the_reward_model_among_its_epochs(seed0):
    candidates, chosen = figures(seed0, "sft/candidates.json"), figures(seed0, "sft/chosen.json")
    assert len(candidates) == 2 and chosen["by"] == "reward"
    assert chosen["reward"] == max(c["reward"] for c in candidates)
    assert all(0 < c["reward_se"] < 1 for c in candidates)
    kept = {p.name for p in (seed0 / "sft/checkpoints").iterdir()}
    assert {str(c["step"]) for c in candidates} <= kept
    assert not (seed0 / "init/chosen.json").exists()


def test_an_unfinished_reward_model_does_not_choose(seed0, config):
    """A run killed during reward training must resume as it would have gone on."""
    cut = dataclasses.replace(recipe.of_seed(config), name="mini/cut")
    shutil.copytree(seed0 / "sft", run_folder(cut) / "sft")
    (run_folder(cut) / "reward" / "checkpoints").mkdir(parents=True)
    chosen = sft.select(cut)
    assert chosen["nll"] == min(c["nll"] for c in figures(seed0, "sft/candidates.json"))
    assert figures(run_folder(cut), "sft/chosen.json")["by"] == "loss"


def test_held_out_accuracy_is_measured_as_often_as_asked(seed0):
    rows = recipe.rows(seed0 / "reward/metrics.jsonl")
    measured = [row["step"] for row in rows if "eval/accuracy" in row]
    total = rows[-1]["step"]
    assert measured == [math.ceil(total / 2), total]


def test_the_reward_model_gives_demonstrations_zero_on_average(seed0):
    """Trap T2, read from the stored checkpoint."""
    assert figures(seed0, "reward/validation.json")["demonstrations"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("arm", ["ppo_ptx", "ppo", "shuffled", "ptx_only"])
def test_every_iteration_begins_at_ratio_one_and_the_first_at_kl_zero(seed0, arm):
    rows = recipe.iterations(seed0 / arm)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    for row in rows:
        assert row["val/first_ratio_deviation"] <= 1e-5
        assert row["val/sampler_gap_max"] <= 1e-4
        assert row["objective/kl_coef"] == pytest.approx(0.1)
        assert ("grad/cosine" in row) == (arm in ("ppo_ptx", "ptx_only"))


def test_rewards_are_normalised_over_the_initial_policy(seed0):
    """Gain and bias make mean 0 and deviation 1 of samples of the init; a batch of 16 is near it."""
    row = recipe.iterations(seed0 / "ppo")[0]
    assert abs(row["objective/score"]) < 1 and 0.4 < row["objective/score_std"] < 2


def test_arms_see_the_same_prompts_and_start_from_the_same_samples(seed0):
    """Trap T19: gamma or shuffled scores change no sampling before the first update."""
    first = [recipe.iterations(seed0 / arm)[0] for arm in ("ppo_ptx", "ppo", "shuffled")]
    for name in ("response_length/mean", "objective/entropy", "objective/score"):
        assert first[0][name] == first[1][name] == pytest.approx(first[2][name], rel=1e-5)
    samples = [recipe.rows(seed0 / arm / "samples.jsonl")[:4] for arm in ("ppo_ptx", "ppo")]
    assert samples[0] == samples[1]


def test_the_pretraining_loss_is_known_before_the_first_iteration(seed0):
    before = [recipe.rows(seed0 / arm / "metrics.jsonl")[0] for arm in ("ppo_ptx", "ppo")]
    assert [row["step"] for row in before] == [0, 0]
    assert before[0]["eval/pretrain_nll"] == before[1]["eval/pretrain_nll"] > 0


def test_gamma_leaves_a_better_language_model(mini_run):
    nll = figures(mini_run, "summary.json")["pretrain_nll"]
    assert nll["ptx_only"] < nll["init"] and nll["ppo_ptx"] < nll["ppo"]


def test_best_of_n_scores_above_one_sample(seed0):
    score = figures(seed0, "evaluate.json")["score"]
    assert score["best_of_n"] > score["sft"]


def test_policies_are_evaluated_alone_as_among_others(mini_run, seed0, config, tmp_path):
    recipe.copy(mini_run, tmp_path, "evaluate*")
    alone = recipe.of_seed(dataclasses.replace(config, run_dir=str(tmp_path)))
    few = dataclasses.replace(alone.evaluate, policies=("sft", "ppo"), best_of=1)
    alone = dataclasses.replace(alone, evaluate=few)
    assert evaluate.unmeasured(alone, few.policies) == ["sft", "ppo"]
    evaluate.run(alone)
    assert evaluate.unmeasured(alone, few.policies) == []
    hotter = dataclasses.replace(alone, evaluate=dataclasses.replace(few, temperature=1.1))
    assert evaluate.unmeasured(hotter, few.policies) == ["sft", "ppo"]
    found = figures(tmp_path / "mini/seed0", "evaluate.json")
    wanted = figures(seed0, "evaluate.json")
    assert found["winrate"]["ppo_vs_sft"] == wanted["winrate"]["ppo_vs_sft"]
    for name in ("gold", "kl", "score", "length", "by_kind", "nll_by_topic"):
        assert found[name] == {policy: wanted[name][policy] for policy in found[name]}
    assert list(found["nll_by_topic"]) == ["sft", "ppo", "base"]


def test_what_was_trained_or_written_anew_is_measured_anew(mini_run, config, tmp_path):
    recipe.copy(mini_run, tmp_path)
    own = recipe.of_seed(dataclasses.replace(config, run_dir=str(tmp_path)))
    names, folder = evaluate.subjects(own), run_folder(own)

    def left_after(name: str) -> set[str]:
        """Subjects left when a file is newer than every figure; its old time is put back."""
        path = folder / name
        before, later = path.stat().st_mtime_ns, time.time_ns() + 10**9
        os.utime(path, ns=(later, later))
        left = set(evaluate.unmeasured(own, names))
        assert evaluate.is_done(own) == (not left)
        os.utime(path, ns=(before, before))
        return left

    assert evaluate.is_done(own)
    assert left_after("ppo/metrics.jsonl") == {"ppo"}
    assert left_after("sft/chosen.json") == {"sft", "best_of_n"}
    assert left_after("ppo/samples.jsonl") == set()
    for name in (
        "reward/validation.json",
        "init/metrics.jsonl",
        "../data/prompts_evaluation.jsonl",
    ):
        assert left_after(name) == set(names)
    shutil.rmtree(folder / "ppo")
    assert evaluate.unmeasured(own, names) == ["ppo"] and not evaluate.is_done(own)


def test_policies_measured_on_other_prompts_are_not_compared(mini_run, config, tmp_path):
    recipe.copy(mini_run, tmp_path)
    own = recipe.of_seed(dataclasses.replace(config, run_dir=str(tmp_path)))
    path = run_folder(own) / "evaluate" / "ppo.json"
    measured = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(measured | {"records": measured["records"][::-1]}), "utf-8")
    with pytest.raises(UserError, match="ppo was measured on other prompts than sft; remove"):
        evaluate.compare(own, evaluate.subjects(own))


def test_an_epoch_is_chosen_again_only_where_something_changed(tmp_path):
    inputs, chosen = [tmp_path / "metrics.jsonl"], tmp_path / "chosen.json"
    inputs[0].write_text("")
    by_loss = {"by": "loss"}
    assert sft._chosen(chosen, by_loss, inputs) is None
    chosen.write_text(json.dumps({"epoch": 2} | by_loss))
    assert sft._chosen(chosen, by_loss, inputs) == {"epoch": 2} | by_loss
    assert sft._chosen(chosen, {"by": "reward", "samples": 2}, inputs) is None
    later = chosen.stat().st_mtime + 1
    os.utime(inputs[0], (later, later))
    assert sft._chosen(chosen, by_loss, inputs) is None


def test_the_report_is_one_page_by_itself(mini_run):
    page = (mini_run / "report.html").read_text("utf-8")
    assert "<html" in page and len(page) > 20_000
    for outside in ('src="http', "src='http", '<link rel="stylesheet"', "@import"):
        assert outside not in page
    for name in ("ppo_ptx", "shuffled", "pretrain"):
        assert name in page


def test_data_of_the_run_is_curated_and_its_held_out_prompts_are_apart(mini_run):
    curation = figures(mini_run, "data/curation.json")
    assert curation["prompts"] and curation["overlap"]
    keys = [
        {r["content_key"] for r in recipe.rows(mini_run / "data" / f"{name}.jsonl")}
        for name in ("demonstrations", "prompts_evaluation")
    ]
    assert not keys[0] & keys[1]


def test_the_policy_moved_and_its_average_lags_behind(seed0):
    arrays = recipe.saved(seed0 / "ppo", ("params", "ema"))
    init = recipe.saved(seed0 / "init", ("params",))
    name = "params['embed']['token']"
    moved = np.abs(arrays[name] - init[name]).max()
    lag = np.abs(arrays["ema" + name.removeprefix("params")] - init[name]).max()
    assert 0 < lag < moved


def test_another_tokenizer_or_head_is_refused(config):
    c = recipe.of_seed(config)
    wrong = dataclasses.replace(c, ppo=dataclasses.replace(c.ppo, init_from="reward"))
    with pytest.raises(UserError, match="scalar head"):
        ppo.run(wrong, "refused")
