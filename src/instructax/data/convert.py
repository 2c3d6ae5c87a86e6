"""Public formats to records. Each converter returns the records and a count of what it left out, by reason."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from instructax.config import UserError
from instructax.data.sources import text_record
from instructax.records import Record, RecordError, validate_record

Converted = tuple[list[Record], dict[str, int]]


def open_assistant(
    trees: Iterable[Mapping[str, Any]],
    *,
    language: str = "en",
    min_responses: int = 2,
    max_responses: int = 9,
) -> Converted:
    """OpenAssistant conversation trees to comparisons: a prompter's message path and its ranked replies.

    Kept are paths of undeleted messages in ``language`` and, below them, undeleted assistant replies
    with a rank, at least ``min_responses``; of more than ``max_responses`` the best ranked.
    """
    records: list[Record] = []
    left_out: Counter[str] = Counter()

    def usable(node: Mapping[str, Any]) -> bool:
        return (
            not node.get("deleted") and node.get("lang") == language and bool(node["text"].strip())
        )

    for tree in trees:
        stack: list[tuple[Mapping[str, Any], list[dict[str, str]]]] = [(tree["prompt"], [])]
        while stack:
            node, path = stack.pop()
            if not usable(node):
                left_out["message deleted, empty or in another language, with all below it"] += 1
                continue
            role = "user" if node["role"] == "prompter" else "assistant"
            path = [*path, {"role": role, "content": node["text"]}]
            replies = node.get("replies", [])
            stack.extend((reply, path) for reply in replies)
            if role == "assistant" or not replies:
                continue
            ranked = sorted(
                (r for r in replies if usable(r) and r.get("rank") is not None),
                key=lambda r: r["rank"],
            )
            left_out["reply without a rank, deleted or in another language"] += len(replies) - len(
                ranked
            )
            if len(ranked) < min_responses:
                left_out[f"prompt with fewer than {min_responses} ranked replies"] += 1
                continue
            left_out[f"reply ranked below {max_responses} others"] += len(ranked[max_responses:])
            best = ranked[:max_responses]
            record = {
                "messages": path,
                "responses": [r["text"] for r in best],
                "ranks": [r["rank"] for r in best],
                "message_id": node.get("message_id", ""),
            }
            _keep(records, left_out, "comparison", record)
    return records, _counts(left_out)


def self_instruct(tasks: Iterable[Mapping[str, Any]]) -> Converted:
    """Self-instruct tasks to demonstrations: instruction, a blank line, input; one for each instance."""
    records: list[Record] = []
    left_out: Counter[str] = Counter()
    for task in tasks:
        for instance in task["instances"]:
            parts = [task["instruction"], instance["input"]]
            record = {
                "prompt": "\n\n".join(part for part in parts if part.strip()),
                "response": instance["output"],
                "source": "self_instruct",
                "task_id": task.get("id", ""),
            }
            _keep(records, left_out, "demonstration", record)
    return records, _counts(left_out)


def helpful_harmless(dialogues: Iterable[Mapping[str, str]]) -> Converted:
    """HH-RLHF ``{chosen, rejected}`` dialogues to comparisons of their last assistant turns."""
    records: list[Record] = []
    left_out: Counter[str] = Counter()
    for dialogue in dialogues:
        chosen, rejected = (_turns(dialogue[key]) for key in ("chosen", "rejected"))
        if not chosen or not rejected or chosen[-1]["role"] != "assistant":
            left_out["dialogue without a last assistant turn"] += 1
        elif chosen[:-1] != rejected[:-1] or rejected[-1]["role"] != "assistant":
            left_out["dialogues part before the last turn"] += 1
        else:
            record = {
                "messages": chosen[:-1],
                "responses": [chosen[-1]["content"], rejected[-1]["content"]],
                "ranks": [0, 1],
            }
            _keep(records, left_out, "comparison", record)
    return records, _counts(left_out)


def plain_text(paths: Iterable[str | os.PathLike]) -> Iterator[Record]:
    """Text files to text records, one a file, with the file's name as ``topic``."""
    for path in map(Path, paths):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror}); name a text file") from None
        record = text_record(content, f"{path}:1") | {"topic": path.stem}
        yield validate_record("text", record, f"{path}:1")


_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def _turns(text: str) -> list[dict[str, str]]:
    _, *parts = _TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def _keep(records: list[Record], left_out: Counter[str], kind: str, record: Record) -> None:
    """Append a record that passes its schema; count any other by the schema's reason."""
    try:
        records.append(validate_record(kind, record, "converted"))
    except RecordError as error:
        left_out[re.sub(r"\d+", "n", error.reason)] += 1


def _counts(left_out: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in left_out.items() if count}
