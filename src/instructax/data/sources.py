"""Records of one kind from several sources, which :mod:`instructax.data.readers` read.

A bad line is refused with file, line and reason, or set aside in a quarantine file and counted.
Nothing is dropped silently.
"""

from __future__ import annotations

import bisect
import glob
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from instructax.config import UserError
from instructax.data.readers import JsonlSource, Source, TextFile, TfdsSource
from instructax.records import Record

OnBadRecord = Literal["refuse", "quarantine"]


class Records(Sequence[Record]):
    """Records of one kind from several sources in order; ``quarantined`` counts bad ones by source."""

    def __init__(self, parts: Sequence[Sequence[Record]], quarantined: dict[str, int]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts]).tolist()
        self.quarantined = quarantined

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = index + len(self) if index < 0 else index
        if not 0 <= i < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        part = bisect.bisect_right(self._ends, i)
        return self._parts[part][i - (self._ends[part - 1] if part else 0)]


def load_records(
    kind: str,
    paths: str | Sequence[str],
    *,
    on_bad_record: OnBadRecord = "refuse",
    quarantine: str | os.PathLike | None = None,
    min_responses: int = 2,
    max_responses: int = 9,
    field_map: Mapping[str, str] | None = None,
) -> Records:
    """Validated records of ``kind`` from ``paths``: files, globs, or ``tfds:NAME@FOLDER[#SPLIT]``.

    Files are JSON Lines; for ``kind`` text a ``.txt`` file is one record. With ``on_bad_record``
    "quarantine" bad lines go to the file ``quarantine`` as ``{"file", "line", "reason", "text"}``
    (bytes that are not UTF-8 as surrogate escapes), in place of what it held for the same sources.
    ``field_map`` leads from record fields to the features of a TFDS dataset. Raises UserError for a
    missing source, a source named twice, a bad line when refusing, and where no record is left.
    """
    if on_bad_record not in ("refuse", "quarantine"):
        raise ValueError(f"on_bad_record must be 'refuse' or 'quarantine', got {on_bad_record!r}")
    if on_bad_record == "quarantine" and quarantine is None:
        raise ValueError("on_bad_record='quarantine' needs the path quarantine")
    names = _expand([paths] if isinstance(paths, str) else paths)
    bounds = {"min_responses": min_responses, "max_responses": max_responses}
    bad: list[dict[str, Any]] = []
    parts: list[Sequence[Record]] = []
    for name in names:
        if name.startswith("tfds:"):
            part: Source = TfdsSource(name, kind, bounds, field_map)
        elif name.endswith(".txt") and kind == "text":
            part = TextFile(name, kind, bounds)
        else:
            part = JsonlSource(name, kind, bounds)
        part.check(None if on_bad_record == "refuse" else bad)
        parts.append(part)
    if quarantine is not None and on_bad_record == "quarantine":
        _write_quarantine(Path(quarantine), names, bad)
    records = Records(parts, {n: sum(entry["file"] == n for entry in bad) for n in names})
    if not records:
        reason = f"all {len(bad)} are bad, see {quarantine}" if bad else "they are empty"
        raise UserError(f"{', '.join(names)}: no {kind} record ({reason}); add some")
    return records


def _expand(paths: Sequence[str]) -> list[str]:
    names: list[str] = []
    for path in paths:
        if path.startswith("tfds:"):
            names.append(path)
            continue
        expanded = os.path.expanduser(path)
        found = (
            [expanded] if os.path.exists(expanded) else sorted(glob.glob(expanded, recursive=True))
        )
        if not found:
            raise UserError(f"{path}: there is no such file; correct the path")
        for name in found:
            if os.path.isdir(name):
                raise UserError(f"{name}: is a folder; name its files, for example {name}/*.jsonl")
        names += found
    if not names:
        raise UserError("no data file is named; name at least one")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{name}: is named twice; its records would count double; name it once")
    return names


def _write_quarantine(path: Path, names: Sequence[str], bad: Sequence[Mapping[str, Any]]) -> None:
    kept: list[str] = []
    if path.exists():
        lines = path.read_text("utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["file"] not in names]
    kept += [json.dumps(entry) for entry in bad]
    if not kept and not path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept), "utf-8")
    os.replace(partial, path)
