"""One source of records by random access: a JSON Lines file, a text file, a TFDS dataset without TensorFlow.

A source is checked once, from end to end; what is good is then at hand by index, read anew each time.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import UserError
from instructax.records import Record, RecordError, validate_record


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


class Source(Sequence[Record]):
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


class JsonlSource(Source):
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


class TextFile(Source):
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


class TfdsSource(Source):
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
        for key in ("messages", "few_shot"):
            if isinstance(by_column := obj.get(key), dict):
                rows = zip(*by_column.values(), strict=True)
                obj[key] = [dict(zip(by_column, values, strict=True)) for values in rows]
        stored = obj.pop(EXTRA_FEATURE, None)
        extra = json.loads(stored) if stored else {}
        # The examples of a few-shot record hold its responses.
        few_shot = obj.get("few_shot") or "few_shot" in extra
        required = _REQUIRED - {"response"} if few_shot else _REQUIRED
        obj = {k: v for k, v in obj.items() if k in required or not (v == "" or v == [])}
        return {**obj, **extra}


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
