"""The words and tables of the report: names, formatted figures, settings that differ."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from instructax.config import Config
from instructax.report.folder import Row, RunFolder, is_number, items, number, table
from instructax.report.plots import Interval

NOT_MEASURED = "not measured"

STAGES = {
    "pretrain": ("Pretraining", "language model on text", "loss/nll"),
    "sft": ("Supervised fine-tuning (SFT)", "imitates demonstrations", "loss/nll"),
    "init": ("RL init", "a short SFT with some pretraining text; PPO starts here", "loss/nll"),
    "reward": ("Reward model", "learns which response labelers prefer", "loss/loss"),
}  # fmt: skip

_POLICIES = {
    "demonstrations": "demonstrations",
    "base": "pretrained model",
    "sft": "SFT",
    "init": "RL init",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
    "best_of_n": "best of n",
    "shuffled": "PPO on shuffled scores",
    "ptx_only": "ptx steps without RL",
    "beta0": "PPO without KL penalty",
    "beta0_ptx": "PPO-ptx without KL penalty",
}
POLICY_ORDER = tuple(_POLICIES)
GOLD_PARTS = ("helpful", "truthful", "harmless", "total")


@dataclass(frozen=True)
class Table:
    """Cells as text; the first `text_columns` are words, the rest figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


def policy(name: str) -> str:
    """A policy's or arm's name in words."""
    return _POLICIES.get(name, name.replace("_", " "))


def ordered(names: Sequence[str]) -> list[str]:
    """Policies in the order of the recipe, then others as they came."""
    known = [n for n in POLICY_ORDER if n in names]
    return known + [n for n in dict.fromkeys(names) if n not in known]


