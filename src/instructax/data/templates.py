"""How a prompt and a response become tokens; the only place where special tokens are placed.

================  ===============================================================
plain prompt      ``bos text <|assistant|>`` (``"plain"``), or as one user message
                  ``bos <|user|> text <|end|> <|assistant|>`` (``"roles"``)
messages          ``bos (<|role|> content <|end|>)* <|assistant|>``
response          ``text eos``, without eos where it was cut short
================  ===============================================================

Roles are ids, never text: typing ``<|system|>`` into a prompt yields ordinary pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from instructax.data.tokenizer import Tokenizer

ChatTemplate = Literal["plain", "roles"]


def encode_prompt(
    tokenizer: Tokenizer, record: Mapping[str, Any], chat_template: ChatTemplate = "plain"
) -> list[int]:
    """Ids of a record's ``prompt`` or ``messages``, ending where the response begins.

    ``chat_template`` concerns plain prompts only: ``"plain"`` leaves them as text (few-shot prompts
    and continuations keep their form), ``"roles"`` makes them a user's turn.
    """
    if chat_template not in ("plain", "roles"):
        raise ValueError(f"chat_template must be 'plain' or 'roles', got {chat_template!r}")
    role = tokenizer.role_ids
    ids = [tokenizer.bos_id]
    if "messages" in record:
        messages = record["messages"]
    elif chat_template == "roles":
        messages = [{"role": "user", "content": record["prompt"]}]
    else:
        messages = []
        ids += tokenizer.encode(record["prompt"])
    for turn in messages:
        ids += [role[turn["role"]], *tokenizer.encode(turn["content"]), role["end"]]
    return [*ids, role["assistant"]]


def encode_response(tokenizer: Tokenizer, text: str, finished: bool = True) -> list[int]:
    """Ids of a response; eos is appended if and only if the response is finished."""
    return [*tokenizer.encode(text), *([tokenizer.eos_id] if finished else [])]
