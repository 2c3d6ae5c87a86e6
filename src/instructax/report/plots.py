"""Inline SVG plots in the colours of the page, so that they follow light and dark mode.

Matplotlib is given one stand-in colour per CSS variable and the SVG text is rewritten afterwards.
Widths are CSS pixels of a phone, so that labels keep their size there. Colours are near those of
Okabe and Ito, distinguishable with any colour vision; policies also differ by their dashes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, MultipleLocator

Curves = Mapping[str, tuple[np.ndarray, np.ndarray]]

WIDTH, HEIGHT = 340, 220
MAX_POINTS = 160

INK, MUTED, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper"} | {
    f"#0{slot}0a0b": f"--c{slot}" for slot in range(8)
}
_DASHES = {"solid": "-", "dashed": (0, (5, 2)), "dotted": (0, (1.2, 1.6))}

_STYLES = {
    "demonstrations": (0, "dotted"),
    "base": (0, "dashed"),
    "init": (0, "solid"),
    "sft": (1, "solid"),
    "ppo": (2, "solid"),
    "ppo_ptx": (3, "solid"),
    "best_of_n": (4, "solid"),
    "shuffled": (5, "dashed"),
    "ptx_only": (6, "dotted"),
    "beta0": (2, "dashed"),
    "beta0_ptx": (3, "dashed"),
}
_SPARE = ((4, "dashed"), (5, "solid"), (6, "solid"), (7, "solid"), (7, "dashed"), (1, "dashed"))

_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "path.simplify": True,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Style:
    """Slot of the page's palette and a kind of dash; the same name looks the same everywhere."""

    slot: int
    dash: str

    @property
    def colour(self) -> str:
        return f"#0{self.slot}0a0b"


@dataclass(frozen=True)
class Interval:
    """A share with its interval, both ends None where none was measured."""

    label: str
    name: str
    mean: float
    low: float | None
    high: float | None


def style(name: str) -> Style:
    """How a policy or arm is drawn; names without a fixed style take one by their spelling."""
    spare = _SPARE[sum(name.encode()) % len(_SPARE)]
    return Style(*_STYLES.get(name, spare))


def curves(
    groups: Sequence[tuple[str, Curves]],
    *,
    label: str,
    x_label: str,
    baseline: float | None = None,
    markers: bool = False,
) -> str:
    """Seeds as thin lines and their mean as a thick one, for each named group."""
    figure, axes = _figure()
    if baseline is not None:
        axes.axhline(baseline, color=MUTED, linewidth=1)
    for name, by_seed in groups:
        look = style(name)
        line: dict[str, Any] = {"color": look.colour, "linestyle": _DASHES[look.dash]}
        if markers:
            line |= {"marker": "o", "markersize": 3.2}
        binned = {seed: _binned(x, y) for seed, (x, y) in by_seed.items()}
        if len(binned) > 1:
            for x, y in binned.values():
                axes.plot(x, y, color=look.colour, linewidth=0.8, alpha=0.4)
        axes.plot(*_mean(list(binned.values())), linewidth=1.9, **line)
    axes.set_xlabel(x_label)
    axes.margins(x=0.02)
    return _svg(figure, label)


def trajectories(
    arms: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    *,
    label: str,
    x_label: str,
    baseline: float | None = None,
) -> str:
    """One path a run through points in the order given, its start marked by an open circle."""
    figure, axes = _figure()
    if baseline is not None:
        axes.axhline(baseline, color=MUTED, linewidth=1)
    for name, points in arms:
        look = style(name)
        x, y = np.array(points).T
        axes.plot(x, y, color=look.colour, linestyle=_DASHES[look.dash], linewidth=1.7)
        axes.plot(x[1:], y[1:], color=look.colour, linestyle="none", marker="o", markersize=3.5)
        axes.plot(x[:1], y[:1], color=look.colour, marker="o", markersize=5, markerfacecolor="none")
    axes.set_xlabel(x_label)
    return _svg(figure, label)


