"""The records that come from outside: their schemas and the checks each one passes.

=============  ====================================================================================
demonstration  ``prompt`` or ``messages``, ``response``, ``user_id``?, ``labeler_id``?, ``source``?
comparison     ``prompt`` or ``messages``, ``responses`` (K texts), ``ranks`` (K integers, lower is
               better, equal is a tie), ``finished``? (K bools, default true), ``labeler_id``?,
               ``user_id``?, ``ratings``? (K integers 1..7), ``flags``? (a list)
prompt         ``prompt`` or ``messages``, ``user_id``?, ``source``? (plain, few_shot, user_based, api)
text           ``text``
=============  ====================================================================================

A demonstration or a prompt may be few-shot: ``prompt`` is then an instruction, ``few_shot`` a list of K
at least 2 examples of it, each ``{"query", "response"}``, and no ``response`` stands beside them.
Curation makes K records of it (:func:`instructax.data.curation.expand_few_shot`).
Keys beyond these are allowed and kept. A record that fails a check raises :class:`RecordError`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from instructax.config import UserError

KINDS = ("demonstration", "comparison", "prompt", "text")
ROLES = ("system", "user", "assistant")
PROMPT_SOURCES = ("plain", "few_shot", "user_based", "api")
INT32_MAX = 2**31 - 1

Record = dict[str, Any]


class RecordError(UserError):
    """One bad record: ``where: reason; what to do``."""

    def __init__(self, where: str, reason: str, remedy: str):
        super().__init__(f"{where}: {reason}; {remedy}")
        self.where = where
        self.reason = reason


def validate_record(
    kind: str, obj: Any, where: str, *, min_responses: int = 2, max_responses: int = 9
) -> Record:
    """The record as a new dict, or :class:`RecordError` whose message begins with ``where``.

    ``where`` says where the record stands (``file:line``). ``min_responses`` and ``max_responses``
    bound K of a comparison (InstructGPT ranked 4 to 9; 2 is an ordinary pair).
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if not isinstance(obj, dict):
        raise RecordError(where, f"is {_name(obj)}, not an object", f"write one {kind} as {{...}}")
    _check_values(obj, where)
    if kind == "text":
        _required_text(obj, "text", where)
        return dict(obj)
    _check_prompt(obj, where)
    if "few_shot" in obj:
        _check_few_shot(kind, obj, where)
    for key in ("user_id", "labeler_id", "source"):
        if key in obj:
            _required_text(obj, key, where)
    if kind == "demonstration" and "few_shot" not in obj:
        _required_text(obj, "response", where)
    elif kind == "comparison":
        _check_comparison(obj, where, min_responses, max_responses)
    elif "source" in obj and obj["source"] not in PROMPT_SOURCES:
        raise RecordError(
            where,
            f"source {_short(obj['source'])} is unknown",
            f"use one of {', '.join(PROMPT_SOURCES)} or leave it out",
        )
    return dict(obj)


def finished(record: Mapping[str, Any]) -> list[bool]:
    """Which responses of a comparison ended by themselves; all of them where the record is silent."""
    return list(record.get("finished", [True] * len(record["responses"])))


def prompt_text(record: Mapping[str, Any]) -> str:
    """The prompt as one text: itself, its few-shot examples behind it, or its turns as ``role: content``
    lines. For reading and comparing.
    """
    if "messages" in record:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in record["messages"])
    examples = (f"{example['query']}\n{example['response']}" for example in few_shot(record))
    return "\n\n".join([record["prompt"], *examples])


def few_shot(record: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """The examples of a few-shot record; none of any other."""
    return record.get("few_shot", ())


def _check_values(obj: dict, where: str) -> None:
    """Every value, however deep, must survive a round trip through JSON in UTF-8."""
    stack: list[Any] = [obj]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise RecordError(where, f"key {_short(key)} is not text", "quote every key")
            stack.extend(value.keys())
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, str):
            if not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError:
                    raise RecordError(
                        where,
                        f"{_short(value)} holds half of a surrogate pair",
                        "write the character whole, as UTF-8",
                    ) from None
        elif isinstance(value, float):
            if not math.isfinite(value):
                raise RecordError(where, f"{value} is not a finite number", "write a finite number")
        elif value is not None and not isinstance(value, (bool, int)):
            raise RecordError(where, f"holds {_name(value)}", "use JSON values only")


def _check_prompt(obj: dict, where: str) -> None:
    if "prompt" in obj and "messages" in obj:
        raise RecordError(where, "has both prompt and messages", "keep one of the two")
    if "prompt" in obj:
        _required_text(obj, "prompt", where)
    elif "messages" in obj:
        _check_messages(obj["messages"], where)
    else:
        raise RecordError(where, "has neither prompt nor messages", "add one of the two")


