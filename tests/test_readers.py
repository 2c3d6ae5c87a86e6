"""One source by random access: JSON Lines, text, TFDS; a bad line names its place and reason."""

from __future__ import annotations

import importlib.util

import pytest
from record_files import BAD_LINES, RECORDS, write

from instructax.config import UserError
from instructax.data.builder import jsonl_to_tfds
from instructax.data.sources import load_records
from instructax.records import KINDS, RecordError

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="tensorflow-datasets is absent"
)


@pytest.mark.parametrize("kind", KINDS)
def test_json_lines_give_the_records_by_any_access(tmp_path, kind):
    expected = RECORDS[kind]
    records = load_records(kind, write(tmp_path / "a.jsonl", expected, end=""))
    assert list(records) == expected
    assert [records[i] for i in reversed(range(len(records)))] == expected[::-1]
    assert records[-1] == expected[-1]
    assert records[:1] == expected[:1]
    assert records.quarantined == {str(tmp_path / "a.jsonl"): 0}
    for index in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            records[index]


def test_a_text_file_is_one_text_record(tmp_path):
    (tmp_path / "a.txt").write_text("two\n\nlines é", "utf-8")
    assert list(load_records("text", str(tmp_path / "a.txt"))) == [{"text": "two\n\nlines é"}]
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xa1")
    with pytest.raises(RecordError, match=r"b.txt:1: is not UTF-8 at line 2"):
        load_records("text", str(tmp_path / "b.txt"))


@pytest.mark.parametrize("line,reason", BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, line, reason):
    name = write(tmp_path / "bad.jsonl", [{"text": "ok"}, line, {"text": "ok"}])
    with pytest.raises(RecordError) as caught:
        load_records("text", name)
    assert str(caught.value).startswith(f"{name}:2: ")
    assert reason in str(caught.value)


@needs_tfds
@pytest.mark.parametrize("kind", KINDS)
def test_tfds_round_trip_loses_nothing(tmp_path, kind):
    name = write(tmp_path / "a.jsonl", RECORDS[kind])
    source = jsonl_to_tfds({"train": name, "validation": [name]}, kind, tmp_path / "tfds")
    assert list(load_records(kind, source)) == RECORDS[kind]
    assert list(load_records(kind, source + "#validation")) == RECORDS[kind]
    both = load_records(kind, [name, source])
    assert list(both) == RECORDS[kind] * 2
    with pytest.raises(UserError, match="cannot open"):
        load_records(kind, source + "#test")
    with pytest.raises(UserError, match="exists already"):
        jsonl_to_tfds(name, kind, tmp_path / "tfds")


@needs_tfds
def test_an_unknown_kind_or_text_file_that_vanished(tmp_path):
    with pytest.raises(ValueError, match="kind"):
        jsonl_to_tfds("x.jsonl", "ranking", tmp_path)
    path = tmp_path / "a.txt"
    path.write_text("x")
    records = load_records("text", str(path))
    path.unlink()
    with pytest.raises(UserError, match="a.txt: cannot read"):
        records[0]


@needs_tfds
def test_any_tfds_dataset_through_a_field_mapping(tmp_path):
    rows = [{"text": f"question {i}", "answers": {"best": f"answer {i}"}} for i in range(3)]
    features = _foreign_dataset(tmp_path, rows)
    field_map = {"prompt": "text", "response": "answers.best"}
    records = load_records("demonstration", features, field_map=field_map)
    assert list(records) == [
        {"prompt": r["text"], "response": r["answers"]["best"]}  # type: ignore[index]
        for r in rows
    ]
    with pytest.raises(UserError, match="has no feature 'answers.worst'"):
        load_records("demonstration", features, field_map={"response": "answers.worst"})
    with pytest.raises(RecordError, match="@.*:0: has neither prompt nor messages"):
        load_records("demonstration", features, field_map={"response": "text"})
    aside = tmp_path / "q.jsonl"
    with pytest.raises(UserError, match="all 3 are bad"):
        load_records("prompt", features, on_bad_record="quarantine", quarantine=aside)
    assert len(aside.read_text().splitlines()) == 3


def _foreign_dataset(folder, rows) -> str:
    import tensorflow_datasets as tfds

    text = tfds.features.Text()

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        name = "foreign"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": text, "answers": {"best": text}})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": enumerate(rows)}

        def _generate_examples(self):
            raise NotImplementedError

    Foreign(data_dir=str(folder / "f"), file_format="array_record").download_and_prepare()
    return f"tfds:foreign@{folder / 'f'}"