def format_number(value: object) -> str:
    """Integers in full with separators, floats to four figures, nothing as "not measured"."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 or not is_number(value) else f"{value:,.0f}"
    return str(value)


def fixed(value: float | None, digits: int = 3, sign: str = "") -> str:
    """With a fixed number of decimals and a true minus sign; `sign` "+" marks gains too."""
    if value is None:
        return NOT_MEASURED
    rounded = round(value, digits) + 0.0  # turns -0.0 into 0.0
    text = f"{rounded:{sign if rounded else ''}.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(value: float | None) -> str:
    return fixed(value, sign="+")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOT_MEASURED
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{minutes} min" if minutes < 120 else f"{hours:.1f} h"


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, scalar) for everything in nested JSON; short lists of scalars stay whole."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    elif isinstance(value, (dict, list)):
        yield path, ", ".join(format_number(v) for v in value) or "none"
    else:
        yield path, value


def leaf_table(value: Row, head: Sequence[str] = ("figure", "value")) -> Table:
    return Table(head, [(key, format_number(v)) for key, v in leaves(value)])


def summary_table(run: RunFolder) -> Table:
    """Every figure of summary.json but the points of the over-optimisation plot."""
    return leaf_table({k: v for k, v in run.summary.items() if k != "overoptimisation"})


def records_table(records: Sequence[Row]) -> Table:
    """Records of the same fields as rows."""
    keys = list(dict.fromkeys(key for record in records for key in record))
    rows = [[format_number(record.get(key)) for key in keys] for record in records]
    return Table(keys, rows)


def lede(run: RunFolder) -> list[str]:
    """What was run, on what, for how long, in sentences; what is unknown is left out."""
    model, ppo = table(run.config, "model"), table(run.config, "ppo")
    sentences = []
    layers, width, context = (number(model, k) for k in ("num_layers", "d_model", "context_length"))
    if layers is not None and width is not None:
        sentences.append(
            f"A decoder-only transformer of {layers:.0f} layers and width {width:.0f}"
            f"{_parameters(model)}"
            + (f", with {context:,.0f} positions of context." if context else ".")
        )
    data = table(run.config, "data")
    world = table(data, "world")
    if world:
        sizes = [
            f"{value:,} {key.removeprefix('num_').replace('_', ' ')}"
            for key, value in world.items()
            if is_number(value) and isinstance(value, int) and key != "seed"
        ]
        sentences.append(
            "The data is an embedded world with exact ground truth, made by a generator"
            + (f": {', '.join(sizes)}." if sizes else ".")
        )
    elif data:
        named = [k for k in ("pretrain", "demonstrations", "comparisons", "prompts") if data.get(k)]
        sentences += [f"{k.capitalize()}: {', '.join(map(str, data[k]))}." for k in named]
    episodes, batch = number(ppo, "episodes"), number(ppo, "batch_size")
    if run.arms and episodes and batch:
        sentences.append(
            f"PPO ran for {episodes / batch:,.0f} iterations of {batch:,.0f} episodes, in the arms "
            f"{', '.join(map(policy, run.arms))}."
        )
    if len(run.seeds) > 1:
        sentences.append(f"{len(run.seeds)} seeds ({', '.join(run.seeds)}).")
    elif (seed := number(run.config, "seed")) is not None:
        sentences.append(f"One seed ({seed:.0f}).")
    cost = []
    if (seconds := number(run.summary, "seconds")) is not None:
        cost.append(f"took {duration(seconds)} in all")
    if (memory := number(run.summary, "peak_rss_bytes")) is not None:
        cost.append(f"used at most {memory / 2**30:.1f} GiB of memory")
    if cost:
        sentences.append(f"It {' and '.join(cost)}.")
    if machine := _machine(run.environment):
        sentences.append(f"Machine: {', '.join(machine)}.")
    return sentences


def _machine(environment: Row) -> list[str]:
    parts = []
    count, kind = (table(environment, "devices").get(key) for key in ("count", "kind"))
    if count and kind:
        parts.append(f"{count} x {kind}" if kind != "cpu" else "no accelerator")
    if cores := environment.get("cpu_count"):
        parts.append(f"{cores} processor cores")
    named = {"python": "Python", "platform": ""}
    parts += [f"{word} {environment[k]}".strip() for k, word in named.items() if environment.get(k)]
    jax = table(environment, "packages").get("jax")
    return [*parts, f"jax {jax}"] if jax else parts


def _parameters(model: Row) -> str:
    """Weights of the matrices, from the shapes; norms and biases are below one per cent."""

    def size(key: str, default: float) -> float:
        value = number(model, key)
        return default if value is None else value

    layers, width = size("num_layers", 0), size("d_model", 0)
    heads, vocab = size("num_heads", 1), size("vocab_size", 0)
    head = size("d_head", width / max(heads, 1))
    gated = model.get("activation") == "swiglu"
    block = 2 * width * head * (heads + size("num_kv_heads", heads))
    block += (3 if gated else 2) * width * size("d_ff", 4 * width)
    embeddings = vocab * width * (1 if model.get("tie_embeddings", True) else 2)
    if model.get("positions", "learned") == "learned":
        embeddings += size("context_length", 0) * width
    total = layers * block + embeddings
    if total <= 0:
        return ""
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if total >= unit:
            return f" (about {total / unit:.3g} {name} parameters)"
    return f" (about {total:.0f} parameters)"


def win_rates(run: RunFolder) -> list[Interval]:
    rows = []
    for key, value in table(run.summary, "winrate").items():
        mean = number(run.summary, "winrate", key, "mean")
        if mean is None:
            continue
        left, _, right = key.partition("_vs_")
        right, matched, _ = right.partition("_length_matched")
        label = f"{policy(left)} against {policy(right)}" if right else policy(left)
        label += ", same length" if matched else ""
        low, high = (number(value, end) for end in ("low", "high"))
        rows.append(Interval(label, left, mean, low, high))
    return rows


def headline(run: RunFolder) -> list[tuple[str, str, str]]:
    """(what, figure, remark) of the few figures a reader looks for first."""
    s = run.summary

    def figure(*path: str, form: str = "{:.3f}") -> str:
        value = number(s, *path)
        return NOT_MEASURED if value is None else form.format(value)

    def against_init(name: str) -> str:
        value, init = number(s, "pretrain_nll", name), number(s, "pretrain_nll", "init")
        return signed(None if value is None or init is None else value - init)

    reward = (
        "Reward model, accuracy on held-out labelers",
        figure("reward", "accuracy_heldout"),
        (
            f"the gold score itself reaches {figure('reward', 'ceiling')}; "
            f"two labelers agree on {figure('labelers', 'agreement')}"
        ),
    )
    if run.arms and not {"ppo", "ppo_ptx"} & set(run.arms):
        return [reward]  # an ablation, whose arms have other names
    return [
        reward,
        ("Gold score, PPO-ptx", figure("gold", "ppo_ptx", "total"),
         (f"PPO {figure('gold', 'ppo', 'total')}, SFT {figure('gold', 'sft', 'total')}, "
         f"demonstrations {figure('gold', 'demonstrations', 'total')}")),
        ("KL from the RL init, PPO-ptx", figure("kl", "ppo_ptx", form="{:.2f} nats"),
         f"a response; PPO {figure('kl', 'ppo', form='{:.2f}')}"),
        ("Alignment tax, PPO-ptx", against_init("ppo_ptx"),
         (f"nats a token of pretraining text against the RL init; PPO {against_init('ppo')}, "
         f"ptx steps alone {against_init('ptx_only')}")),
        ("Response length, PPO-ptx", figure("length", "ppo_ptx", form="{:.1f} tokens"),
         (f"PPO {figure('length', 'ppo', form='{:.1f}')}, "
         f"SFT {figure('length', 'sft', form='{:.1f}')}")),
    ]  # fmt: skip


def stage_table(run: RunFolder) -> Table:
    rows = []
    for name in [*STAGES, *run.arms]:
        arm = (policy(name), _arm_changes(run, name), "objective/score")
        title, what, metric = STAGES.get(name, arm)
        by_seed = run.metrics.get(name, {})
        if not by_seed:
            rows.append((title, what, *[NOT_MEASURED] * 3))
            continue
        ends = [(y[0], y[-1]) for _, y in run.curves(name, metric).values()]
        change = NOT_MEASURED
        if ends:
            first, last = (sum(e) / len(e) for e in zip(*ends, strict=True))
            kind = "score" if metric == "objective/score" else "loss"
            change = f"{kind} {fixed(first)} to {fixed(last)}"
        for choice in list(run.chosen.get(name, {}).values())[:1]:
            what += f"; epoch {choice.get('epoch')} chosen by {choice.get('by')}"
            what += f" in {next(iter(run.chosen[name]))}" if len(by_seed) > 1 else ""
        steps = max(rows_[-1]["step"] for rows_ in by_seed.values())
        times = [t for rows_ in by_seed.values() if (t := _elapsed(rows_)) is not None]
        seconds = sum(times) / len(times) if times else None
        rows.append((title, what, format_number(steps), change, duration(seconds)))
    return Table(("stage", "what it does", "last step", "first to last", "time a seed"), rows, 2)


def _elapsed(rows: Sequence[Row]) -> float | None:
    """Seconds from the first row to the last."""
    times = [row["time"] for row in rows if is_number(row.get("time"))]
    return times[-1] - times[0] if times else None


def _arm_changes(run: RunFolder, name: str) -> str:
    for arm in items(run.config.get("arms")):
        if arm.get("name") == name:
            changes = [f"{key} = {format_setting(value)}" for key, value in arm.get("changes", [])]
            return "PPO with " + ", ".join(changes) if changes else "PPO as configured"
    return "an arm of PPO"


def settings(run: RunFolder) -> tuple[Table, Table]:
    """What differs from the paper's defaults: (training settings, sizes and data)."""
    default = dict(leaves(json.loads(json.dumps(dataclasses.asdict(Config())))))
    given = dict(leaves({k: v for k, v in run.config.items() if k != "arms"}))
    rows = [
        (key, format_setting(default.get(key)), format_setting(value))
        for key, value in given.items()
        if default.get(key) != value
    ]
    training = ("pretrain.", "sft.", "init.", "reward.", "ppo.", "evaluate.")
    head = ("setting", "paper's default", "this run")
    method = [r for r in rows if r[0].startswith(training) and not r[0].startswith("reward.model")]
    return Table(head, method, 3), Table(head, [r for r in rows if r not in method], 3)


