"""What a run says about itself while it runs: metrics.jsonl, tensorboard, samples.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter

from instructax.runtime.distributed import is_main

_METRICS, _SAMPLES = "metrics.jsonl", "samples.jsonl"


class MetricsWriter:
    """Scalars by step, into ``folder/metrics.jsonl`` and ``folder/tensorboard``.

    One JSON object a line: ``{"step", "time" (seconds since the epoch), ...}``; values that are not
    finite are the strings "nan", "inf" and "-inf". On processes other than the main one nothing is
    written.

    Args:
      folder: the run's folder.
      resume_step: the step of the checkpoint that the run goes on from. Later rows, of the run that
        was killed, are cut out of metrics.jsonl and samples.jsonl; -1 starts both afresh; None
        keeps all.
    """

    def __init__(self, folder: Any, resume_step: int | None = None):
        self._main = is_main()
        if not self._main:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            _cut_after(folder / _METRICS, resume_step)
            _cut_after(folder / _SAMPLES, resume_step)
        self._file = (folder / _METRICS).open("a", encoding="utf-8")
        purge = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, mapping: Mapping[str, Any]) -> None:
        """Write one row. Values are numbers, or arrays of one element on host or device."""
        if not self._main:
            return
        row: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
        for name, value in scalars(mapping).items():
            if name in row:
                raise ValueError(f"a metric cannot be called {name!r}")
            row[name] = _as_json(value)
            self._board.add_scalar(name, value, step)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self._board.flush()

    def close(self) -> None:
        if self._main:
            self._file.close()
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def scalars(mapping: Mapping[str, Any]) -> dict[str, int | float]:
    """Fetch a mapping of scalars from the device, all at once, as Python numbers.

    Raises ValueError or TypeError, naming the metric, for what is not one number.
    """
    numbers: dict[str, int | float] = {}
    for name, value in jax.device_get(dict(mapping)).items():
        array = np.asarray(value)
        if array.size != 1:
            raise ValueError(f"metric {name!r} must be a scalar, got shape {array.shape}")
        number = array.reshape(()).astype(np.float64) if array.dtype.kind == "V" else array
        # ml_dtypes such as bfloat16 are of kind "V" and know no .item() that JSON could take.
        if number.dtype.kind not in "biuf":
            raise TypeError(f"metric {name!r} must be a number, got {value!r}")
        numbers[name] = number.item()
    return numbers


def append_samples(folder: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows, each with a "step", to ``folder/samples.jsonl`` (main process only)."""
    if not is_main():
        return
    lines = []
    for row in rows:
        if "step" not in row:
            raise ValueError(f"a row of samples needs a 'step', got {sorted(row)}")
        plain = {name: _as_json(value) for name, value in row.items()}
        lines.append(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
    with (Path(folder) / _SAMPLES).open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def _as_json(value: Any) -> Any:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = np.asarray(value).tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _cut_after(path: Path, step: int) -> None:
    """Keep the rows up to ``step``; the file is replaced whole, so a kill here loses nothing."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        if line.endswith(b"\n") and row["step"] <= step:
            kept.append(line)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)
