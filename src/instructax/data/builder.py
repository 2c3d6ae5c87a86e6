"""JSON Lines into a TFDS dataset in array_record form, without TensorFlow, and without loss."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import UserError
from instructax.data.readers import EXTRA_FEATURE
from instructax.data.sources import OnBadRecord, Records, load_records
from instructax.records import KINDS, Record

_TEXTS = {
    "demonstration": ("prompt", "response", "user_id", "labeler_id", "source"),
    "comparison": ("prompt", "user_id", "labeler_id", "source"),
    "prompt": ("prompt", "user_id", "source"),
    "text": ("text",),
}


def jsonl_to_tfds(
    paths: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    kind: str,
    out_dir: str | os.PathLike,
    *,
    name: str | None = None,
    version: str = "1.0.0",
    on_bad_record: OnBadRecord = "refuse",
    quarantine: str | os.PathLike | None = None,
    min_responses: int = 2,
    max_responses: int = 9,
) -> str:
    """Write records of ``kind`` as the TFDS dataset ``name`` under ``out_dir``; return its source.

    ``paths`` is what :func:`~instructax.data.sources.load_records` takes, for the split train, or a
    mapping from split to that. The order is kept. Absent optional fields are stored empty, keys
    beyond the schema as JSON in one feature, so that reading gives the same records back. The result
    (``tfds:NAME@FOLDER``) can be loaded as it is.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    name = f"instructax_{kind}" if name is None else name
    if (Path(out_dir) / name / version).exists():
        raise UserError(
            f"{Path(out_dir) / name / version}: exists already; choose another name, version or folder"
        )
    splits = paths if isinstance(paths, Mapping) else {"train": paths}
    records = {
        split: load_records(
            kind,
            files,
            on_bad_record=on_bad_record,
            quarantine=quarantine,
            min_responses=min_responses,
            max_responses=max_responses,
        )
        for split, files in splits.items()
    }
    builder = _builder_class(name, version, kind, records)(
        data_dir=os.fspath(out_dir), file_format="array_record"
    )
    builder.download_and_prepare()
    return f"tfds:{name}@{os.fspath(out_dir)}"


def _builder_class(name: str, version: str, kind: str, records: Mapping[str, Records]) -> Any:
    import tensorflow_datasets as tfds

    sequence, text = tfds.features.Sequence, tfds.features.Text
    features: dict[str, Any] = {key: text() for key in (*_TEXTS[kind], EXTRA_FEATURE)}
    if kind != "text":
        features["messages"] = sequence({"role": text(), "content": text()})
    if kind == "comparison":
        features |= {
            "responses": sequence(text()),
            "ranks": sequence(np.int64),
            "ratings": sequence(np.int64),
            "finished": sequence(np.bool_),
        }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(version)
        # Nothing is downloaded; looking for checksums beside this file would need another package.
        url_infos = None

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any) -> Any:
            return {split: self._generate_examples(part) for split, part in records.items()}

        def _generate_examples(self, part: Records) -> Iterator[tuple[int, dict[str, Any]]]:
            for i, record in enumerate(part):
                yield i, _example(record, features)

    Builder.name = name
    return Builder


def _example(record: Record, features: Mapping[str, Any]) -> dict[str, Any]:
    """The record with every feature present; what is absent is empty."""
    lists = {"messages", "responses", "ranks", "ratings", "finished"}
    turns = record.get("messages", [])
    plain = all(set(turn) == {"role", "content"} for turn in turns)
    stored = {key for key in features if key != EXTRA_FEATURE and (key != "messages" or plain)}
    schema = {key: value for key, value in record.items() if key in stored}
    extra = {key: value for key, value in record.items() if key not in schema}
    example = {key: [] if key in lists else "" for key in features}
    return example | schema | {EXTRA_FEATURE: json.dumps(extra) if extra else ""}
