"""Every check of the schemas has a record that fails it and nothing else."""

from __future__ import annotations

import json

import pytest

from instructax.config import UserError
from instructax.records import RecordError, finished, prompt_text, validate_record

DEMONSTRATION = {"prompt": "p", "response": "r", "user_id": "u", "labeler_id": "l", "source": "s"}
COMPARISON = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 1, -3]}
CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "u2"},
]
SHOTS = [{"query": "q1", "response": "r1"}, {"query": "q2", "response": "r2"}]

GOOD = [
    ("demonstration", DEMONSTRATION),
    ("demonstration", {"messages": CHAT, "response": "r"}),
    ("comparison", COMPARISON),
    ("comparison", COMPARISON | {"finished": [True, False, True], "ratings": [1, 7, 4]}),
    ("comparison", COMPARISON | {"responses": ["", "b", "c"], "flags": [{"x": 1}]}),
    ("prompt", {"prompt": "p", "source": "few_shot"}),
    ("prompt", {"messages": CHAT[1:2]}),
    ("prompt", {"prompt": "p", "few_shot": SHOTS, "user_id": "u"}),
    ("demonstration", {"prompt": "p", "few_shot": SHOTS}),
    ("text", {"text": "t"}),
]

# (kind, what replaces fields of a good record, words of the reason); DELETE takes a field away
DELETE = object()
BAD = [
    ("text", {"text": DELETE}, "text is missing"),
    ("text", {"text": 3}, "text is an integer"),
    ("text", {"text": None}, "text is null"),
    ("text", {"text": " \n"}, "text is empty"),
    ("text", {"x": float("nan")}, "not a finite number"),
    ("text", {"x": [{"y": float("inf")}]}, "not a finite number"),
    ("text", {"text": "a\ud800"}, "surrogate"),
    ("text", {"x": {"\udfff": 1}}, "surrogate"),
    ("text", {"x": {1: 2}}, "key 1 is not text"),
    ("text", {"x": {1, 2}}, "holds set"),
    ("prompt", {"prompt": DELETE}, "neither prompt nor messages"),
    ("prompt", {"messages": CHAT}, "both prompt and messages"),
    ("prompt", {"prompt": ["p"]}, "prompt is a list"),
    ("prompt", {"prompt": ""}, "prompt is empty"),
    ("prompt", {"source": "chat"}, "source 'chat' is unknown"),
    ("prompt", {"source": "x" * 99}, "xxx..."),
    ("prompt", {"user_id": 7}, "user_id is an integer"),
    ("prompt", {"user_id": ""}, "user_id is empty"),
    ("prompt", {"labeler_id": True}, "labeler_id is a boolean"),
    ("demonstration", {"response": DELETE}, "response is missing"),
    ("demonstration", {"response": {}}, "response is an object"),
    ("demonstration", {"response": ""}, "response is empty"),
    ("demonstration", {"source": 1.5}, "source is a decimal number"),
    ("comparison", {"responses": DELETE}, "responses is missing"),
    ("comparison", {"responses": "ab"}, "responses is text"),
    ("comparison", {"responses": []}, "responses is empty"),
    ("comparison", {"responses": ["a"], "ranks": [1]}, "has 1 response"),
    ("comparison", {"responses": ["a"] * 10, "ranks": [1] * 10}, "has 10 responses"),
    ("comparison", {"responses": ["a", None, "c"]}, "responses[1] is null"),
    ("comparison", {"ranks": DELETE}, "ranks is missing"),
    ("comparison", {"ranks": {"a": 1}}, "ranks is an object"),
    ("comparison", {"ranks": [1, 2]}, "3 responses but 2 ranks"),
    ("comparison", {"ranks": [1, True, 2]}, "ranks[1] is a boolean"),
    ("comparison", {"ranks": [1, 2.0, 2]}, "ranks[1] is a decimal number"),
    ("comparison", {"ranks": [1, 2, 2**31]}, "ranks[2] is 2147483648"),
    ("comparison", {"ranks": [1, 2, 10**5000]}, "a very large integer"),
    ("comparison", {"finished": True}, "finished is a boolean"),
    ("comparison", {"finished": [True]}, "3 responses but 1 finished"),
    ("comparison", {"finished": [True, 1, True]}, "finished[1] is an integer"),
    ("comparison", {"responses": ["", "b", "c"], "finished": [False] * 3}, "empty and unfinished"),
    ("comparison", {"ratings": 3}, "ratings is an integer"),
    ("comparison", {"ratings": [1, 2]}, "3 responses but 2 ratings"),
    ("comparison", {"ratings": [1, 8, 2]}, "ratings[1] is 8"),
    ("comparison", {"ratings": [0, 7, 2]}, "ratings[0] is 0"),
    ("comparison", {"ratings": ["1", 7, 2]}, "ratings[0] is text"),
    ("comparison", {"flags": "bad"}, "flags is text"),
    ("comparison", {"few_shot": SHOTS}, "few_shot stands in a comparison"),
    ("demonstration", {"few_shot": SHOTS}, "both response and few_shot"),
    ("prompt", {"prompt": DELETE, "messages": CHAT, "few_shot": SHOTS}, "messages and few_shot"),
    ("prompt", {"few_shot": None}, "few_shot is null"),
    ("prompt", {"few_shot": []}, "few_shot holds 0 examples"),
    ("prompt", {"few_shot": SHOTS[:1]}, "few_shot holds 1 example"),
    ("prompt", {"few_shot": [SHOTS[0], "q"]}, "few_shot[1] is text"),
    ("prompt", {"few_shot": [SHOTS[0], {"query": "q"}]}, "few_shot[1].response is missing"),
    ("prompt", {"few_shot": [{"response": "r"}, SHOTS[0]]}, "few_shot[0].query is missing"),
    ("prompt", {"few_shot": [SHOTS[0], SHOTS[1] | {"query": " "}]}, "few_shot[1].query is empty"),
]
BAD_MESSAGES = [
    ("hello", "messages is text"),
    ([], "messages is empty"),
    (["hello"], "messages[0] is text"),
    ([{"content": "x"}], "messages[0] has no role"),
    ([{"role": "robot", "content": "x"}], "messages[0].role is 'robot'"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role is ['user']"),
    ([{"role": "user"}], "messages[0].content is missing"),
    ([{"role": "user", "content": 1}], "messages[0].content is an integer"),
    ([{"role": "user", "content": ""}], "messages[0].content is empty"),
    (CHAT[1:] + CHAT[:1], "messages[3] is a system message"),
    (CHAT[:1], "the last message is not the user's"),
    (CHAT[:3], "the last message is not the user's"),
    (CHAT[2:], "do not alternate"),
    (CHAT[1:2] * 2, "do not alternate"),
]
BASE = {
    "text": {"text": "t"},
    "prompt": {"prompt": "p"},
    "demonstration": DEMONSTRATION,
    "comparison": COMPARISON,
}


@pytest.mark.parametrize("kind,record", GOOD)
def test_good_records_pass_and_keep_extra_keys(kind, record):
    record = record | {"extra": {"nested": [1, "é", None, 2.5]}}
    before = json.dumps(record)
    assert validate_record(kind, record, "f:1") == record
    assert json.dumps(record) == before


def _spoil(kind, change):
    return {k: v for k, v in (BASE[kind] | change).items() if v is not DELETE}


@pytest.mark.parametrize(
    "kind,record,reason",
    [(kind, _spoil(kind, change), reason) for kind, change, reason in BAD]
    + [("prompt", {"messages": messages}, reason) for messages, reason in BAD_MESSAGES]
    + [("text", [1], "is a list, not an object"), ("text", None, "is null, not an object")],
)
def test_each_check_refuses_with_place_reason_and_remedy(kind, record, reason):
    with pytest.raises(RecordError) as caught:
        validate_record(kind, record, "data.jsonl:17")
    message = str(caught.value)
    assert message.startswith("data.jsonl:17: ")
    assert reason in message
    assert message.rpartition("; ")[2], "what to do is missing"
    assert "\n" not in message
    assert isinstance(caught.value, UserError)


def test_bounds_on_k_are_the_callers():
    pair = {"prompt": "p", "responses": ["a", "b"], "ranks": [0, 1]}
    validate_record("comparison", pair, "f:1")
    with pytest.raises(RecordError, match="give 4 to 9"):
        validate_record("comparison", pair, "f:1", min_responses=4)
    ten = {"prompt": "p", "responses": ["a"] * 10, "ranks": [0] * 10}
    validate_record("comparison", ten, "f:1", max_responses=10)


def test_an_unknown_kind_is_the_programmers_mistake():
    with pytest.raises(ValueError, match="kind"):
        validate_record("ranking", {}, "f:1")


def test_finished_defaults_to_true():
    assert finished(COMPARISON) == [True] * 3
    assert finished(COMPARISON | {"finished": [True, False, True]}) == [True, False, True]


def test_prompt_text_reads_every_form():
    assert prompt_text({"prompt": "p"}) == "p"
    assert prompt_text({"messages": CHAT[:2]}) == "system: s\nuser: u"
    assert prompt_text({"prompt": "p", "few_shot": SHOTS}) == "p\n\nq1\nr1\n\nq2\nr2"