def win_rates(rows: Sequence[Interval], *, label: str) -> str:
    """Shares in percent with their intervals, the line of no difference at 50."""
    figure, axes = _figure(height=46 + 48 * len(rows))
    low = min([40.0, *(100 * (r.mean if r.low is None else r.low) - 3 for r in rows)])
    high = max([75.0, *(100 * (r.mean if r.high is None else r.high) + 3 for r in rows)])
    axes.axvline(50, color=INK, linewidth=1)
    for row, r in enumerate(rows):
        look = style(r.name)
        y = -row
        if r.low is not None and r.high is not None:
            axes.plot(
                [100 * r.low, 100 * r.high],
                [y, y],
                color=look.colour,
                linewidth=7,
                alpha=0.35,
                solid_capstyle="butt",
            )
        axes.plot([100 * r.mean], [y], color=look.colour, marker="o", markersize=7)
        axes.annotate(
            f"{r.label[:1].upper()}{r.label[1:]}:  {percent_with_interval(r)}", (0, y), (0, 11),
            xycoords=("axes fraction", "data"), textcoords="offset points", va="bottom", color=INK,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    axes.set_xlim(max(low, 0), min(high, 100))
    axes.set_ylim(-len(rows) + 0.6, 0.75)
    axes.xaxis.set_major_locator(MultipleLocator(10))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    axes.set_xlabel("preferred, % of prompts (ties count half)")
    return _svg(figure, label)


def percent_with_interval(r: Interval) -> str:
    mean = f"{100 * r.mean:.1f}%"
    if r.low is None or r.high is None:
        return f"{mean} (interval not measured)"
    return f"{mean} ({100 * r.low:.1f} to {100 * r.high:.1f})"


def dots(
    rows: Sequence[str],
    groups: Sequence[tuple[str, Sequence[float | None]]],
    *,
    label: str,
    x_label: str,
    references: Sequence[float] = (),
) -> str:
    """One row a label, one dot a policy, with vertical reference lines; the first is solid."""
    figure, axes = _figure(height=58 + 24 * len(rows))
    for index, reference in enumerate(references):
        axes.axvline(
            reference, color=INK if index == 0 else MUTED, linewidth=1,
            linestyle="-" if index == 0 else _DASHES["dashed"],
        )  # fmt: skip
    spread = 0.16 if len(groups) > 1 else 0.0
    for index, (name, values) in enumerate(groups):
        shift = spread * ((len(groups) - 1) / 2 - index)
        points = [(v, shift - row) for row, v in enumerate(values) if v is not None]
        if points:
            x, y = np.array(points).T
            look = style(name)
            face = "none" if look.dash != "solid" else look.colour
            axes.plot(
                x, y, color=look.colour, linestyle="none", marker="o", markersize=6,
                markerfacecolor=face, markeredgewidth=1.5,
            )  # fmt: skip
    axes.set_yticks([-row for row in range(len(rows))], list(rows))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.set_xlabel(x_label)
    return _svg(figure, label)


def calibration(groups: Sequence[Sequence[tuple[float, float, float]]], *, label: str) -> str:
    """(predicted, observed, count) points against the diagonal, their areas by count."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=_DASHES["dashed"])
    look = style("sft")
    for points in groups:
        p, frequency, count = np.array(sorted(points)).T
        area = 14 + 90 * count / max(count.max(), 1)
        axes.plot(p, frequency, color=look.colour, linewidth=1.2)
        axes.scatter(p, frequency, s=area, color=look.colour, alpha=0.7, linewidth=0)
    axes.set_xlabel("predicted probability of being preferred")
    axes.set_ylabel("observed share")
    return _svg(figure, label)


def _figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(_RC):
        # One SVG unit is a point of matplotlib's, so 72 to the inch makes them CSS pixels.
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(length=3)
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    for artist in figure.findobj(Text):
        if isinstance(artist, Text):
            artist.set_parse_math(False)  # a dollar in a name is a dollar
    buffer = io.StringIO()
    # Ids are hashes of content and salt; a salt of its own keeps them apart on one page.
    with matplotlib.rc_context({**_RC, "svg.hashsalt": label}):
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Inline SVG needs no namespaces, no ids that nothing refers to, and takes the page's font.
    text = re.sub(r"<(metadata|style).*?</\1>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" ROLE>', text, count=1)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    # Coordinates need no more than a decimal; the text between tags stays as it is.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    name = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("ROLE", f'role="img" aria-label="{name}"', 1)


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of runs of neighbours, at most MAX_POINTS of them."""
    if len(x) <= MAX_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MAX_POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def _mean(by_seed: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds at the steps that all of them have; the first seed where they share none."""
    shared = set(by_seed[0][0].tolist())
    for x, _ in by_seed[1:]:
        shared &= set(x.tolist())
    if not shared:
        return by_seed[0]
    steps = np.array(sorted(shared))
    rows = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in by_seed]
    return steps, np.array([np.mean([row[s] for row in rows]) for s in steps.tolist()])
