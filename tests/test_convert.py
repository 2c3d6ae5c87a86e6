"""Public formats to records: what is kept is right, what is left out is counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from instructax.config import UserError
from instructax.data.convert import (
    helpful_harmless,
    main,
    open_assistant,
    plain_text,
    self_instruct,
)
from instructax.data.readers import parse_line
from instructax.records import RecordError, validate_record


def message(text, role="assistant", replies=(), **fields):
    return {"text": text, "role": role, "lang": "en", "replies": list(replies)} | fields


def test_a_tree_gives_a_comparison_for_each_ranked_prompt():
    follow_up = message("and then?", "prompter", [message("x", rank=1), message("y", rank=0)])
    tree = message(
        "why?",
        "prompter",
        [
            message("because", rank=1, replies=[follow_up]),
            message("so", rank=0),
            message("unranked"),
            message("gone", rank=2, deleted=True),
            message("warum", rank=3, lang="de", replies=[follow_up]),
        ],
        message_id="m",
    )
    records, left_out = open_assistant([{"prompt": tree}])
    assert [(r["responses"], r["ranks"]) for r in records] == [
        (["so", "because"], [0, 1]),
        (["y", "x"], [0, 1]),
    ]
    assert [t["role"] for t in records[1]["messages"]] == ["user", "assistant", "user"]
    assert records[0]["message_id"] == "m"
    assert left_out["reply without a rank, deleted or in another language"] == 3
    few, left_out = open_assistant([{"prompt": tree}], min_responses=3)
    assert few == [] and left_out["prompt with fewer than 3 ranked replies"] == 2


def test_of_too_many_replies_the_best_ranked_stay():
    tree = message("q", "prompter", [message(str(k), rank=k) for k in (3, 0, 2, 1)])
    records, left_out = open_assistant([{"prompt": tree}], max_responses=3)
    assert records[0]["responses"] == ["0", "1", "2"]
    assert left_out == {"reply ranked below 3 others": 1}


def test_self_instruct_joins_instruction_and_input():
    task = {"id": "t", "instruction": "Add.", "instances": [
        {"input": "1 2", "output": "3"}, {"input": " ", "output": "?"}, {"input": "", "output": ""},
    ]}  # fmt: skip
    records, left_out = self_instruct([task])
    assert [(r["prompt"], r["response"]) for r in records] == [("Add.\n\n1 2", "3"), ("Add.", "?")]
    assert left_out == {"response is empty": 1}


def test_dialogues_split_at_their_last_turn():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    good = {"chosen": start + " well", "rejected": start + " badly\n\nindeed"}
    parted = {"chosen": start + " a", "rejected": start.replace("hi", "ho") + " b"}
    cut = {"chosen": "\n\nHuman: hi", "rejected": "\n\nHuman: hi"}
    none = {"chosen": "no turns", "rejected": "none"}
    records, left_out = helpful_harmless([good, parted, cut, none])
    assert records[0]["responses"] == ["well", "badly\n\nindeed"]
    assert [t["content"] for t in records[0]["messages"]] == ["hi", "hello", "how?"]
    assert left_out == {
        "dialogues part before the last turn": 1, "dialogue without a last assistant turn": 2,
    }  # fmt: skip


def test_text_files_become_records_with_a_topic(tmp_path):
    (tmp_path / "news.txt").write_text("one\ntwo", "utf-8")
    assert list(plain_text([tmp_path / "news.txt"])) == [{"text": "one\ntwo", "topic": "news"}]
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "empty.txt").write_bytes(b"")
    for name in ("bad", "empty"):
        with pytest.raises(RecordError, match=f"{name}.txt:1: "):
            list(plain_text([tmp_path / f"{name}.txt"]))
    with pytest.raises(UserError, match="cannot read"):
        list(plain_text([tmp_path / "none.txt"]))


def test_real_files_convert_to_valid_records(real_data):
    def lines(*parts):
        path = real_data.joinpath(*parts)
        return [parse_line(x, path.name) for x in path.read_bytes().splitlines()]

    trees, _ = open_assistant(lines("oasst_trees", "en_100_tree.jsonl"))
    sizes = Counter(len(r["responses"]) for r in trees)
    assert sum(sizes.values()) > 200 and max(sizes) <= 9 and min(sizes) == 2
    assert max(len(r["messages"]) for r in trees) >= 3
    dialogues = lines("hh_rlhf", "harmless-base.test.first1000.jsonl")
    pairs, left_out = helpful_harmless(dialogues)
    assert len(pairs) + sum(left_out.values()) == len(dialogues) == 1000
    assert len(pairs) > 950
    for kind, records in (("comparison", trees), ("comparison", pairs)):
        for record in records:
            validate_record(kind, record, "x:1")


def test_command_line(tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    task = {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}], "id": "t"}
    empty = {"instruction": "Say.", "instances": [{"input": "", "output": ""}]}
    source.write_text(f"{json.dumps(task)}\n{json.dumps(empty)}\n")
    assert main(["self_instruct", str(source), str(out)]) == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    assert (record["prompt"], record["response"]) == ("Add.\n\n1 2", "3")
    assert "1 records" in (said := capsys.readouterr().out) and "left out: 1 x" in said
    (tmp_path / "a.txt").write_text("text")
    assert main(["plain_text", str(tmp_path / "a.txt"), str(out)]) == 0
    assert json.loads(out.read_text()) == {"text": "text", "topic": "a"}


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        ("self_instruct", "{}", "in.jsonl:1: is not in the format self_instruct"),
        ("open_assistant", "[]", "in.jsonl:1: is not in the format open_assistant"),
        ("helpful_harmless", '{"chosen": 1, "rejected": 2}', "is not in the format"),
        ("helpful_harmless", "{", "in.jsonl:1: "),
        ("self_instruct", '{"instruction": "a", "instances": []}', "no record is left"),
    ],
)
def test_command_line_refuses_in_one_line(kind, content, says, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text(content)
    assert main([kind, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("instructax: ") and error.count("\n") == 1 and says in error
    assert main([kind, str(tmp_path / "none"), str(tmp_path / "out.jsonl")]) == 2
    assert not (tmp_path / "out.jsonl").exists()
