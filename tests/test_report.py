"""The report: whole, partial and broken run folders, escaping, and no request to the network."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from instructax.config import Config, UserError
from instructax.report import figures, folder, page, plots, sections

HOSTILE = "<script>alert('x')</script><img src=http://example.com/a.png>"
KINDS = ("generation", "open_qa", "chat")
ARMS = ("ppo", "ppo_ptx", "shuffled", "ptx_only", "beta0", "beta0_ptx")
GOLD = {"helpful": 0.61, "truthful": 0.72, "harmless": 0.83, "total": 0.7345}


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_stage(path: Path, rows: list[dict], samples: list[dict] | None = None) -> None:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text(lines(rows))
    if samples is not None:
        (path / "samples.jsonl").write_text(lines(samples))


def supervised_rows(steps: int, every: int, rng: random.Random) -> list[dict]:
    rows = []
    for step in range(steps):
        loss = 1.2 + 3 * math.exp(-4 * step / steps) + rng.gauss(0, 0.05)
        row = {"step": step, "time": 1.7e9 + 0.1 * step, "loss/nll": loss, "lr": 1e-4}
        if step % every == 0:
            row["eval/nll"] = loss + 0.1
        rows.append(row)
    return rows


def reward_rows(steps: int, rng: random.Random) -> list[dict]:
    return [
        {"step": s, "time": 0.2 * s, "loss/loss": 0.72 - 0.2 * s / steps + rng.gauss(0, 0.02),
         "loss/accuracy": 0.5 + 0.2 * s / steps + rng.gauss(0, 0.03)}
        | ({"eval/accuracy": 0.5 + 0.18 * s / steps} if s % 5 == 0 else {})
        for s in range(steps)
    ]  # fmt: skip


def ppo_rows(arm: str, iterations: int, rng: random.Random) -> list[dict]:
    gain = {"shuffled": 0.05, "ptx_only": 0.0, "ppo_ptx": 1.3}.get(arm, 1.0)
    taxed = 0.0 if arm in ("ppo_ptx", "ptx_only", "beta0_ptx") else 0.09
    free = 6.0 if arm.startswith("beta0") else 1.0
    rows = []
    for i in range(iterations):
        done = 1 - math.exp(-3 * i / iterations)
        row = {
            "step": i, "time": 1.5 * i,
            "objective/score": gain * done + rng.gauss(0, 0.06),
            "objective/kl": free * 1.4 * gain * done + abs(rng.gauss(0, 0.04)),
            "objective/rlhf_reward": 0.8 * gain * done + rng.gauss(0, 0.06),
            "objective/entropy": 14 - 3 * done * gain + rng.gauss(0, 0.2),
            "response_length/mean": 11 - 2 * done * gain + rng.gauss(0, 0.1),
            "val/num_eos_tokens": 120 + 6 * done + rng.gauss(0, 1),
            "ppo/policy/approxkl": 0.002 + 0.001 * rng.random(),
            "ppo/policy/clipfrac": 0.05 * rng.random(),
            "ppo/val/var_explained": 0.6 * done,
            "ppo/loss/policy": -0.02 * rng.random(), "ppo/loss/value": 0.4 - 0.2 * done,
            "val/first_ratio_deviation": 1e-6 * rng.random(),
            "val/ratio_max_deviation": 0.2 * rng.random(),
            "grad_norm/ppo": 1 + rng.random(), "grad_norm/ptx": 2 + rng.random(),
            "grad/cosine": rng.gauss(0, 0.1),
        }  # fmt: skip
        if i % max(iterations // 10, 1) == 0:
            row["eval/pretrain_nll"] = 2.31 + taxed * done + rng.gauss(0, 0.003)
        rows.append(row)
    return rows


def timed_samples(iterations: int) -> list[dict]:
    return [
        {"step": step, "id": f"p{p}", "prompt": f"Write {p + 3} words about the sea. {HOSTILE}",
         "response": f"the sea is wide at {step} " * 3, "score": 0.1 * p + step / 100,
         "kl": step / 50, "kind": KINDS[p % 3]}
        for step in range(0, iterations, max(iterations // 8, 1))
        for p in range(6)
    ]  # fmt: skip


def evaluation(prompts: int, kinds: tuple[str, ...], rng: random.Random) -> dict:
    policies = ("sft", "ppo", "ppo_ptx", "best_of_n")
    samples = [
        {
            "id": str(n), "kind": kinds[n % len(kinds)],
            "prompt": f"user: Name {n} rivers of the north. {HOSTILE}\nassistant:",
            "demonstration": "Ombra, Selve and Tarn.",
            "responses": {
                p: {"text": (HOSTILE if n == 0 else "") + " Ombra and Selve" * (1 + n % 3),
                    "score": rng.gauss(0, 1), "gold": GOLD}
                for p in policies
            },
        }
        for n in range(prompts)
    ]  # fmt: skip
    offset = {"sft": 0.0, "ppo": 0.06, "ppo_ptx": 0.1, "best_of_n": 0.12}
    by_kind = {
        p: {k: {"mean": 0.6 + offset[p] * rng.uniform(-0.5, 2), "sd": 0.25, "n": 90} for k in kinds}
        for p in policies
    }
    topics = ("rivers", "crafts", "weather")
    return {
        "samples": samples,
        "by_kind": by_kind,
        "reward": {
            "accuracy_by_k": {str(k): 0.66 + 0.005 * k for k in range(2, 8)},
            "calibration": [
                {"p": 0.05 + 0.1 * b, "frequency": 0.1 + 0.08 * b, "n": 20 + 30 * abs(5 - b)}
                for b in range(10)
            ],
        },
        "nll_by_topic": {
            p: {t: 2.3 + tax + 0.02 * i for i, t in enumerate(topics)}
            for p, tax in {"init": 0.0, "ppo": 0.08, "ppo_ptx": -0.01, "ptx_only": -0.03}.items()
        },
    }


def summary() -> dict:
    win = {
        "ppo_ptx_vs_sft": (0.6812, 0.6431, 0.7204), "ppo_vs_sft": (0.6101, 0.5702, 0.6503),
        "best_of_n_vs_sft": (0.7021, 0.6633, 0.7415), "shuffled_vs_sft": (0.4913, 0.4522, 0.5304),
        "ppo_ptx_vs_sft_length_matched": (0.6555, 0.6066, 0.7077),
    }  # fmt: skip
    overoptimisation = [
        {"arm": arm, "step": step, "kl": 0.5 * step, "proxy": 0.4 * step**0.6,
         "gold": 0.6 + 0.03 * step - 0.004 * step**2,
         "pretrain_nll": 2.3 + (0.03 if arm == "beta0" else 0.001) * step}
        for arm in ("beta0", "beta0_ptx") for step in range(0, 14, 2)
    ]  # fmt: skip
    return {
        "seconds": 553.21, "peak_rss_bytes": 3_221_225_472, "seeds": [0, 1, 2],
        "labelers": {"agreement": 0.7312},
        "reward": {"accuracy_train_labelers": 0.6934, "accuracy_heldout": 0.6821,
                   "ceiling": 0.7645, "accuracy_gold": 0.8012},
        "winrate": {k: dict(zip(("mean", "low", "high"), v, strict=True)) for k, v in win.items()},
        "pretrain_nll": {"base": 2.2501, "sft": 2.4802, "init": 2.3103, "ppo": 2.4004,
                         "ppo_ptx": 2.3015, "ptx_only": 2.2806},
        "gold": {p: GOLD for p in ("demonstrations", "sft", "ppo", "ppo_ptx", "best_of_n")},
        "kl": {"ppo": 1.412, "ppo_ptx": 1.523},
        "length": {"sft": 11.23, "ppo": 9.34, "ppo_ptx": 9.87},
        "weights_judged": "ema", "overoptimisation": overoptimisation,
    }  # fmt: skip


def config_json() -> dict:
    config = json.loads(json.dumps(dataclasses.asdict(Config())))
    config["name"] = "demo"
    config["model"] |= {"num_layers": 4, "d_model": 96, "num_heads": 4, "vocab_size": 640}
    config["ppo"] |= {"kl_coef": 0.15, "ptx_coef": 3.5, "episodes": 7680, "batch_size": 128}
    config["data"]["world"] = {"seed": 7, "demonstrations": 4000, "comparisons": 3000}
    config["arms"] = [
        {"name": "ppo", "changes": [["ptx_coef", 0]]},
        {"name": "ppo_ptx", "changes": []},
    ]
    return config


def write_run(
    path: Path, *, seeds: int = 2, iterations: int = 12, prompts: int = 9,
    kinds: tuple[str, ...] = KINDS, arms: tuple[str, ...] = ARMS,
) -> Path:  # fmt: skip
    rng = random.Random(0)
    for seed in range(seeds):
        at = path / f"seed{seed}"
        write_stage(at / "pretrain", supervised_rows(6 * iterations, 6, rng))
        write_stage(at / "sft", supervised_rows(3 * iterations, 9, rng))
        candidates = [
            {"epoch": n + 1, "step": 9 * n, "reward": n / 4, "reward_se": 0.01 * n}
            for n in range(iterations // 3)
        ]
        (at / "sft" / "candidates.json").write_text(json.dumps(candidates))
        (at / "sft" / "chosen.json").write_text(json.dumps(candidates[-1] | {"by": "reward"}))
        write_stage(at / "init", supervised_rows(2 * iterations, 9, rng))
        write_stage(at / "reward", reward_rows(3 * iterations, rng))
        for arm in arms:
            write_stage(at / arm, ppo_rows(arm, iterations, rng), timed_samples(iterations))
        (at / "evaluate.json").write_text(json.dumps(evaluation(prompts, kinds, rng)))
    (path / "config.json").write_text(json.dumps(config_json()))
    (path / "environment.json").write_text(
        json.dumps({"platform": "Linux x86-64", "cpu_count": 2, "packages": {"jax": "0.10.1"},
                    "devices": {"count": 1, "kind": "cpu"}, "python": "3.11.7",
                    "argv": ["instructax", "run", "--config", "configs/demo.py"]})
    )  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary()))
    (path / "data").mkdir()
    (path / "data" / "curation.json").write_text(
        json.dumps({"prompts": {"read": 9000, "kept": 8123, "personal_data": {"e-mail": 31}}})
    )
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = page.write_report(write_run(tmp_path_factory.mktemp("runs") / "demo"))
    assert path.name == "report.html"
    assert path.stat().st_size < 3_000_000
    return path.read_text(encoding="utf-8")


def test_every_figure_of_the_summary_is_on_the_page(whole: str) -> None:
    text = unescape(re.sub(r"<style.*?</style>|<svg.*?</svg>|<[^>]+>", " ", whole, flags=re.DOTALL))
    words = set(text.split())
    for key, value in figures.leaves(summary()):
        for shown in figures.format_number(value).split():
            assert shown in words, f"{key} = {shown} is missing"


def test_the_page_asks_nothing_of_the_network(whole: str) -> None:
    markup = " ".join(re.findall(r"<[^>]*>", whole))
    assert "http" not in markup.replace("http-equiv", "")
    assert not re.search(r"""(src|srcset|poster|action)\s*=|@import|<link|<iframe""", markup)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", whole))
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', whole))
    assert "default-src 'none'" in whole


def test_text_of_samples_is_escaped(whole: str) -> None:
    assert "<script" not in whole
    assert "<img" not in whole
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in whole


def test_what_a_colleague_asks_is_answered(whole: str) -> None:
    for words in ("68.1% (64.3 to 72.0)", "PPO-ptx against SFT, same length",
                  "instructax run --config configs/demo.py", "60 iterations of 128 episodes",
                  "average of the policy (EMA)", "ppo.kl_coef", "PPO with ptx_coef = 0",
                  "3.0 GiB", "no accelerator, 2 processor cores", "jax 0.10.1", "chosen by reward in seed0",
                  "Supervised fine-tuning (SFT): reward model&#39;s score of each epoch", "standard error is at most 0.03.", "9 min", "personal_data.e-mail"):  # fmt: skip
        assert words in whole, words
    assert figures.NOT_MEASURED not in whole


def test_ids_are_unique_and_referred_to(whole: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', whole)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', whole) + re.findall(r"url\(#([^)]+)\)", whole)
    assert set(targets) <= set(ids)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo_ptx"])
def test_one_stage_alone(tmp_path: Path, stage: str) -> None:
    rng = random.Random(1)
    rows = {"reward": reward_rows(6, rng), "ppo_ptx": ppo_rows(stage, 6, rng)}
    write_stage(tmp_path / "seed0" / stage, rows.get(stage, supervised_rows(6, 2, rng)))
    text = page.write_report(tmp_path).read_text()
    assert "Win rates: not measured" in text
    assert "<svg" in text


def measured_first(arm: str, iterations: int = 6) -> list[dict]:
    """Iterations 1, 2, ... as PPO logs them, behind a row of the init's pretraining loss alone."""
    rows = ppo_rows(arm, iterations, random.Random(6))
    later = [row | {"step": row["step"] + 1, "time": row["time"] + 9.0} for row in rows]
    return [{"step": 0, "time": 0.0, "eval/pretrain_nll": 2.25}, *later]


