"""One column of one case in a process of its own: ``python -m bench.worker CASE COLUMN``.

It builds and warms up, prints a line of JSON, then for each line N on stdin does N units of work and
prints their seconds; for the line ``where`` it does one under a profiler and prints where its seconds went.
``rates`` as the case measures the machine instead.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from bench import cases

WARM = 2
WHERE = "where"
TRL = ("pairs", "ppo")


def module_of(case: cases.Case, column: str) -> str:
    if column == "ours":
        return "bench.ours"
    return "bench.peer_trl" if {case.form, case.work.kind} & set(TRL) else "bench.peer_torch"


def timed(once: Callable[[], Any]) -> Callable[[int], list[float]]:
    """How long each of n units takes."""

    def measure(n: int) -> list[float]:
        found = []
        for _ in range(n):
            began = time.perf_counter()
            once()
            found.append(time.perf_counter() - began)
        return found

    return measure


def prepare(
    case: cases.Case, column: str, device: str
) -> tuple[Callable[[int], list[float]], dict[str, str]]:
    """(n -> seconds of n units, versions of what does the work)."""
    module = importlib.import_module(module_of(case, column))
    versions = {name: metadata.version(name) for name in module.PACKAGES}
    if column == "ours":
        return timed(module.build(case)), versions
    if module.__name__ == "bench.peer_trl":
        # TRL's trainers own their loop: they hand out the time of each of its turns.
        return module.build(case, device), versions
    return timed(module.build(case, device, compiled=column == "compiled")), versions


def side(column: str) -> Any:
    """The module that measures the machine, and where time goes, with what the column computes by."""
    return importlib.import_module("bench.ours" if column == "ours" else "bench.peer_torch")


def rates(column: str, device: str) -> dict[str, float]:
    flops, bandwidth = side(column).rates(device)
    return {"flops": flops, "bandwidth": bandwidth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("column")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--miniature", action="store_true")
    given = parser.parse_args()
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    if given.case == "rates":
        answer({})
        for _ in sys.stdin:
            answer(rates(given.column, given.device))
        return
    all_cases = cases.gpu_cases() if given.device == "gpu" else cases.cpu_cases()
    case = cases.find(given.case, all_cases)
    # In miniature the GPU's cases run on whatever is there.
    device = "cpu" if given.miniature else given.device
    measure, versions = prepare(
        cases.miniature(case) if given.miniature else case, given.column, device
    )
    measure(WARM)
    answer(versions)
    for line in sys.stdin:
        if line.strip() == WHERE:
            answer(side(given.column).went(functools.partial(measure, 1)))
        else:
            answer(measure(int(line)))


if __name__ == "__main__":
    main()
