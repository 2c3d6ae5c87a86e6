"""Good records of every kind, and lines that are none, each for one reason."""

from __future__ import annotations

import json

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
        "note": "",
    },
    {"prompt": "i", "few_shot": [{"query": "q", "response": "r", "n": 1}] * 2, "user_id": "u"},
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
PROMPTS = [
    {"prompt": "p", "source": "api", "labeler_id": "l"},
    {"prompt": "q", "user_id": "u"},
    {"prompt": "i", "few_shot": [{"query": "q", "response": "r"}] * 2},
]
TEXT = [{"text": "one"}, {"text": "two\n", "topic": "t"}]
RECORDS = {
    "demonstration": DEMONSTRATIONS, "comparison": COMPARISONS, "prompt": PROMPTS, "text": TEXT,
}  # fmt: skip


def write(path, lines, end="\n"):
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"\n".join(encoded) + end.encode())
    return str(path)


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
