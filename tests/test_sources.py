"""Records from several sources: nothing is lost in silence, every refusal names file and line."""

from __future__ import annotations

import json
import random

import pytest
from record_files import BAD_LINES, RECORDS, write

from instructax.config import UserError
from instructax.data.sources import load_records
from instructax.records import KINDS


def test_several_files_and_globs_stand_in_order(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", [{"text": name}] * 3) for name in "bac"]
    assert "".join(r["text"] for r in load_records("text", files)) == "bbbaaaccc"
    assert "".join(r["text"] for r in load_records("text", str(tmp_path / "*.jsonl"))) == (
        "aaabbbccc"
    )


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
                 "flags", "user_id", "labeler_id", "source", "text", "few_shot"]  # fmt: skip
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
