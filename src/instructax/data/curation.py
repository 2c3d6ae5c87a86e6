"""Curation of records, as InstructGPT appendix A does it: pure functions, each with a report.

Cap by user, deduplication by long common prefix, split by user, a filter for personal data, a length
limit, expansion of few-shot prompts, and the overlap of training with evaluation. Nothing leaves
without being counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instructax.data.personal import find_personal_data, masked, name_pattern
from instructax.records import Record, few_shot, prompt_text


@dataclass(frozen=True)
class CurationReport:
    """What one step of curation kept and took."""

    step: str
    """The function's name."""
    kept: int
    """Records that go on."""
    removed: int
    """Records taken out."""
    counts: dict[str, int]
    """What was found, by kind; a record can count under several."""
    examples: tuple[str, ...] = ()
    """A few findings, personal data masked."""


Curated = tuple[list[Record], CurationReport]


def cap_per_user(records: Sequence[Record], limit: int = 200) -> Curated:
    """At most ``limit`` records of a ``user_id``, the first ones (InstructGPT: 200).

    Records without a user id are kept and counted.
    """
    seen: Counter[str] = Counter()
    kept: list[Record] = []
    for record in records:
        user = record.get("user_id")
        if user is not None:
            seen[user] += 1
        if user is None or seen[user] <= limit:
            kept.append(record)
    counts = {
        "users": len(seen),
        "users_over_limit": sum(count > limit for count in seen.values()),
        "without_user_id": sum("user_id" not in record for record in records),
    }
    return kept, CurationReport("cap_per_user", len(kept), len(records) - len(kept), counts)


def prefix_key(record: Mapping[str, Any], prefix_chars: int) -> str:
    """What two prompts share if they count as one: their first characters, white space folded."""
    return " ".join(prompt_text(record).split())[:prefix_chars]


def deduplicate(records: Sequence[Record], prefix_chars: int = 64) -> Curated:
    """Keep the first of all prompts that share a prefix of ``prefix_chars`` characters or are equal.

    InstructGPT: "prompts that share a long common prefix", the length not stated. Few-shot records are
    expanded after this step: their K examples share the instruction.
    """
    if prefix_chars < 1:
        raise ValueError(f"prefix_chars must be at least 1, got {prefix_chars}")
    groups: Counter[str] = Counter()
    kept: list[Record] = []
    for record in records:
        key = prefix_key(record, prefix_chars)
        groups[key] += 1
        if groups[key] == 1:
            kept.append(record)
    repeated = {key: count for key, count in groups.items() if count > 1}
    counts = {"groups_of_duplicates": len(repeated)}
    most = Counter(repeated).most_common(3)
    examples = tuple(f"{count} x {_masked_text(key)}" for key, count in most)
    removed = len(records) - len(kept)
    return kept, CurationReport("deduplicate", len(kept), removed, counts, examples)