def test_the_alignment_tax_starts_at_the_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(2):
        for arm in ("ppo", "ppo_ptx"):
            write_stage(tmp_path / f"seed{seed}" / arm, measured_first(arm))
    run = folder.read(tmp_path)
    drawn = []
    real = plots.curves
    monkeypatch.setattr(
        plots, "curves", lambda groups, **k: drawn.append(groups) or real(groups, **k)
    )
    (panel,) = sections.forgetting(run, run.arms)
    assert "RL init, iteration 0" in panel.note
    for arm, by_seed in drawn[0]:
        for x, y in by_seed.values():
            assert (x[0], y[0]) == (0, 0) and len(x) == 7
            assert y[1] == pytest.approx(measured_first(arm)[1]["eval/pretrain_nll"] - 2.25)


def test_without_a_row_of_the_init_the_tax_starts_where_it_was_first_measured(
    tmp_path: Path,
) -> None:
    write_stage(tmp_path / "seed0" / "ppo", measured_first("ppo")[1:])
    run = folder.read(tmp_path)
    (panel,) = sections.forgetting(run, run.arms)
    assert "first measurement" in panel.note


def test_a_row_of_the_init_leaves_the_rest_of_the_report_as_it_was(tmp_path: Path) -> None:
    pages = {}
    for name, first in (("with", 0), ("without", 1)):
        at = write_run(tmp_path / name / "demo", seeds=1, arms=())
        for arm in ("ppo", "ppo_ptx"):
            write_stage(at / "seed0" / arm, measured_first(arm)[first:], timed_samples(6))
        run = folder.read(at)
        pages[name] = [
            figures.stage_table(run).rows[-1][:4],
            [panel.svg for panel in sections.panels(run, run.arms, sections.PPO_MAIN, "iteration")],
        ]
        page.write_report(at)
    assert pages["with"] == pages["without"]