def format_setting(value: object) -> str:
    """A setting as one would write it: no rounding."""
    if value is None or value == "":
        return "none"
    return str(value) if isinstance(value, float) else format_number(value)


def gold_table(run: RunFolder) -> Table | None:
    gold = table(run.summary, "gold")
    rows = []
    for name in ordered([k for k, v in gold.items() if isinstance(v, dict)]):
        values = [number(gold, name, part) for part in GOLD_PARTS]
        rows.append((policy(name), *map(fixed, values)))
    return Table(("policy", *GOLD_PARTS), rows) if rows else None


def forgetting_table(run: RunFolder) -> Table | None:
    nll = table(run.summary, "pretrain_nll")
    init = number(nll, "init")
    rows = []
    for name in ordered([k for k, v in nll.items() if is_number(v)]):
        value = number(nll, name)
        change = None if value is None or init is None else value - init
        rows.append((policy(name), fixed(value), signed(change)))
    return Table(("policy", "loss, nats a token", "against RL init"), rows) if rows else None


def command(run: RunFolder) -> str:
    """The command that made the run, where it was recorded."""
    argv = run.environment.get("argv")
    if isinstance(argv, list) and argv:
        words = shlex.join(map(str, argv))
        # Run as a module, a program's own name is that of its file.
        return words.replace("__main__.py", "python -m instructax", 1)
    name = run.config.get("name")
    return "instructax run --config FILE" + (f" --name {shlex.quote(str(name))}" if name else "")
