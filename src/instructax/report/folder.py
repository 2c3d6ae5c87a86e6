"""Reading a run folder: metrics, samples, evaluations and summary, as plain Python values.

A file that is not there is an empty value; a file that is there and cannot be read is refused with
its name and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import UserError

SUPERVISED_STAGES = ("pretrain", "sft", "init", "reward")
"""Stages in the order of the recipe; every other folder with metrics is an arm of PPO."""

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """What one run folder holds. Keys of the inner dictionaries are seed folders ("seed0", ...)."""

    path: Path
    config: Row = field(default_factory=dict)
    environment: Row = field(default_factory=dict)
    summary: Row = field(default_factory=dict)
    curation: Row = field(default_factory=dict)
    metrics: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    """Stage or arm -> seed -> rows by rising step."""
    samples: dict[str, dict[str, list[Row]]] = field(default_factory=dict)
    """Arm -> seed -> samples of the same prompts over time."""
    chosen: dict[str, dict[str, Row]] = field(default_factory=dict)
    """Stage -> seed -> the epoch's checkpoint that was chosen, and by what."""
    evaluations: dict[str, Row] = field(default_factory=dict)
    """Seed -> evaluate.json."""
    notes: tuple[str, ...] = ()
    """What the reader of the page should know about the reading."""

    @property
    def arms(self) -> list[str]:
        """Arms of PPO: those of the config in its order, then others by name."""
        trained = [name for name in self.metrics if name not in SUPERVISED_STAGES]
        named = [arm.get("name") for arm in items(self.config.get("arms"))]
        return [a for a in named if a in trained] + sorted(set(trained) - set(named))

    @property
    def seeds(self) -> list[str]:
        found = {seed for rows in self.metrics.values() for seed in rows} | set(self.evaluations)
        return sorted(found, key=_seed_order)

    def curves(self, stage: str, metric: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Seed -> (steps, values) of one metric, where a row has it."""
        found = {}
        for seed, rows in self.metrics.get(stage, {}).items():
            pairs = [(r["step"], r[metric]) for r in rows if is_number(r.get(metric))]
            if pairs:
                steps, values = np.array(pairs, dtype=np.float64).T
                found[seed] = (steps, values)
        return found


def read(folder: Path) -> RunFolder:
    """Read a run folder; refuse one that does not exist, holds nothing, or has a broken file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such run folder; run a stage first, or check run_dir and name"
        )
    metrics: dict[str, dict[str, list[Row]]] = {}
    samples: dict[str, dict[str, list[Row]]] = {}
    chosen: dict[str, dict[str, Row]] = {}
    evaluations: dict[str, Row] = {}
    notes: list[str] = []
    for seed_folder in _seed_folders(folder):
        for stage_folder in sorted(p for p in seed_folder.iterdir() if p.is_dir()):
            if (path := stage_folder / "metrics.jsonl").is_file():
                rows = _rows_by_step(path, notes)
                _add_candidates(rows, stage_folder / "candidates.json")
                if rows:
                    metrics.setdefault(stage_folder.name, {})[seed_folder.name] = rows
            if choice := _json_object(stage_folder / "chosen.json"):
                chosen.setdefault(stage_folder.name, {})[seed_folder.name] = choice
            if (path := stage_folder / "samples.jsonl").is_file():
                found = [row for _, row in _json_lines(path, notes)]
                if found:
                    samples.setdefault(stage_folder.name, {})[seed_folder.name] = found
        if evaluation := _json_object(seed_folder / "evaluate.json"):
            evaluations[seed_folder.name] = evaluation
    summary = _json_object(folder / "summary.json")
    if not (metrics or evaluations or summary):
        raise UserError(
            f"{folder}: nothing to report: no summary.json, no evaluate.json and no metrics.jsonl "
            "with rows in it; run a stage first"
        )
    return RunFolder(
        path=folder,
        config=_json_object(folder / "config.json"),
        environment=_json_object(folder / "environment.json"),
        summary=summary,
        curation=_json_object(folder / "data" / "curation.json"),
        metrics=metrics,
        samples=samples,
        chosen=chosen,
        evaluations=evaluations,
        notes=tuple(notes),
    )


def is_number(value: object) -> bool:
    """A finite int or float; True and False are not numbers here."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return bool(np.isfinite(value))


def items(value: object) -> list[Row]:
    """The dictionaries of a list; nothing where it is no list."""
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def table(parent: Row, *path: str) -> Row:
    """The dictionary at a path of keys; empty where there is none."""
    value: object = parent
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def number(parent: Row, *path: str) -> float | None:
    """The finite number at a path of keys, or None."""
    value = table(parent, *path[:-1]).get(path[-1])
    return float(value) if isinstance(value, (int, float)) and is_number(value) else None


def _seed_folders(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if p.is_dir() and _seed_order(p.name)[0] == 0]
    # A stage run on its own may write straight into the run folder.
    return sorted(found, key=lambda p: _seed_order(p.name)) or [folder]


def _seed_order(name: str) -> tuple[int, int, str]:
    digits = name.removeprefix("seed")
    return (0, int(digits), name) if name.startswith("seed") and digits.isdigit() else (1, 0, name)


def _rows_by_step(path: Path, notes: list[str]) -> list[Row]:
    """One row a step: a resumed run repeats steps, and the later row stands."""
    merged: dict[float, Row] = {}
    for line, row in _json_lines(path, notes):
        step = row.get("step")
        if not isinstance(step, (int, float)) or not is_number(step):
            raise UserError(
                f'{path}:{line}: a metrics row needs a number "step"; mend or remove this line'
            )
        merged.setdefault(step, {}).update(row)
    return [merged[step] for step in sorted(merged)]


def _json_lines(path: Path, notes: list[str]) -> Iterator[tuple[int, Row]]:
    text = _text(path)
    lines = text.split("\n")
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except (ValueError, RecursionError) as error:
            if index == len(lines):
                # No newline behind it: the writer was stopped, or is still writing.
                where = "/".join(path.parts[-3:])
                notes.append(f"{where}: the unfinished last line {index} is left out.")
                return
            raise UserError(
                f"{path}:{index}: not valid JSON ({error}); mend or remove this line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{index}: expected a JSON object, got {type(row).__name__}")
        yield index, row


def _add_candidates(rows: list[Row], path: Path) -> None:
    """Reward-model scores of the epochs' checkpoints, measured after training, as metrics."""
    candidates = items(_json(path)) if path.is_file() else []
    by_step = {c.get("step"): c for c in candidates}
    for row in rows:
        for key in ("reward", "reward_se"):
            value = by_step.get(row["step"], {}).get(key)
            if is_number(value):
                row[f"eval/{key}"] = value


def _json_object(path: Path) -> Row:
    value = _json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}:1: expected a JSON object, got {type(value).__name__}")
    return value


def _json(path: Path) -> object:
    try:
        return _parse(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:1: not valid JSON ({error})") from None


def _parse(text: str) -> object:
    value = json.loads(text)
    if "\\ud" not in text.lower():
        return value
    # Half of an escaped surrogate pair is no character: UTF-8 cannot carry it, nor a plot draw it.
    whole = json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace")
    return json.loads(whole)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