def test_an_arm_that_has_only_measured_its_init(tmp_path: Path) -> None:
    write_stage(tmp_path / "seed0" / "ppo_ptx", measured_first("ppo_ptx")[:1])
    assert "Loss on held-out pretraining text" in page.write_report(tmp_path).read_text()


def test_a_stage_in_the_run_folder_itself_and_a_summary_alone(tmp_path: Path) -> None:
    write_stage(tmp_path / "one" / "sft", supervised_rows(3, 1, random.Random(2)))
    assert "Supervised fine-tuning" in page.write_report(tmp_path / "one").read_text()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "summary.json").write_text('{"kl": {"ppo": 1.25}, "gold": null, "a": [3]}')
    assert "1.25" in page.write_report(tmp_path / "two").read_text()


def test_real_data_without_gold(tmp_path: Path) -> None:
    found = evaluation(2, KINDS, random.Random(3))
    for sample in found["samples"]:
        for response in sample["responses"].values():
            del response["gold"]
    del found["by_kind"]
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "evaluate.json").write_text(json.dumps(found))
    text = page.write_report(tmp_path).read_text()
    assert "Gold score: not measured" in text
    assert "Ombra, Selve and Tarn." in text


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("seed0/sft/metrics.jsonl", '{"step": 0}\n{"step": 1,\n{"step": 2}\n', 2),
        ("seed0/sft/metrics.jsonl", '{"step": 0}\n[1]\n', 2),
        ("seed0/sft/metrics.jsonl", '{"step": 0}\n\n{"loss/nll": 1}\n', 3),
        ("seed0/sft/metrics.jsonl", '{"step": NaN}\n', 1),
        ("seed0/sft/samples.jsonl", '{"step": 0}\nnonsense\n', 2),
        ("summary.json", '{\n"a": }', 2),
        ("config.json", "[]", 1),
    ],
)
def test_a_broken_file_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str, line: int
) -> None:
    write_stage(tmp_path / "seed0" / "sft", [{"step": 0, "loss/nll": 1.0}])
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}:{line}: ")):
        page.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_an_empty_or_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report"):
        page.write_report(tmp_path)
    with pytest.raises(UserError, match="no such run folder"):
        page.run(Config(run_dir=str(tmp_path), name="absent"))


