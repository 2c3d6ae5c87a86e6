"""Curation: what goes, what stays, and that the report adds up."""

from __future__ import annotations

import pytest

from instructax.data.curation import (
    cap_per_user,
    deduplicate,
    expand_few_shot,
    filter_long_prompts,
    prompt_overlap,
    remove_personal_data,
    split_by_user,
)
from instructax.data.personal import find_personal_data, masked, name_pattern
from instructax.records import validate_record


def prompts(*texts, **fields):
    return [{"prompt": text, **fields} for text in texts]


def test_cap_counts_every_record():
    heavy = prompts(*(f"h{i}" for i in range(7)), user_id="heavy")
    light = prompts("l1", "l2", user_id="light")
    nobody = prompts(*(f"n{i}" for i in range(5)))
    kept, report = cap_per_user(heavy[:3] + light + nobody + heavy[3:], limit=4)
    assert [r["prompt"] for r in kept if r.get("user_id") == "heavy"] == ["h0", "h1", "h2", "h3"]
    assert report.kept == len(kept) == 11 and report.removed == 3
    assert report.counts == {"users": 2, "users_over_limit": 1, "without_user_id": 5}


def test_duplicates_share_a_prefix_or_are_equal():
    stem = "Summarise the following article in one sentence: "
    records = prompts(stem + "A", stem + "B", "short", "short ", "shorter", "shor")
    records.append({"messages": [{"role": "user", "content": "short"}]})
    kept, report = deduplicate(records, prefix_chars=20)
    assert kept == [records[i] for i in (0, 2, 4, 5, 6)]
    assert (report.kept, report.removed) == (5, 2)
    assert report.counts == {"groups_of_duplicates": 2}
    assert len(deduplicate(records, prefix_chars=len(stem) + 1)[0]) == 6
    with pytest.raises(ValueError, match="prefix_chars"):
        deduplicate(records, 0)


def test_splits_are_disjoint_by_user_and_stable():
    records = [{"prompt": f"p{i}", "user_id": f"u{i % 400}"} for i in range(2000)]
    fractions = {"train": 0.8, "validation": 0.1, "test": 0.1}
    splits, report = split_by_user(records, fractions)
    users = {name: {r["user_id"] for r in part} for name, part in splits.items()}
    assert sum(map(len, users.values())) == 400
    assert sum(report.counts.values()) == 2000
    assert abs(len(users["train"]) / 400 - 0.8) < 0.08
    more, _ = split_by_user([{"prompt": "new", "user_id": "new"}, *records[::-1]], fractions)
    for name, part in splits.items():
        assert {r["user_id"] for r in more[name]} - {"new"} == {r["user_id"] for r in part}
    other, _ = split_by_user(records, fractions, salt="other")
    assert {r["user_id"] for r in other["test"]} != users["test"]


def test_without_user_id_equal_prompts_stay_together():
    records = prompts(*[f"p{i}" for i in range(100)] * 2)
    splits, _ = split_by_user(records, {"a": 0.5, "b": 0.5})
    assert not {r["prompt"] for r in splits["a"]} & {r["prompt"] for r in splits["b"]}
    assert all(len(part) for part in splits.values())


