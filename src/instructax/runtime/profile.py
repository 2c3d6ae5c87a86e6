"""`--profile`: a trace of a few steps, and one page that says where their time went."""

from __future__ import annotations

import itertools
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from instructax.runtime.distributed import is_main

# The first steps compile; then this many are traced.
AFTER, STEPS = 2, 3
LONGEST = 12
PAGE = "profile.md"

# First match wins: an operation is named after what the compiler fused, the heaviest part first.
KINDS: tuple[tuple[str, str], ...] = (
    ("collectives", r"all-(reduce|gather|to)|reduce-scatter|collective|send|recv|nccl"),
    ("matrix products", r"dot|ynn|gemm|cublas|convolution|matmul|custom-call"),
    (
        "gathers and scatters",
        r"gather|scatter|dynamic-slice|dynamic-update|dynamic_slice|dynamic_update",
    ),
    ("sorts and random bits", r"sort|rng|threefry|topk"),
    ("copies and transposes", r"copy|transpose|concatenate|pad"),
    ("reductions", r"reduce"),
)
ELEMENTWISE = "elementwise"
# They contain other operations or wait for them.
_CONTROL = re.compile(r"(while|conditional|call|tuple|get-tuple-element)\b")


@dataclass(frozen=True)
class Event:
    """One operation of a program on one line of the trace; times in nanoseconds."""

    line: str
    start: float
    end: float
    name: str
    program: str


def profiled(
    step: Callable[[int], Mapping[str, Any]], folder: Path, name: str, steps: int
) -> Callable[[int], Mapping[str, Any]]:
    """``step``, of whose ``steps`` calls a few are traced into ``folder``; then its page is written and named.

    The traced steps are waited for, so that their work lies within the trace. A loop too short for
    it is left alone.
    """
    if steps < AFTER + STEPS:
        print(f"{name}: {steps} steps are left, too few for a profile ({AFTER + STEPS})")
        return step
    calls, began = itertools.count(), 0.0

    def traced(i: int) -> Mapping[str, Any]:
        nonlocal began
        call = next(calls)
        if call == AFTER:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it slows Python down, and is not asked for
            jax.profiler.start_trace(str(folder), profiler_options=options)
            began = time.perf_counter()
        metrics = step(i)
        if AFTER <= call < AFTER + STEPS:
            jax.block_until_ready(metrics)
        if call == AFTER + STEPS - 1:
            seconds = time.perf_counter() - began
            jax.profiler.stop_trace()
            if is_main():
                title = f"{name}: steps {i - STEPS + 2} to {i + 1}"
                (folder / PAGE).write_text(page(title, read(folder), seconds), "utf-8")
                print(f"{name}: profile of {STEPS} steps in {folder / PAGE}", flush=True)
        return metrics

    return traced


def read(folder: Path) -> list[Event]:
    """The operations in the newest trace under ``folder``, those of every device and thread."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                program = dict(event.stats).get("hlo_module")
                if program is None and line.name == "XLA Ops":
                    program = plane.name
                if program is not None and event.duration_ns > 0:
                    end = event.start_ns + event.duration_ns
                    where = f"{plane.name} {line.name}"
                    found.append(Event(where, event.start_ns, end, event.name, str(program)))
    return found


def kind(name: str) -> str:
    """The kind of an operation by its name."""
    return next((k for k, pattern in KINDS if re.search(pattern, name)), ELEMENTWISE)


def own_time(events: Iterable[Event]) -> dict[tuple[str, str], float]:
    """Nanoseconds by (program, operation), without those of operations inside it."""
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    by_line: dict[str, list[Event]] = {}
    for event in events:
        by_line.setdefault(event.line, []).append(event)
    for line in by_line.values():
        around: list[Event] = []
        for event in sorted(line, key=lambda e: (e.start, -e.end)):
            while around and around[-1].end <= event.start:
                around.pop()
            if around:
                outer = around[-1]
                found[outer.program, outer.name] -= min(event.end, outer.end) - event.start
            found[event.program, event.name] += event.end - event.start
            around.append(event)
    return {key: t for key, t in found.items() if not _CONTROL.match(key[1])}


def busy_time(events: Iterable[Event]) -> float:
    """Nanoseconds in which at least one operation ran, on any line."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def page(title: str, events: Sequence[Event], seconds: float) -> str:
    """Where ``seconds`` of STEPS steps went: by program, by kind of operation in each, the longest operations."""
    own = own_time(events)
    if not own:
        return f"# {title}\n\nThe trace holds no operation of a compiled program.\n"
    total = sum(own.values())
    programs = _sums(own, lambda program, _: program)
    kinds = _sums(own, lambda _, name: kind(name))
    cells = _sums(own, lambda program, name: (program, kind(name)))
    idle = max(0.0, 1 - busy_time(events) / 1e9 / seconds)
    of_step = 1e-6 / STEPS
    lines = [
        f"# {title}",
        "",
        f"{1e3 * seconds / STEPS:.1f} ms a step. In {100 * idle:.1f}% of it no operation ran: the time between",
        "device programs, in which the host plans, waits for data or writes.",
        "",
        "Milliseconds of operations a step, by kind and program. Threads and devices that work at the same",
        "time each count, so the sum may exceed the step. An operation that the compiler fused from several",
        "kinds counts whole under the first of them in this order.",
        "",
        _row(["", *(_short(p) for p, _ in programs), "all", "share"]),
        "|---|" + "---:|" * (len(programs) + 2),
    ]
    for k, t in kinds:
        columns = [f"{dict(cells).get((p, k), 0) * of_step:.1f}" for p, _ in programs]
        lines.append(_row([k, *columns, f"{t * of_step:.1f}", f"{100 * t / total:.0f}%"]))
    sums = [f"{t * of_step:.1f}" for _, t in programs]
    lines.append(_row(["all", *sums, f"{total * of_step:.1f}", "100%"]))
    shares = [f"{100 * t / total:.0f}%" for _, t in programs]
    lines += [
        _row(["share", *shares, "100%", ""]),
        "",
        "The longest operations, each with all its calls:",
        "",
    ]
    lines += [_row(["operation", "program", "ms a step", "share"]), "|---|---|---:|---:|"]
    for (program, name), t in sorted(own.items(), key=lambda item: -item[1])[:LONGEST]:
        lines.append(
            _row([f"`{name}`", _short(program), f"{t * of_step:.1f}", f"{100 * t / total:.0f}%"])
        )
    more = "The whole trace lies beside this page: TensorBoard's profile plugin or ui.perfetto.dev shows it."
    return "\n".join([*lines, "", more]) + "\n"


def _sums(
    own: Mapping[tuple[str, str], float], of: Callable[[str, str], Any]
) -> list[tuple[Any, float]]:
    """Sums by ``of(program, operation)``, largest first."""
    found: defaultdict[Any, float] = defaultdict(float)
    for (program, name), t in own.items():
        found[of(program, name)] += t
    return sorted(found.items(), key=lambda item: -item[1])


def _short(program: str) -> str:
    return re.sub(r"\(\d+\)$", "", program).removeprefix("jit_")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