def test_a_line_cut_by_a_kill_is_left_out_and_said(tmp_path: Path) -> None:
    write_stage(tmp_path / "seed0" / "sft", [{"step": 0, "loss/nll": 1.0}])
    with (tmp_path / "seed0" / "sft" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss')
    assert "unfinished last line 2" in page.write_report(tmp_path).read_text()


def test_after_a_resume_the_later_row_of_a_step_stands(tmp_path: Path) -> None:
    rows = [{"step": s, "loss/nll": float(s)} for s in (0, 1, 2)]
    again = [{"step": s, "loss/nll": 10.0 + s} for s in (1, 2, 3)]
    write_stage(tmp_path / "seed0" / "sft", rows + again)
    steps, values = folder.read(tmp_path).curves("sft", "loss/nll")["seed0"]
    assert steps.tolist() == [0, 1, 2, 3]
    assert values.tolist() == [0.0, 11.0, 12.0, 13.0]


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    values = (1.0, math.nan, "x")
    rows: list[dict] = [{"step": s, "loss/nll": value} for s, value in enumerate(values)]
    write_stage(tmp_path / "seed0" / "sft", rows)
    assert folder.read(tmp_path).curves("sft", "loss/nll")["seed0"][1].tolist() == [1.0]
    page.write_report(tmp_path)


def test_labels_of_a_plot_keep_their_decimals_and_take_the_colours_of_the_page() -> None:
    svg = plots.dots(["accuracy 0.682"], [("ppo", [0.0625])], label="0.682 & <b>", x_label="x")
    assert ">accuracy 0.682<" in svg
    assert 'aria-label="0.682 &amp; &lt;b>"' in svg
    assert "var(--c2)" in svg
    assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(id|href)="[^"]*"', "", svg))


