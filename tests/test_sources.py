"""Files to records: nothing is lost in silence, every refusal names file and line."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest

from instructax.config import UserError
from instructax.data.builder import jsonl_to_tfds
from instructax.data.sources import load_records
from instructax.records import KINDS, RecordError

needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="tensorflow-datasets is absent"
)

DEMONSTRATIONS = [
    {"prompt": "p é \u2581 \0", "response": "r"},
    {
        "prompt": "q",
        "response": "s",
        "user_id": "u",
        "labeler_id": "l",
        "source": "x",
        "n": [1, {}],
    },
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "日本", "id": 3},
        ],
        "response": "t",
        "extra_json": "mine",
    },
]
COMPARISONS = [
    {"prompt": "p", "responses": ["a", ""], "ranks": [-3, 2]},
    {
        "messages": [{"role": "user", "content": "u"}],
        "responses": ["a", "b", "c"],
        "ranks": [1, 1, 2],
        "finished": [True, False, True],
        "ratings": [7, 1, 3],
        "flags": [None, "rude", {"harm": True}],
        "labeler_id": "l",
    },
]
PROMPTS = [{"prompt": "p", "source": "api", "labeler_id": "l"}, {"prompt": "q", "user_id": "u"}]
TEXT = [{"text": "one"}, {"text": "two\n", "topic": "t"}]
RECORDS = {
    "demonstration": DEMONSTRATIONS, "comparison": COMPARISONS, "prompt": PROMPTS, "text": TEXT,
}  # fmt: skip


def write(path, lines, end="\n"):
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"\n".join(encoded) + end.encode())
    return str(path)


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


def test_several_files_and_globs_stand_in_order(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", [{"text": name}] * 3) for name in "bac"]
    assert "".join(r["text"] for r in load_records("text", files)) == "bbbaaaccc"
    assert "".join(r["text"] for r in load_records("text", str(tmp_path / "*.jsonl"))) == (
        "aaabbbccc"
    )


def test_a_text_file_is_one_text_record(tmp_path):
    (tmp_path / "a.txt").write_text("two\n\nlines é", "utf-8")
    assert list(load_records("text", str(tmp_path / "a.txt"))) == [{"text": "two\n\nlines é"}]
    (tmp_path / "b.txt").write_bytes(b"one\ntwo \xa1")
    with pytest.raises(RecordError, match=r"b.txt:1: is not UTF-8 at line 2"):
        load_records("text", str(tmp_path / "b.txt"))


BAD_LINES = [
    (b"", "empty line"),
    (b"  ", "empty line"),
    (b'{"text": "a"', "not JSON at column"),
    (b"hello", "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "Extra data"),
    (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    (b'\xef\xbb\xbf{"text": "a"}', "byte order mark"),
    (b'{"text": "a", "text": "b"}', "key 'text' appears twice"),
    (b'{"text": "a", "x": ' + b"9" * 5000 + b"}", "thousands of digits"),
    (b'{"text": "a", "x": ' + b"[" * 200_000 + b"}", "nested too deeply"),
    (b'{"text": "a", "x": NaN}', "not a finite number"),
    (b'{"text": "a", "x": 1e999}', "not a finite number"),
    (b'{"text": "\\ud800"}', "surrogate"),
    (b'["text"]', "is a list"),
    (b'{"text": 3}', "text is an integer"),
]


@pytest.mark.parametrize("line,reason", BAD_LINES, ids=[reason for _, reason in BAD_LINES])
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, line, reason):
    name = write(tmp_path / "bad.jsonl", [{"text": "ok"}, line, {"text": "ok"}])
    with pytest.raises(RecordError) as caught:
        load_records("text", name)
    assert str(caught.value).startswith(f"{name}:2: ")
    assert reason in str(caught.value)


def test_quarantine_counts_and_keeps_every_bad_line(tmp_path):
    lines = [line for line, _ in BAD_LINES]
    name = write(tmp_path / "bad.jsonl", [{"text": "first"}, *lines, {"text": "last"}])
    aside = tmp_path / "sub" / "quarantine.jsonl"
    records = load_records("text", name, on_bad_record="quarantine", quarantine=aside)
    assert [r["text"] for r in records] == ["first", "last"]
    assert records[1] == {"text": "last"}
    assert records.quarantined == {name: len(BAD_LINES)}
    entries = [json.loads(line) for line in aside.read_text("utf-8").splitlines()]
    assert [e["line"] for e in entries] == list(range(2, 2 + len(lines)))
    assert [e["text"].encode("utf-8", "surrogateescape") for e in entries] == lines
    for entry, (_, reason) in zip(entries, BAD_LINES, strict=True):
        assert entry["file"] == name and reason in entry["reason"]


def test_quarantine_of_one_source_does_not_lose_anothers(tmp_path):
    aside = tmp_path / "quarantine.jsonl"
    names = [write(tmp_path / f"{n}.jsonl", [{"text": n}, b"bad " + n.encode()]) for n in "ab"]
    for name in [*names, names[0]]:
        load_records("text", name, on_bad_record="quarantine", quarantine=aside)
    kept = sorted(json.loads(line)["text"] for line in aside.read_text().splitlines())
    assert kept == ["bad a", "bad b"]
    write(tmp_path / "a.jsonl", [{"text": "mended"}])
    load_records("text", names[0], on_bad_record="quarantine", quarantine=aside)
    assert [json.loads(line)["text"] for line in aside.read_text().splitlines()] == ["bad b"]


def test_missing_empty_and_repeated_sources_are_refused(tmp_path):
    good = write(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "empty.jsonl").write_bytes(b"")
    for paths, reason in [
        ([], "no data file"),
        (str(tmp_path / "none.jsonl"), "none.jsonl: there is no such file"),
        (str(tmp_path / "none*.jsonl"), "there is no such file"),
        (str(tmp_path), "is a folder"),
        ([good, good], "named twice"),
        (str(tmp_path / "empty.jsonl"), "they are empty"),
        ("tfds:", "is not a TFDS source"),
        ("tfds:name", "is not a TFDS source"),
    ]:
        with pytest.raises(UserError, match=reason):
            load_records("text", paths)
    bad = write(tmp_path / "bad.jsonl", [b"x"])
    with pytest.raises(UserError, match="all 1 are bad"):
        load_records("text", bad, on_bad_record="quarantine", quarantine=tmp_path / "q")


def test_arguments_are_checked(tmp_path):
    good = write(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ValueError, match="on_bad_record"):
        load_records("text", good, on_bad_record="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quarantine"):
        load_records("text", good, on_bad_record="quarantine")


def _malform(rng: random.Random, kind: str) -> bytes:
    """A good record with one or two injuries, to its values, its keys or its bytes."""
    record = json.loads(json.dumps(rng.choice(RECORDS[kind])))
    junk = [None, True, -1, 0, 2**40, 1.5, float("nan"), float("-inf"), "", " ", "x", "\ud83d", [],
            ["x"], [1], [True], [None] * 12, {}, {"role": "user"}, [{"role": "user"}],
            [{"role": "assistant", "content": "x"}], [{"role": 3, "content": "x"}]]  # fmt: skip
    for _ in range(rng.randint(1, 2)):
        known = ["prompt", "messages", "response", "responses", "ranks", "finished", "ratings",
                 "flags", "user_id", "labeler_id", "source", "text"]  # fmt: skip
        key = rng.choice([*record, *known])
        change = rng.randrange(4)
        if change == 0:
            record.pop(key, None)
        elif change == 1 and isinstance(record.get(key), list) and record[key]:
            record[key][rng.randrange(len(record[key]))] = rng.choice(junk)
        else:
            record[key] = rng.choice(junk)
    line = bytearray(json.dumps(record).encode())
    if rng.random() < 0.4:
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(line) + 1)
            line[at : at + rng.randrange(3)] = bytes(
                b for b in rng.randbytes(rng.randrange(3)) if b != 10
            )
    return bytes(line)


def _fuzz(tmp_path, count: int) -> None:
    rng = random.Random(0)
    refused = 0
    while refused < count:
        kind = rng.choice(KINDS)
        line = _malform(rng, kind)
        good = rng.choice(RECORDS[kind])
        name = write(tmp_path / "fuzz.jsonl", [good, line, good])
        aside = tmp_path / "aside.jsonl"
        kept = load_records(kind, name, on_bad_record="quarantine", quarantine=aside)
        lost = kept.quarantined[name]
        assert len(kept) + lost == 3, "a record vanished"
        try:
            assert len(load_records(kind, name)) == 3
            assert lost == 0
        except UserError as error:
            refused += 1
            assert lost == 1
            place, _, rest = str(error).partition(": ")
            assert place == f"{name}:2" and "; " in rest and "\n" not in rest
            assert json.loads(aside.read_text())["line"] == 2


def test_fuzz(tmp_path):
    _fuzz(tmp_path, 200)


@pytest.mark.slow
def test_fuzz_thousands(tmp_path):
    _fuzz(tmp_path, 2000)


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