def split_by_user(
    records: Sequence[Record], fractions: Mapping[str, float], salt: str = ""
) -> tuple[dict[str, list[Record]], CurationReport]:
    """Disjoint splits in which no user (or, without user id, no prompt) stands twice.

    ``fractions`` sum to 1; a user's split is decided by the hash of ``salt`` and the id, so it never
    changes when records are added.
    """
    if abs(sum(fractions.values()) - 1) > 1e-9 or min(fractions.values()) < 0:
        raise ValueError(f"fractions must be at least 0 and sum to 1, got {dict(fractions)}")
    splits: dict[str, list[Record]] = {name: [] for name in fractions}
    names = list(fractions)
    ends = np.cumsum(list(fractions.values()))
    for record in records:
        owner = (
            f"user:{record['user_id']}" if "user_id" in record else f"prompt:{prompt_text(record)}"
        )
        digest = hashlib.sha256(f"{salt}/{owner}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        # The last sum may fall short of 1 by rounding: what lies beyond belongs to the last split.
        index = min(int(np.searchsorted(ends, draw, side="right")), len(ends) - 1)
        splits[names[index]].append(record)
    counts = {name: len(part) for name, part in splits.items()}
    return splits, CurationReport("split_by_user", len(records), 0, counts)


def remove_personal_data(
    records: Sequence[Record], names: Iterable[str] = (), num_examples: int = 5
) -> Curated:
    """Take out records with personal data in any of their texts (InstructGPT: in the training split).

    Finds e-mail, phone, card (Luhn), IBAN and street-address numbers, and ``names`` where given. The
    report counts the findings by kind, with ``num_examples`` of each, masked.
    """
    pattern = name_pattern(names)
    kept: list[Record] = []
    counts: Counter[str] = Counter()
    examples: list[str] = []
    for record in records:
        clean = True
        for text in _texts(record):
            for kind, start, stop in find_personal_data(text, pattern):
                clean = False
                counts[kind] += 1
                if counts[kind] <= num_examples:
                    examples.append(f"{kind}: {masked(text[start:stop])}")
        if clean:
            kept.append(record)
    removed = len(records) - len(kept)
    return kept, CurationReport(
        "remove_personal_data", len(kept), removed, dict(counts), tuple(examples)
    )


def filter_long_prompts(
    records: Sequence[Record],
    count_tokens: Callable[[Record], int],
    max_prompt_tokens: int = 1024,
) -> Curated:
    """Prompts over ``max_prompt_tokens`` are taken out and counted (InstructGPT: 1k)."""
    lengths = [count_tokens(record) for record in records]
    kept = [r for r, length in zip(records, lengths, strict=True) if length <= max_prompt_tokens]
    removed = len(records) - len(kept)
    counts = {"too_long": removed, "longest": max(lengths, default=0)}
    return kept, CurationReport("filter_long_prompts", len(kept), removed, counts)


def expand_few_shot(records: Sequence[Record]) -> Curated:
    """A record with an instruction and K (query, response) examples becomes K records.

    Each holds one example, with the other K - 1 in its context, in order (InstructGPT section 3.2):
    the prompt is the instruction, the shots and the query, blank lines between. Other fields are
    kept; the K share a ``content_key``, because they are no independent prompts, and their ``id``
    is numbered. Split before this step, or an example's answer stands in another split's shots.
    """
    kept: list[Record] = []
    counts = {"records": 0, "examples": 0}
    for record in records:
        examples = few_shot(record)
        if not examples:
            kept.append(record)
            continue
        counts["records"] += 1
        counts["examples"] += len(examples)
        shared = {key: value for key, value in record.items() if key != "few_shot"}
        shared = {"source": "few_shot", "content_key": prompt_text(record)} | shared
        for k, example in enumerate(examples):
            shots = [f"{e['query']}\n{e['response']}" for i, e in enumerate(examples) if i != k]
            prompt = "\n\n".join([record["prompt"], *shots, example["query"]]) + "\n"
            expanded = shared | {"prompt": prompt, "response": example["response"]}
            kept.append(expanded | {"id": f"{record['id']}/{k}"} if "id" in record else expanded)
    return kept, CurationReport("expand_few_shot", len(kept), 0, counts)


@dataclass(frozen=True)
class OverlapReport:
    """How many evaluation prompts training has seen, by three measures, each within the next."""

    evaluation: int
    """Evaluation prompts."""
    exact: int
    """The same text, white space folded."""
    prefix: int
    """The same text or the same first ``prefix_chars`` characters."""
    ngram: int
    """As above, or a run of ``ngram`` words in common, case folded."""
    shared_users: int
    """User ids on both sides."""
    indices: tuple[int, ...]
    """Evaluation prompts counted under ``ngram``."""


def prompt_overlap(
    training: Sequence[Record],
    evaluation: Sequence[Record],
    prefix_chars: int = 64,
    ngram: int = 13,
) -> OverlapReport:
    """Overlap of evaluation prompts with training prompts (13 words: GPT-3, appendix C)."""

    def words(record: Record) -> set[tuple[str, ...]]:
        all_words = prompt_text(record).casefold().split()
        return {tuple(all_words[i : i + ngram]) for i in range(len(all_words) - ngram + 1)}

    whole = {" ".join(prompt_text(record).split()) for record in training}
    prefixes = {prefix_key(record, prefix_chars) for record in training}
    ngrams = set().union(*(words(record) for record in training)) if training else set()
    exact = prefix = 0
    indices: list[int] = []
    for i, record in enumerate(evaluation):
        same = " ".join(prompt_text(record).split()) in whole
        near = prefix_key(record, prefix_chars) in prefixes
        exact += same
        prefix += near
        if near or not ngrams.isdisjoint(words(record)):
            indices.append(i)
    users = [{r["user_id"] for r in side if "user_id" in r} for side in (training, evaluation)]
    return OverlapReport(
        len(evaluation), exact, prefix, len(indices), len(users[0] & users[1]), tuple(indices)
    )


def _texts(record: Mapping[str, Any]) -> Iterable[str]:
    for key in ("prompt", "response", "text"):
        if key in record:
            yield record[key]
    for turn in record.get("messages", ()):
        yield turn["content"]
    for example in few_shot(record):
        yield from (example["query"], example["response"])
    yield from record.get("responses", ())


def _masked_text(text: str) -> str:
    for _, start, stop in reversed(find_personal_data(text)):
        text = text[:start] + masked(text[start:stop]) + text[stop:]
    return text