def test_split_edges():
    assert len(split_by_user(prompts("a", "b"), {"all": 1.0, "none": 0.0})[0]["all"]) == 2
    for fractions in ({"a": 0.5}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(ValueError, match="fractions"):
            split_by_user([], fractions)


PERSONAL = [
    ("email", "write to jo.doe+x@mail.example.co.uk now", "jo.doe+x@mail.example.co.uk"),
    ("phone", "call +44 20 7946 0958.", "+44 20 7946 0958"),
    ("phone", "call (202) 555-0143!", "(202) 555-0143"),
    ("phone", "call 202-555-0143, please", "202-555-0143"),
    ("phone", "call 202.555.0143", "202.555.0143"),
    ("phone", "ring 555-0143", "555-0143"),
    ("phone", "ring 020 7946 0958", "020 7946 0958"),
    ("card", "pay 4111 1111 1111 1111 today", "4111 1111 1111 1111"),
    ("card", "pay 5500-0000-0000-0004", "5500-0000-0000-0004"),
    ("card", "pay 378282246310005.", "378282246310005"),
    ("iban", "to GB82 WEST 1234 5698 7654 32", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "to DE89370400440532013000 by", "DE89370400440532013000"),
    ("address", "I live at 221B Baker Street, London", "221B Baker Street"),
    ("address", "at 1600 Pennsylvania Ave", "1600 Pennsylvania Ave"),
    ("address", "at 12 oak street in", "12 oak street"),
    ("name", "ask Ada Lovelace about it", "Ada Lovelace"),
]
HARMLESS = [
    "4111 1111 1111 1112",  # fails Luhn
    "0000 0000 0000 0000",
    "GB82 WEST 1234 5698 7654 33",  # fails mod 97
    "on 2023-03-01 at 10:30",
    "from 1990-2000, 3.14159265358979, 1,000,000 and 10 000 000",
    "version 1.2.3-4567",
    "add 12, 35, 678 and 9012",
    "the sum of 123456789 and 987654321",
    "after 3 miles down the road",
    "Write 3 sentences about a long road.",
    "a@b and @handle",
    "Adam and Lovelace",
    "1 2 3 4 5 6 7 8 9 10",
]


@pytest.mark.parametrize("kind,text,finding", PERSONAL)
def test_personal_data_is_found(kind, text, finding):
    found = find_personal_data(text, name_pattern(["Ada Lovelace"]))
    assert [(k, text[a:b]) for k, a, b in found] == [(kind, finding)]


@pytest.mark.parametrize("text", HARMLESS)
def test_ordinary_numbers_are_left_alone(text):
    assert find_personal_data(text, name_pattern(["Ada Lovelace", ""])) == []


def test_the_report_counts_by_kind_and_masks():
    records = [
        {"prompt": "mail ann@x.org or bob@x.org", "response": "fine"},
        {"prompt": "fine", "response": "call 202-555-0143"},
        {"messages": [{"role": "user", "content": "I am Ann"}], "response": "hi"},
        {"prompt": "p", "responses": ["fine", "at 12 Oak Street"], "ranks": [0, 1]},
        {"text": "nothing here"},
    ]
    kept, report = remove_personal_data(records, names=["Ann"], num_examples=1)
    assert kept == [records[4]]
    assert (report.kept, report.removed) == (1, 4)
    assert report.counts == {"email": 2, "phone": 1, "name": 1, "address": 1}
    assert "email: a**@*.***" in report.examples and len(report.examples) == 4
    assert not any(word in " ".join(report.examples) for word in ("ann", "Ann", "555", "Oak"))
    assert remove_personal_data(records)[1].removed == 3


def test_reports_of_duplicates_do_not_spell_personal_data():
    _, report = deduplicate(prompts("mail ann@x.org", "mail ann@x.org"))
    assert report.examples == (f"2 x mail {masked('ann@x.org')}",)


def test_long_prompts_are_counted():
    kept, report = filter_long_prompts(prompts("a", "aaa", "aa"), lambda r: len(r["prompt"]), 2)
    assert [r["prompt"] for r in kept] == ["a", "aa"]
    assert report.counts == {"too_long": 1, "longest": 3}


def few_shot(count, instruction="Do it.", **fields):
    examples = [{"query": f"query{i}", "response": f"response{i}"} for i in range(count)]
    return {"prompt": instruction, "few_shot": examples, **fields}


def test_few_shot_expansion_leaves_the_answer_out():
    records, report = expand_few_shot([few_shot(4, user_id="u", labeler_id="l", id=7)])
    assert len(records) == report.kept == 4 and report.removed == 0
    assert report.counts == {"records": 1, "examples": 4}
    for k, record in enumerate(records):
        validate_record("demonstration", record, "f:1")
        validate_record("prompt", record, "f:1")
        assert record["response"] == f"response{k}" and record["source"] == "few_shot"
        assert f"response{k}" not in record["prompt"] and "few_shot" not in record
        assert record["prompt"].startswith("Do it.\n\n")
        assert record["prompt"].endswith(f"query{k}\n")
        assert all(f"query{i}\nresponse{i}" in record["prompt"] for i in range(4) if i != k)
        assert (record["user_id"], record["labeler_id"], record["id"]) == ("u", "l", f"7/{k}")


def test_few_shot_expansion_leaves_other_records_alone_and_in_place():
    plain = prompts("a", "b", user_id="u")
    records, report = expand_few_shot([plain[0], few_shot(2, source="api"), plain[1]])
    assert [records[0], records[-1]] == plain and len(records) == 4
    assert [r["source"] for r in records[1:3]] == ["api", "api"]
    # One content for intervals over content: the examples share their shots.
    assert len({r["content_key"] for r in records[1:3]}) == 1
    again, nothing = expand_few_shot(records)
    assert again == records and nothing.counts == {"records": 0, "examples": 0}
    assert report.kept == 4


def test_few_shot_records_are_compared_and_searched_with_their_examples():
    other = few_shot(3)
    assert len(deduplicate([few_shot(2), other, few_shot(2)])[0]) == 2
    other["few_shot"][1]["response"] = "write to a.person@mail.example.com"
    kept, report = remove_personal_data([few_shot(2), other])
    assert kept == [few_shot(2)] and report.counts == {"email": 1}


def test_overlap_measures_are_nested():
    long = " ".join(f"w{i}" for i in range(30))
    training = prompts("exact  match", "same beginning, one end", "x " + long, user_id="u")
    evaluation = prompts("exact match", "same beginning, other", long.upper() + " y", "new")
    evaluation[3]["user_id"] = "u"
    report = prompt_overlap(training, evaluation, prefix_chars=15, ngram=13)
    assert (report.evaluation, report.exact, report.prefix, report.ngram) == (4, 1, 2, 3)
    assert report.indices == (0, 1, 2) and report.shared_users == 1
    assert prompt_overlap([], evaluation).ngram == 0