def _check_few_shot(kind: str, obj: dict, where: str) -> None:
    if kind == "comparison":
        raise RecordError(
            where, "few_shot stands in a comparison", "write the whole prompt that was answered"
        )
    if "messages" in obj:
        raise RecordError(
            where, "has both messages and few_shot", "write the instruction as prompt"
        )
    if "response" in obj:
        raise RecordError(
            where, "has both response and few_shot", "every example holds its own response"
        )
    examples = _required_list(obj, "few_shot", where)
    if len(examples) < 2:
        raise RecordError(
            where,
            f"few_shot holds {len(examples)} example{'s' * (len(examples) != 1)}",
            "give at least 2, or write prompt and response",
        )
    for k, example in enumerate(examples):
        at = f"few_shot[{k}]"
        if not isinstance(example, dict):
            raise RecordError(
                where, f"{at} is {_name(example)}", 'write {"query": ..., "response": ...}'
            )
        for key in ("query", "response"):
            _required_text(example, key, where, at + ".")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list):
        raise RecordError(where, f"messages is {_name(messages)}", "write a list of messages")
    if not messages:
        raise RecordError(where, "messages is empty", "begin with a user message")
    for i, turn in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(turn, dict):
            raise RecordError(
                where, f"{at} is {_name(turn)}", 'write {"role": ..., "content": ...}'
            )
        if "role" not in turn:
            raise RecordError(where, f"{at} has no role", f"add one of {', '.join(ROLES)}")
        if turn["role"] not in ROLES:
            raise RecordError(
                where, f"{at}.role is {_short(turn['role'])}", f"use one of {', '.join(ROLES)}"
            )
        _required_text(turn, "content", where, at + ".")
        if turn["role"] == "system" and i > 0:
            raise RecordError(where, f"{at} is a system message", "only the first message may be")
    turns = [turn["role"] for turn in messages if turn["role"] != "system"]
    if turns != [("user", "assistant")[i % 2] for i in range(len(turns))]:
        raise RecordError(
            where, "messages do not alternate", "write user, assistant, user, ... in turn"
        )
    if len(turns) % 2 == 0:
        raise RecordError(
            where, "the last message is not the user's", "end with the message to be answered"
        )


def _check_comparison(obj: dict, where: str, min_responses: int, max_responses: int) -> None:
    responses = _required_list(obj, "responses", where)
    for k, response in enumerate(responses):
        if not isinstance(response, str):
            raise RecordError(where, f"responses[{k}] is {_name(response)}", "write it as text")
    num = len(responses)
    if num == 0:
        raise RecordError(where, "responses is empty", f"give at least {min_responses}")
    if not min_responses <= num <= max_responses:
        raise RecordError(
            where,
            f"has {num} response{'s' * (num > 1)}",
            f"give {min_responses} to {max_responses}, or change the bounds",
        )
    ranks = _required_list(obj, "ranks", where)
    _check_integers(ranks, "ranks", num, -INT32_MAX, INT32_MAX, where)
    if "ratings" in obj:
        _check_integers(_required_list(obj, "ratings", where), "ratings", num, 1, 7, where)
    if "flags" in obj:
        _required_list(obj, "flags", where)
    if "finished" in obj:
        flags = _required_list(obj, "finished", where)
        _check_count(flags, "finished", num, where)
        for k, flag in enumerate(flags):
            if not isinstance(flag, bool):
                raise RecordError(where, f"finished[{k}] is {_name(flag)}", "write true or false")
    for k, (response, done) in enumerate(zip(responses, finished(obj), strict=True)):
        if not response and not done:
            # Neither text nor an end: there would be no token to score.
            raise RecordError(where, f"responses[{k}] is empty and unfinished", "leave it out")


def _check_integers(values: list, key: str, num: int, low: int, high: int, where: str) -> None:
    _check_count(values, key, num, where)
    for k, value in enumerate(values):
        # bool is an int to Python, but "true" as a rank is a mistake in the file.
        if isinstance(value, bool) or not isinstance(value, int):
            raise RecordError(where, f"{key}[{k}] is {_name(value)}", "write an integer")
        if not low <= value <= high:
            raise RecordError(where, f"{key}[{k}] is {_short(value)}", f"use {low} to {high}")


def _check_count(values: list, key: str, num: int, where: str) -> None:
    if len(values) != num:
        raise RecordError(
            where, f"{num} responses but {len(values)} {key}", f"give one of {key} to each response"
        )


def _required_text(obj: dict, key: str, where: str, prefix: str = "") -> None:
    if key not in obj:
        raise RecordError(where, f"{prefix}{key} is missing", "add it")
    if not isinstance(obj[key], str):
        raise RecordError(where, f"{prefix}{key} is {_name(obj[key])}", "write it as text")
    if not obj[key].strip():
        raise RecordError(where, f"{prefix}{key} is empty", "fill it or remove the record")


def _required_list(obj: dict, key: str, where: str) -> list:
    if key not in obj:
        raise RecordError(where, f"{key} is missing", "add it")
    if not isinstance(obj[key], list):
        raise RecordError(where, f"{key} is {_name(obj[key])}", "write it as a list")
    return obj[key]


def _name(value: Any) -> str:
    """JSON's own word for a value's type."""
    names: Sequence[tuple[type, str]] = (
        (bool, "a boolean"), (int, "an integer"), (float, "a decimal number"),
        (str, "text"), (list, "a list"), (dict, "an object"), (type(None), "null"),
    )  # fmt: skip
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def _short(value: Any) -> str:
    try:
        text = ascii(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a very large integer"
    return text if len(text) <= 40 else text[:37] + "..."
