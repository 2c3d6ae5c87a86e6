"""``python -m bench``: every case for every column, in turn, several rounds; a table and JSON.

    python -m bench --peers .venv-bench/bin/python [--rounds 5] [--units 3] [--device cpu] [--only ppo]

Each column is a process with its own environment that builds once and waits; in every round all of a
case's columns do their units one after the other, so that a machine that drifts drifts for all.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from bench import cases, columns, roofline, table
from bench.worker import WHERE

PEAK_FLOPS = 989e12  # bfloat16 of an H100 or H200, without sparsity


class EndedEarly(RuntimeError):
    """A column's process is gone."""


class Worker:
    """A process of one column; ``ask`` sends it a number of units, or a word, and reads its answer."""

    def __init__(
        self, case: str, name: str, column: columns.Column, more: Sequence[str], logs: Path
    ):
        self._log = logs / f"{re.sub('[^A-Za-z0-9.]+', '-', case)}-{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(column.python), "-m", "bench.worker", case, name, *more],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=column.environment,
                cwd=columns.ROOT,
                text=True,
            )
        self.versions: dict[str, str] = self._read()

    def ask(self, units: int | str) -> Any:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then it has ended, and there is no answer
            self._process.stdin.write(f"{units}\n")
            self._process.stdin.flush()
        return self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise EndedEarly(f"the end of {self._log}:\n{self._tail()}")
        return json.loads(line)

    def _tail(self) -> str:
        return self._log.read_text("utf-8", "replace")[-2000:]


def measure(
    together: Sequence[cases.Case], given: argparse.Namespace, made: dict[str, columns.Column]
) -> dict[str, dict[str, Any]]:
    """Of cases whose columns take turns, by case key and column: seconds, a list a round, and with ``--where`` where
    those of one more unit of each round went. Versions by name."""
    more = ["--device", given.device, *(["--miniature"] if given.miniature else [])]
    versions: dict[str, str] = {}
    found: dict[str, dict[str, list[list[float]]]] = {}
    went: dict[str, dict[str, list[dict[str, float]]]] = {}
    turns = [
        (case.key, name) for case in together for name in case.columns if name in given.columns
    ]
    with contextlib.ExitStack() as stack:

        def start(key: str, name: str) -> Worker:
            print(f"  {key}: {name}", file=sys.stderr, flush=True)
            worker = stack.enter_context(Worker(key, name, made[name], more, given.output))
            versions.update(worker.versions)
            return worker

        kept: dict[tuple[str, str], Worker] = {}
        for _ in range(given.rounds):
            for key, name in list(turns):
                try:
                    if (key, name) not in kept:
                        kept[key, name] = start(key, name)
                    seconds = kept[key, name].ask(given.units)
                    if given.where:
                        kinds = kept[key, name].ask(WHERE)
                        went.setdefault(key, {}).setdefault(name, []).append(kinds)
                except EndedEarly as error:
                    if name == "ours":
                        raise
                    # A peer that cannot run here is said to, and not measured.
                    print(f"{key}, {name}: {error}", file=sys.stderr, flush=True)
                    turns.remove((key, name))
                    continue
                found.setdefault(key, {}).setdefault(name, []).append(seconds)
                if given.device == "gpu":
                    # Its memory holds one column at a time: each is built anew in every round.
                    stack.close()
                    kept.clear()
    return {"cases": found, "where": went, "versions": versions}


def machine_rates(given: argparse.Namespace, made: dict[str, columns.Column]) -> dict[str, float]:
    """FLOP/s and bytes/s: the best that either side's own programs reach."""
    found = []
    for name in ("tuned", "ours"):
        if name in given.columns:
            with Worker(
                "rates", name, made[name], ["--device", given.device], given.output
            ) as worker:
                found += [worker.ask(1) for _ in range(2)]
    return {what: max(rates[what] for rates in found) for what in ("flops", "bandwidth")}


def groups(chosen: Sequence[cases.Case]) -> list[list[cases.Case]]:
    """Cases that are compared with each other, whose columns therefore take turns."""
    found: dict[tuple[str, str], list[cases.Case]] = {}
    for case in chosen:
        name = "reward" if case.work.kind == "reward" else case.name
        found.setdefault((name, case.size), []).append(case)
    return list(found.values())


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def page(chosen: Sequence[cases.Case], report: dict[str, Any]) -> str:
    """The report in Markdown."""
    rates = report["rates"]
    least = {}
    if rates:
        least = {c.key: roofline.seconds(c, rates["flops"], rates["bandwidth"]) for c in chosen}
    versions = ", ".join(
        f"{name} {version}" for name, version in sorted(report["versions"].items())
    )
    lines = [
        f"{report['date']}, {report['machine']}; {versions}.",
        "",
        f"    {report['command']}",
        "",
    ]
    if rates:
        speed = f"{rates['flops'] / 1e9:.0f} GFLOP/s in a matrix product"
        lines += [f"Measured in this run: {speed}, {rates['bandwidth'] / 1e9:.0f} GB/s.", ""]
    peak = PEAK_FLOPS if report["device"] == "gpu" else None
    lines += [table.main_table(chosen, report["cases"], least, peak), ""]
    lines.append(table.ratio_table(chosen, report["cases"]))
    if report["where"]:
        lines += ["", table.where_table(chosen, report["cases"], report["where"])]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench")
    parser.add_argument("--peers", type=Path, default=Path(".venv-bench/bin/python"))
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--units", type=int, default=3, help="units of work in a round")
    parser.add_argument(
        "--only", nargs="+", default=[], help="cases that hold all of these: reward medium"
    )
    parser.add_argument("--columns", nargs="+", default=list(table.COLUMNS))
    parser.add_argument("--miniature", action="store_true", help="tiny shapes: does it all run?")
    parser.add_argument(
        "--where", action="store_true", help="and where a unit's seconds go (CPU alone)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    given = parser.parse_args(arguments)
    if given.where and given.device == "gpu":
        parser.error("--where is for CPUs: on a GPU each column is built anew in every round")
    said = " ".join(sys.argv[1:] if arguments is None else arguments)

    everything = cases.gpu_cases() if given.device == "gpu" else cases.cpu_cases()
    chosen = [case for case in everything if all(part in case.key for part in given.only)]
    if not chosen:
        known = ", ".join(case.key for case in everything)
        parser.error(f"--only {' '.join(given.only)}: no case is called so; there are {known}")
    given.output.mkdir(parents=True, exist_ok=True)
    made = columns.make(columns.ROOT / given.peers, given.device, columns.ROOT / ".cache" / "bench")
    report: dict[str, Any] = {
        "device": given.device,
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores",
        "command": f"python -m bench {said}".strip(),
        "versions": {},
        "rates": {} if given.miniature else machine_rates(given, made),
        "cases": {},
        "where": {},
    }
    for together in groups(chosen):
        for what, found in measure(together, given, made).items():
            report[what] |= found
        # After every group, so that a run cut short has measured something.
        (given.output / f"{given.device}.json").write_text(
            json.dumps(report, indent=1) + "\n", "utf-8"
        )
        (given.output / f"{given.device}.md").write_text(page(chosen, report), "utf-8")
    print(page(chosen, report))


if __name__ == "__main__":
    main()