def test_names_and_texts_of_any_spelling(tmp_path: Path) -> None:
    found = evaluation(4, ("costs $5_{", "a<b & c", "$x$", "\ud800 half"), random.Random(4))
    found["nll_by_topic"] = {p: {"$y^{": 1.0, "</svg>": 2.0} for p in ("init", "ppo")}
    write_stage(tmp_path / "seed0" / "an arm <b>", ppo_rows("ppo", 3, random.Random(5)))
    (tmp_path / "seed0" / "evaluate.json").write_text(json.dumps(found))
    text = page.write_report(tmp_path).read_text(encoding="utf-8")
    assert ">costs $5 {<" in text and ">$y^{<" in text and ">&lt;/svg&gt;<" in text
    assert text.count("<svg") == text.count("</svg>")
    assert "an arm <b>" not in text


def test_signs_and_zeros_of_figures() -> None:
    shown = [figures.signed(v) for v in (0.0304, -0.0304, -0.0001, None)]
    assert shown == ["+0.030", "\N{MINUS SIGN}0.030", "0.000", figures.NOT_MEASURED]


def test_every_text_of_a_plot_follows_the_theme(whole: str) -> None:
    texts = [t for svg in re.findall(r"<svg.*?</svg>", whole, flags=re.DOTALL)
             for t in re.findall(r"<text[^>]*>", svg)]  # fmt: skip
    assert len(texts) > 100
    assert not [t for t in texts if "fill: var(--" not in t]


def test_mean_over_seeds_takes_the_steps_they_share() -> None:
    x, y = plots._mean([
        (np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 4.0])),
        (np.array([1.0, 2.0, 3.0]), np.array([4.0, 6.0, 8.0])),
    ])  # fmt: skip
    assert x.tolist() == [1.0, 2.0]
    assert y.tolist() == [3.0, 5.0]


def test_settings_show_only_what_differs(tmp_path: Path) -> None:
    run = folder.read(write_run(tmp_path / "demo", seeds=1, iterations=3, arms=("ppo",)))
    method, sizes = figures.settings(run)
    assert ("ppo.kl_coef", "0.02", "0.15") in method.rows
    assert not [row for row in method.rows if row[0] == "ppo.gae_lambda"]
    assert ("model.num_layers", "12", "4") in sizes.rows


def test_an_ablation_of_other_arms_shows_its_own(tmp_path):
    names = ["beta0", "beta0_ptx"]
    path = write_run(tmp_path / "run", seeds=1, arms=tuple(names))
    config = config_json() | {"arms": [{"name": name, "changes": []} for name in names]}
    (path / "config.json").write_text(json.dumps(config))
    run = folder.read(path)
    assert sections.main_arms(run) == names
    assert [what for what, _, _ in figures.headline(run)] == [
        "Reward model, accuracy on held-out labelers"
    ]
