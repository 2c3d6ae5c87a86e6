"""Records from files: JSON Lines by random access, plain text, and TFDS without TensorFlow.

A bad line is refused with file, line and reason, or set aside in a quarantine file and counted.
Nothing is dropped silently.
"""

from __future__ import annotations

import bisect
import glob
import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from instructax.config import UserError
from instructax.records import Record, RecordError, validate_record

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
            part: _Source = TfdsSource(name, kind, bounds, field_map)
        elif name.endswith(".txt") and kind == "text":
            part = _TextFile(name, kind, bounds)
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


def parse_line(line: bytes, where: str) -> Any:
    """The JSON value of one line, or RecordError. Repeated keys are refused: JSON would lose one."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            where, f"is not UTF-8 at byte {error.start}", "save the file as UTF-8"
        ) from None
    if not text.strip():
        raise RecordError(where, "is an empty line", "delete it")
    if text.startswith("\ufeff"):
        raise RecordError(where, "begins with a byte order mark", "save as UTF-8 without one")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        obj = dict(pairs)
        if len(obj) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise RecordError(where, f"key {twice!a} appears twice", "keep one of them")
        return obj

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise RecordError(
            where,
            f"is not JSON at column {error.colno} ({error.msg})",
            "write one JSON object a line",
        ) from None
    except RecursionError:
        raise RecordError(where, "is nested too deeply", "flatten it") from None
    except ValueError:
        raise RecordError(where, "holds a number of thousands of digits", "shorten it") from None


class _Source(Sequence[Record]):
    """A checked source: ``check`` reads it once; afterwards the good records are at hand by index."""

    def __init__(self, name: str, kind: str, bounds: Mapping[str, int]):
        self.name, self.kind = name, kind
        self._bounds = bounds
        self._good = np.zeros(0, np.int64)

    def raw(self) -> Iterator[tuple[int, Any]]:
        """(line number or index, content) of everything in the source."""
        raise NotImplementedError

    def parse(self, number: int, content: Any) -> Any:
        raise NotImplementedError

    def fetch(self, i: int) -> tuple[int, Any]:
        raise NotImplementedError

    def _record(self, number: int, content: Any) -> Record:
        obj = self.parse(number, content)
        return validate_record(self.kind, obj, f"{self.name}:{number}", **self._bounds)

    def check(self, bad: list[dict[str, Any]] | None) -> None:
        """Validate everything; bad records are appended to ``bad``, or refused where it is None."""
        good = []
        for i, (number, content) in enumerate(self.raw()):
            try:
                self._record(number, content)
                good.append(i)
            except RecordError as error:
                if bad is None:
                    raise
                if isinstance(content, bytes):
                    text = content.decode("utf-8", "surrogateescape").rstrip("\n")
                else:
                    text = json.dumps(content, default=ascii)
                entry = {"file": self.name, "line": number, "reason": error.reason, "text": text}
                bad.append(entry)
        self._good = np.asarray(good, np.int64)

    def __len__(self) -> int:
        return len(self._good)

    def __getitem__(self, i):
        return self._record(*self.fetch(int(self._good[i])))


class JsonlSource(_Source):
    """A JSON Lines file: an index of line offsets, then one ``pread`` a record, safe in any thread."""

    def __init__(self, name: str, kind: str, bounds: Mapping[str, int]):
        super().__init__(name, kind, bounds)
        try:
            self._descriptor = os.open(name, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"{name}: cannot read ({error.strerror}); name a readable file"
            ) from None
        weakref.finalize(self, os.close, self._descriptor)
        self._offsets = np.zeros(1, np.int64)

    def raw(self) -> Iterator[tuple[int, bytes]]:
        offsets = [0]
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                offsets.append(offsets[-1] + len(line))
                yield number, line
        self._offsets = np.asarray(offsets, np.int64)

    def fetch(self, i: int) -> tuple[int, bytes]:
        start, stop = self._offsets[i : i + 2].tolist()
        return i + 1, os.pread(self._descriptor, stop - start, start)

    def parse(self, number: int, content: bytes) -> Any:
        return parse_line(content, f"{self.name}:{number}")


class _TextFile(_Source):
    """A whole ``.txt`` file as one text record."""

    def raw(self) -> Iterator[tuple[int, bytes]]:
        yield self.fetch(0)

    def fetch(self, i: int) -> tuple[int, bytes]:
        try:
            return 1, Path(self.name).read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.name}: cannot read ({error.strerror}); name a readable file"
            ) from None

    def parse(self, number: int, content: bytes) -> Any:
        return text_record(content, f"{self.name}:{number}")


def text_record(content: bytes, where: str) -> Record:
    """``{"text"}`` of a plain text file, or RecordError where it is not UTF-8."""
    try:
        return {"text": content.decode("utf-8")}
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise RecordError(where, f"is not UTF-8 at line {line}", "save the file as UTF-8") from None


class TfdsSource(_Source):
    """A prepared TFDS dataset in array_record form, read by random access without TensorFlow.

    ``name`` is ``tfds:NAME@FOLDER``, with ``#SPLIT`` behind it if not train; NAME may carry a config
    and a version as in TFDS. ``field_map`` maps a record's field to a feature (dots for nested ones);
    without it features are taken under their own names. Empty optional features count as absent.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        bounds: Mapping[str, int],
        field_map: Mapping[str, str] | None = None,
    ):
        super().__init__(name, kind, bounds)
        spec, _, split = name.removeprefix("tfds:").partition("#")
        dataset, at, folder = spec.partition("@")
        if not (dataset and at and folder):
            raise UserError(f"{name}: is not a TFDS source; write tfds:NAME@FOLDER or ...#SPLIT")
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(dataset, data_dir=os.path.expanduser(folder))
            self._data: Any = builder.as_data_source(split=split or "train")
        except Exception as error:  # noqa: BLE001  TFDS raises a dozen unrelated types for "it is not there"
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise UserError(
                f"{name}: cannot open ({reason}); name a dataset prepared as array_record and one "
                "of its splits"
            ) from None
        self._field_map = field_map

    def raw(self) -> Iterator[tuple[int, Any]]:
        return (self.fetch(i) for i in range(len(self._data)))

    def fetch(self, i: int) -> tuple[int, Any]:
        return i, _plain(self._data[i])

    def parse(self, number: int, content: Any) -> Any:
        obj = dict(content)
        if self._field_map is not None:
            where = f"{self.name}:{number}"
            obj = {key: _feature(content, path, where) for key, path in self._field_map.items()}
        messages = obj.get("messages")
        if isinstance(messages, dict):
            columns = zip(*messages.values(), strict=True)
            obj["messages"] = [dict(zip(messages, values, strict=True)) for values in columns]
        obj = {k: v for k, v in obj.items() if k in _REQUIRED or not (v == "" or v == [])}
        extra = obj.pop(EXTRA_FEATURE, None)
        return {**obj, **(json.loads(extra) if extra else {})}


# Keys that no schema makes optional: empty is then an error to report, not an absence.
_REQUIRED = {"response", "responses", "ranks", "text"}
# The feature that holds, as JSON, what a record has beyond its schema.
EXTRA_FEATURE = "extra_json"


def _plain(value: Any) -> Any:
    """TFDS values (bytes, NumPy scalars and arrays, dicts) as JSON values."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(inner) for inner in value]
    return value


def _feature(content: Any, path: str, where: str) -> Any:
    for key in path.split("."):
        if not isinstance(content, dict) or key not in content:
            raise UserError(f"{where}: has no feature {path!r}; change the field mapping")
        content = content[key]
    return content


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
