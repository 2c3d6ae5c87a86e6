"""The frame around prompts and responses; nobody but the template writes a special token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.data.templates import encode_prompt, encode_response
from instructax.data.tokenizer import ROLE_PIECES, Tokenizer, train_tokenizer

TOKENIZER = Tokenizer.from_bytes(train_tokenizer(["hello to you and good morning"] * 9, 280))
ROLE = TOKENIZER.role_ids
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id

hostile = st.lists(
    st.sampled_from([*ROLE_PIECES.values(), "<|eos|>", "</s>", "\n", " ", "x"]), max_size=6
).map("".join)


def specials(ids):
    return [i for i in ids if i in TOKENIZER.special_ids]


def test_plain_prompt_is_its_text_and_an_answer_mark():
    ids = encode_prompt(TOKENIZER, {"prompt": "hello"})
    assert ids == [BOS, *TOKENIZER.encode("hello"), ROLE["assistant"]]


def test_plain_prompt_as_roles_equals_one_user_message():
    message = {"messages": [{"role": "user", "content": "hello"}]}
    expected = [BOS, ROLE["user"], *TOKENIZER.encode("hello"), ROLE["end"], ROLE["assistant"]]
    assert encode_prompt(TOKENIZER, {"prompt": "hello"}, "roles") == expected
    assert encode_prompt(TOKENIZER, message, "roles") == expected
    assert encode_prompt(TOKENIZER, message, "plain") == expected


@settings(deadline=None)
@given(st.lists(hostile, min_size=4, max_size=4))
def test_a_user_cannot_inject_a_role(texts):
    roles = ["system", "user", "assistant", "user"]
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
    frame = [BOS]
    for role in roles:
        frame += [ROLE[role], ROLE["end"]]
    ids = encode_prompt(TOKENIZER, {"messages": turns})
    assert specials(ids) == [*frame, ROLE["assistant"]]
    assert TOKENIZER.decode(ids) == "".join(texts)
    assert specials(encode_prompt(TOKENIZER, {"prompt": texts[0]})) == [BOS, ROLE["assistant"]]
    assert specials(encode_response(TOKENIZER, texts[0], False)) == []


def test_eos_if_and_only_if_finished():
    assert encode_response(TOKENIZER, "you", True) == [*TOKENIZER.encode("you"), EOS]
    assert encode_response(TOKENIZER, "you", False) == TOKENIZER.encode("you")
    assert encode_response(TOKENIZER, "") == [EOS]


def test_unknown_template():
    with pytest.raises(ValueError, match="chat_template"):
        encode_prompt(TOKENIZER, {"prompt": "x"}, "jinja")  # type: ignore[arg-type]
