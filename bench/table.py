"""From seconds to figures: medians, spreads, ratios, and the Markdown tables of bench/README.md."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench import roofline
from bench.cases import Case, lengths

COLUMNS = ("shipped", "tuned", "compiled", "ours")
HEADS = {
    "shipped": "peer as shipped",
    "tuned": "peer tuned",
    "compiled": "peer compiled",
    "ours": "ours",
}
NOT_MEASURED = "not measured"

Rounds = Sequence[Sequence[float]]
Found = Mapping[str, Mapping[str, Rounds]]  # case key -> column -> seconds of each round's units


def median(rounds: Rounds) -> float:
    """Of the rounds' medians: a disturbed round counts once, however many units it has."""
    return statistics.median(statistics.median(seconds) for seconds in rounds)


def spread(rounds: Rounds) -> float:
    """(slowest - fastest) / median over the rounds' medians: the machine's noise."""
    middles = [statistics.median(seconds) for seconds in rounds]
    return (max(middles) - min(middles)) / statistics.median(middles)


def per_unit(case: Case, seconds: float) -> tuple[float, str]:
    """What a case is quoted in: tokens/s, or seconds a prompt or an episode."""
    w = case.work
    if w.kind == "sft":
        return w.rows * (w.prompt + w.response) / seconds, "tokens/s"
    if w.kind == "generate":
        return int(lengths(case).sum()) / seconds, "tokens/s"
    return seconds / w.rows, "s a prompt" if w.kind == "reward" else "s an episode"


def cell(case: Case, rounds: Rounds | None) -> str:
    if rounds is None:
        return NOT_MEASURED
    value, _ = per_unit(case, median(rounds))
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} ± {100 * spread(rounds) / 2:.0f}%"


def ratio(found: Found, key: str, column: str, ours: str) -> float | None:
    """How many times faster our case ``ours`` is than ``column`` of the case ``key``."""
    theirs, own = found.get(key, {}).get(column), found.get(ours, {}).get("ours")
    return None if theirs is None or own is None else median(theirs) / median(own)


def main_table(
    cases: Sequence[Case],
    found: Found,
    least: Mapping[str, float],
    peak: float | None = None,
) -> str:
    """A row a case. ``least``: the machine's least time by case key, of which our column is a fraction.

    ``peak`` FLOP/s of the maker's sheet add a column of model FLOPs utilisation.
    """
    columns = [c for c in COLUMNS if any(c in case.columns for case in cases)]
    heads = ["case", "size", "quoted in", *(HEADS[c] for c in columns), "ours of the limit"]
    heads += [] if peak is None else [f"ours of {peak / 1e12:.0f} TFLOP/s"]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for case in cases:
        of_case = found.get(case.key, {})
        cells = [cell(case, of_case.get(c)) if c in case.columns else "-" for c in columns]
        bounds = [least.get(case.key)] + ([] if peak is None else [roofline.flops(case) / peak])
        cells += [_share(of_case.get("ours"), bound) for bound in bounds]
        lines.append(_row([case.name, case.size, per_unit(case, 1.0)[1], *cells]))
    return "\n".join(lines)


def _share(rounds: Rounds | None, bound: float | None) -> str:
    return "-" if rounds is None or bound is None else f"{100 * bound / median(rounds):.0f}%"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def comparisons(cases: Sequence[Case]) -> list[tuple[str, str, str, str]]:
    """(what, other case, its column, our case): every ratio that is quoted.

    Like against like; the three ways to train on a ranking do the same work, so the shared prompt is
    also set against the other two.
    """
    chosen: list[tuple[str, str, str, str]] = []
    for ours in cases:
        for other in cases:
            alike = other is ours or (
                ours.form == "shared" and other.form != "" and other.size == ours.size
            )
            for column in other.columns if alike and "ours" in ours.columns else ():
                if (other, column) != (ours, "ours"):
                    form = "" if other is ours else f", {other.name}"
                    what = f"{ours.name}, {ours.size}: over {HEADS[column]}{form}"
                    chosen.append((what, other.key, column, ours.key))
    return chosen


def ratio_table(cases: Sequence[Case], found: Found) -> str:
    lines = ["| times as fast | |", "|---|---|"]
    for what, key, column, ours in comparisons(cases):
        value = ratio(found, key, column, ours)
        lines.append(f"| {what} | {NOT_MEASURED if value is None else f'{value:.2f}'} |")
    return "\n".join(lines)


def where_table(
    cases: Sequence[Case],
    found: Found,
    went: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]],
) -> str:
    """Seconds of one unit, those of its matrix products as a profiler saw them, and what that leaves; medians.

    The unit is timed without the profiler, which slows a library of many small operations down. The share in
    which no operation of a compiled program ran is of the traced unit.
    """
    heads = [
        *("case", "size", "column", "s a unit", "matrix products", "everything else"),
        "between programs",
    ]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for case in cases:
        for column in COLUMNS:
            if (rounds := went.get(case.key, {}).get(column)) is not None:
                unit = median(found[case.key][column])
                products = statistics.median(kinds["matrix products"] for kinds in rounds)
                cells = [f"{x:.3g}" for x in (unit, products, unit - products)]
                idle = [k["between programs"] / k["all"] for k in rounds if "between programs" in k]
                cells.append(f"{statistics.median(idle):.1%}" if idle else "-")
                lines.append(_row([case.name, case.size, HEADS[column], *cells]))
    return "\n".join(lines)
