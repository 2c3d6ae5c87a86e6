"""Public formats to records. Each converter returns the records and a count of what it left out, by reason.

From the command line: ``python -m instructax.data.convert KIND INPUT [INPUT ...] OUTPUT.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructax.config import UserError
from instructax.data.readers import parse_line, text_record
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
    with a rank, at least ``min_responses``; of more than ``max_responses`` the best ranked. The tree's
    id stands as ``user_id``, so that a split never parts a conversation from its own beginning.
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
            if "message_tree_id" in tree:
                record["user_id"] = tree["message_tree_id"]
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


_CONVERTERS: dict[str, Callable[[Iterable[Mapping[str, Any]]], Converted]] = {
    "open_assistant": open_assistant,
    "self_instruct": self_instruct,
    "helpful_harmless": helpful_harmless,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert files; exit code 0 done, 2 refused with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m instructax.data.convert", description="Public formats to records."
    )
    parser.add_argument("kind", choices=[*_CONVERTERS, "plain_text"], help="format of the input")
    parser.add_argument("input", nargs="+", help="JSON Lines; for plain_text, text files")
    parser.add_argument("output", help="JSON Lines of records to write")
    arguments = parser.parse_args(argv)
    try:
        records, left_out = _convert(arguments.kind, arguments.input)
        if not records:
            raise UserError(f"{', '.join(arguments.input)}: no record is left ({left_out})")
        _write(Path(arguments.output), records)
    except UserError as error:
        print(error.line(), file=sys.stderr)
        return 2
    print(f"{arguments.kind}: {len(records)} records in {arguments.output}")
    for reason, count in sorted(left_out.items()):
        print(f"  left out: {count} x {reason}")
    return 0


def _convert(kind: str, paths: Sequence[str]) -> Converted:
    if kind == "plain_text":
        return list(plain_text(paths)), {}
    records: list[Record] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror}); name a file") from None
        # Line by line, so that what a converter cannot take is refused with its place.
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                found, counts = _CONVERTERS[kind]([parse_line(line, where)])
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise UserError(
                    f"{where}: is not in the format {kind} ({error!r}); name another file or kind"
                ) from None
            records += found
            left_out.update(counts)
    return records, dict(left_out)


def _write(path: Path, records: Sequence[Record]) -> None:
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another") from None


if __name__ == "__main__":
    raise SystemExit(main())
