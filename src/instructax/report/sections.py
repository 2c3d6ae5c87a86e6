"""What each section of the report shows: panels of plots, tables and samples from a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from instructax.report import figures, plots
from instructax.report.folder import Row, RunFolder, items, number, table

PROMPTS_PER_KIND = 3
PROMPTS_OVER_TIME = 4
TIMES_SHOWN = 6


@dataclass(frozen=True)
class Panel:
    """One plot with its title in words, its technical names, and how to read it."""

    title: str
    svg: Markup
    names: Sequence[str] = ()
    note: str = ""


def legend(name: str) -> Row:
    look = plots.style(name)
    return {"label": figures.policy(name), "slot": look.slot, "dash": look.dash}


def main_arms(run: RunFolder) -> list[str]:
    """Arms of the main comparison: those of over-optimisation have plots of their own.

    All arms where there are no others, as in an ablation of its own.
    """
    apart = {str(p.get("arm")) for p in items(run.summary.get("overoptimisation"))}
    return [arm for arm in run.arms if arm not in apart - {"ppo", "ppo_ptx"}] or run.arms


def win_rates(run: RunFolder) -> Markup | None:
    rows = figures.win_rates(run)
    spoken = "; ".join(f"{r.label} {plots.percent_with_interval(r)}" for r in rows)
    return Markup(plots.win_rates(rows, label=f"Win rates: {spoken}")) if rows else None


PPO_MAIN = (
    ("objective/score", "Reward model's score", "Mean over the responses of an iteration."),
    ("objective/kl", "KL from the RL init", "Nats a response, summed over its tokens."),
    ("objective/rlhf_reward", "Reward with the KL penalty", "What PPO maximises."),
    ("response_length/mean", "Response length", "Tokens."),
    ("objective/entropy", "Entropy", "Of the policy's choices along a response."),
    (
        "val/num_eos_tokens",
        "Responses that end by themselves",
        "Ended by the end token, of an iteration.",
    ),
)
PPO_DETAILS = (
    ("ppo/policy/approxkl", "Size of a policy update", "Approximate KL of old and new policy."),
    ("ppo/policy/clipfrac", "Clipped share", "Tokens whose ratio left the clip range."),
    ("ppo/val/var_explained", "Value network's fit", "Share of the returns' variance explained."),
    ("ppo/loss/policy", "Policy loss", ""),
    ("ppo/loss/value", "Value loss", ""),
    ("val/first_ratio_deviation", "First ratio's deviation", "0 when rollout and training agree."),
    ("val/ratio_max_deviation", "Largest deviation of a ratio", "Of any token, from 1."),
    ("grad_norm/ppo", "Norm of the PPO gradient", ""),
    ("grad_norm/ptx", "Norm of the pretraining gradient", "Before its weight in the sum."),
    ("grad/cosine", "Cosine of the two gradients", ""),
)  # fmt: skip


def panels(
    run: RunFolder, stages: Sequence[str], metrics: Sequence[tuple[str, str, str]], x_label: str
) -> list[Panel]:
    """One panel a metric that any of the stages has logged, one line a stage."""
    panels = []
    for metric, title, note in metrics:
        groups = [(s, by_seed) for s in stages if (by_seed := run.curves(s, metric))]
        if groups:
            svg = plots.curves(groups, label=f"{title} ({metric})", x_label=x_label)
            panels.append(Panel(title, Markup(svg), [metric], note))
    return panels


def supervised(run: RunFolder) -> list[Panel]:
    """Training and held-out curves of the stages before PPO."""
    panels = []
    for stage, (name, _, metric) in figures.STAGES.items():
        held_out = {"reward": "eval/loss"}.get(stage, "eval/nll")
        for title, names in (
            ("loss", (metric, held_out)),
            ("accuracy", ("loss/accuracy", "eval/accuracy")),
            ("reward model's score of each epoch", ("eval/reward",)),
        ):
            # Training is drawn in the neutral colour, held-out data in the accent.
            pairs = [
                ("init" if n == names[0] and len(names) > 1 else "sft", run.curves(stage, n), n)
                for n in names
            ]
            groups = [(look, by_seed) for look, by_seed, _ in pairs if by_seed]
            if groups:
                full = f"{name}: {title}"
                few = all(len(x) < 25 for _, c in groups for x, _ in c.values())
                svg = plots.curves(groups, label=full, x_label="step", markers=few)
                note = _standard_error(run, stage) if "eval/reward" in names else ""
                panels.append(Panel(full, Markup(svg), [n for _, c, n in pairs if c], note))
    return panels


def _standard_error(run: RunFolder, stage: str) -> str:
    errors = [y.max() for _, y in run.curves(stage, "eval/reward_se").values()]
    if not errors:
        return ""
    return f"Mean over validation prompts; its standard error is at most {max(errors):.2g}."


def forgetting(run: RunFolder, arms: Sequence[str]) -> list[Panel]:
    panels = []
    groups = []
    for arm in arms:
        by_seed = run.curves(arm, "eval/pretrain_nll")
        if by_seed:
            groups.append((arm, {seed: (x, y - y[0]) for seed, (x, y) in by_seed.items()}))
    if groups:
        title = "Loss on held-out pretraining text"
        svg = plots.curves(
            groups, label=f"{title}, change", x_label="PPO iteration", baseline=0.0,
            markers=all(len(x) < 25 for _, c in groups for x, _ in c.values()),
        )  # fmt: skip
        from_init = all(x[0] == 0 for _, c in groups for x, _ in c.values())
        start = "the RL init, iteration 0" if from_init else "the first measurement"
        note = f"Change since {start}, nats a token; up is forgetting."
        panels.append(Panel(title, Markup(svg), ["eval/pretrain_nll"], note))
    by_policy = _mean_over_seeds([table(e, "nll_by_topic") for e in run.evaluations.values()])
    init = by_policy.get("init")
    names = [n for n in figures.ordered(list(by_policy)) if n in ("ppo", "ppo_ptx", "ptx_only")]
    if init and names:
        changes = [
            (n, [by_policy[n][t] - init[t] if t in by_policy[n] else None for t in init])
            for n in names
        ]
        svg = plots.dots(
            list(init),
            changes,
            label="Forgetting by topic",
            x_label="nats a token",
            references=[0.0],
        )
        note = "Change against the RL init by topic of the text."
        panels.append(Panel("Forgetting by topic", Markup(svg), ["nll_by_topic"], note))
    return panels


def _mean_over_seeds(tables: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean of {policy: {key: number}} over seeds, where a seed has it."""
    collected: dict[str, dict[str, list[float]]] = {}
    for by_policy in tables:
        for name, values in by_policy.items():
            for key in values if isinstance(values, dict) else ():
                if (value := number(values, key)) is not None:
                    collected.setdefault(name, {}).setdefault(key, []).append(value)
    return {n: {k: float(np.mean(v)) for k, v in c.items()} for n, c in collected.items()}


def overoptimisation(run: RunFolder) -> Row | None:
    points = items(run.summary.get("overoptimisation"))
    arms = figures.ordered([str(p["arm"]) for p in points if "arm" in p])
    panels = []
    for key, title, note in (
        ("proxy", "Reward model's score", "What is optimised."),
        ("gold", "Gold score", "What is wanted."),
        ("pretrain_nll", "Loss on pretraining text", "Nats a token; up is forgetting."),
    ):
        paths = []
        for arm in arms:
            path = _by_step([p for p in points if str(p.get("arm")) == arm], key)
            if path:
                paths.append((arm, path))
        if paths:
            svg = plots.trajectories(
                paths, label=f"{title} against KL", x_label="KL from the RL init, nats a response"
            )
            panels.append(Panel(title, Markup(svg), [key], note))
    if not panels:
        return None
    return {
        "legend": [legend(arm) for arm in arms],
        "panels": panels,
        "table": figures.records_table(points),
    }


def _by_step(points: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """(KL, value) by rising step, averaged over seeds where several measured a step."""
    by_step: dict[float, list[tuple[float, float]]] = {}
    for index, p in enumerate(points):
        x, y, step = number(p, "kl"), number(p, key), number(p, "step")
        if x is not None and y is not None:
            by_step.setdefault(index if step is None else step, []).append((x, y))
    means = [np.mean(by_step[step], axis=0) for step in sorted(by_step)]
    return [(float(x), float(y)) for x, y in means]


def reward_model(run: RunFolder) -> list[Panel]:
    panels = []
    reward = table(run.summary, "reward")
    bars = (
        ("against the gold score", "accuracy_gold"),
        ("training labelers", "accuracy_train_labelers"),
        ("held-out labelers", "accuracy_heldout"),
        ("ceiling: gold itself", "ceiling"),
    )
    rows = [(label, v) for label, key in bars if (v := number(reward, key)) is not None]
    if rows:
        svg = plots.dots(
            [f"{label}  {v:.3f}" for label, v in rows], [("sft", [v for _, v in rows])],
            label="Accuracy on pairs of held-out prompts", x_label="accuracy on pairs",
        )  # fmt: skip
        note = "Pairs of held-out prompts, ties left out."
        panels.append(Panel("Which response is preferred", Markup(svg), ["reward"], note))
    tables = [table(e, "reward") for e in run.evaluations.values()]
    by_k = _mean_over_seeds([{"all": table(r, "accuracy_by_k")} for r in tables]).get("all")
    if by_k:
        ks = sorted(by_k, key=lambda k: (len(k), k))
        svg = plots.dots(
            [f"K = {k}  {by_k[k]:.3f}" for k in ks], [("sft", [by_k[k] for k in ks])],
            label="Accuracy by K", x_label="accuracy on pairs",
        )  # fmt: skip
        panels.append(
            Panel("Accuracy by number of responses", Markup(svg), ["accuracy_by_k"],
                  "K responses to a prompt were ranked together.")
        )  # fmt: skip
    groups = []
    for r in tables:
        rows_of_bins = items(r.get("calibration"))
        bins = [tuple(number(b, k) for k in ("p", "frequency", "n")) for b in rows_of_bins]
        groups.append([(p, f, n or 0.0) for p, f, n in bins if p is not None and f is not None])
    if any(groups):
        title = "Calibration"
        svg = plots.calibration([g for g in groups if g], label="Calibration of preferences")
        note = "On the dashed line, 70% sure is right 70% of the time; larger dots hold more pairs."
        panels.append(Panel(title, Markup(svg), ["sigmoid(r_w - r_l)"], note))
    return panels


def kinds(run: RunFolder) -> Row | None:
    """Gold by kind of task: gaps to SFT in SFT's standard deviations, and the means."""
    gaps, means = [], []
    for evaluation in run.evaluations.values():
        by_kind = table(evaluation, "by_kind")
        gap: Row = {}
        for name, kinds in by_kind.items():
            for kind in kinds if isinstance(kinds, dict) else ():
                mean, base = (number(by_kind, p, kind, "mean") for p in (name, "sft"))
                deviation = number(by_kind, "sft", kind, "sd")
                if name != "sft" and mean is not None and base is not None and deviation:
                    gap.setdefault(name, {})[kind] = (mean - base) / deviation
        gaps.append(gap)
        means.append({n: {k: number(v, k, "mean") for k in v} for n, v in by_kind.items()})
    averages = _mean_over_seeds(means)
    if not averages:
        return None
    names = figures.ordered(list(averages))
    tasks = sorted({kind for by_kind in averages.values() for kind in by_kind})
    rows = [
        (kind.replace("_", " "), *[figures.fixed(averages[name].get(kind)) for name in names])
        for kind in tasks
    ]
    gap_mean = _mean_over_seeds(gaps)
    compared = [n for n in names if n in gap_mean and n not in ("init", "demonstrations", "base")]
    panel = None
    if compared:
        svg = plots.dots(
            [kind.replace("_", " ") for kind in tasks],
            [(n, [gap_mean[n].get(kind) for kind in tasks]) for n in compared],
            label="Gold score by kind of task against SFT",
            x_label="standard deviations above SFT", references=[0.0, -0.3],
        )  # fmt: skip
        note = "Left of the solid line a policy does worse than SFT; the dashed line is 0.3 below."
        panel = Panel("By kind of task, against SFT", Markup(svg), ["by_kind"], note)
    return {
        "panel": panel,
        "legend": [legend(name) for name in compared],
        "table": figures.Table(("kind of task", *map(figures.policy, names)), rows),
    }


def samples(run: RunFolder) -> Row | None:
    """The first prompts of each kind with every policy's response, of the first seed judged."""
    for seed in run.seeds:
        samples = items(run.evaluations.get(seed, {}).get("samples"))
        if not samples:
            continue
        by_kind: dict[str, list[Row]] = {}
        for sample in samples:
            by_kind.setdefault(str(sample.get("kind", "prompts")), []).append(sample)
        kinds = [
            {
                "kind": kind.replace("_", " "),
                "count": len(found),
                "cards": [_card(sample) for sample in found[:PROMPTS_PER_KIND]],
            }
            for kind, found in by_kind.items()
        ]
        return {"seed": seed, "kinds": kinds, "count": len(samples), "shown": PROMPTS_PER_KIND}
    return None


def _card(sample: Row) -> Row:
    responses = table(sample, "responses")
    answers = []
    if "demonstration" in sample:
        demonstration = sample["demonstration"]
        text = demonstration.get("text", "") if isinstance(demonstration, dict) else demonstration
        answers.append({"name": "demonstrations", "label": "demonstration", "text": text,
                        "score": None, "gold": None})  # fmt: skip
    for name in figures.ordered(list(responses)):
        response = table(responses, name)
        answers.append(
            {
                "name": name,
                "label": figures.policy(name),
                "text": response.get("text", ""),
                "score": number(response, "score"),
                "gold": number(response, "gold", "total"),
            }
        )
    for answer in answers:
        answer["slot"] = plots.style(answer["name"]).slot
    return {"prompt": sample.get("prompt", ""), "answers": answers}


def over_time(run: RunFolder, arms: Sequence[str]) -> Row | None:
    """A few prompts' responses along training, of PPO-ptx where it ran, else of the first arm."""
    arm = next((a for a in ("ppo_ptx", *arms) if run.samples.get(a)), None)
    if arm is None:
        return None
    seed, rows = next(iter(run.samples[arm].items()))
    by_prompt: dict[str, dict[float, Row]] = {}
    for row in rows:
        key = str(row.get("id", row.get("prompt", "")))
        by_prompt.setdefault(key, {})[number(row, "step") or 0.0] = row
    prompts = []
    for by_step in list(by_prompt.values())[:PROMPTS_OVER_TIME]:
        steps = sorted(by_step)
        chosen = np.unique(np.linspace(0, len(steps) - 1, TIMES_SHOWN).round().astype(int))
        shown = [by_step[steps[i]] for i in chosen]
        prompts.append(
            {
                "prompt": shown[0].get("prompt", ""),
                "rows": [
                    {"step": f"{number(r, 'step') or 0:g}", "response": r.get("response", ""),
                     "score": number(r, "score"), "kl": number(r, "kl")}
                    for r in shown
                ],
            }
        )  # fmt: skip
    return {"arm": figures.policy(arm), "seed": seed, "prompts": prompts, "count": len(by_prompt)}
