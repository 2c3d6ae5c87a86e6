"""Customers: who sent which prompt, and the dirt of what they sent.

A few customers send very much and most send little. What they send is dirty: personal data,
the same long preamble again and again, texts without end. Curation must find all of it, so every
planted piece is marked in the record under "planted".
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]

PREAMBLES = (
    (
        "hello , i keep a small shop with many animals , and each day i write long notes on what "
        "they do , so please read with care , think well and then answer me this :"
    ),
    (
        "good day to you , my children and i read about animals each night before we sleep , and "
        "as we do not agree at all , we would like to hear from you :"
    ),
)
PERSONAL = {
    "email": ("write to {name}.{n}@mail.example.com .", "my mail is {name}{n}@post.example.org ."),
    "phone": ("call me at +1 555 010 {n:04d} .", "my phone is (555) 013-{n:04d} ."),
    "card": ("my card is 4111 1111 1111 1111 .", "charge 5500-0000-0000-0004 ."),
    "address": ("send it to {n} oak street .", "i live at {n} mill road ."),
}


class Customers:
    """Gives out user ids with a long tail: the k-th customer sends in proportion to 1/k.

    `cap` bounds what one customer sends.
    """

    def __init__(self, prefix: str, count: int, cap: int, rng: random.Random):
        self.ids = [f"{prefix}{i:04d}" for i in range(max(count, 2))]
        self._weights = [1.0 / (i + 1) for i in range(len(self.ids))]
        self._cap = cap
        self._rng = rng
        self.sent: Counter[str] = Counter()

    def next(self) -> str:
        free = [i for i, user in enumerate(self.ids) if self.sent[user] < self._cap]
        if not free:
            raise ValueError(f"{len(self.ids)} customers of at most {self._cap} prompts are full")
        weights = [self._weights[i] for i in free]
        user = self.ids[self._rng.choices(free, weights)[0]]
        self.sent[user] += 1
        return user


def _prefixed(record: Record, before: str, after: str) -> Record:
    """The record with words put before and after its last user message."""
    if "prompt" in record:
        return {**record, "prompt": f"{before}{record['prompt']}{after}"}
    messages = [dict(message) for message in record["messages"]]
    messages[-1]["content"] = f"{before}{messages[-1]['content']}{after}"
    return {**record, "messages": messages}


def raw_prompts(
    clean: Sequence[Record], rng: random.Random, dirty_share: float, heavy_prompts: int
) -> list[Record]:
    """What customers sent before curation: the clean prompts, dirt, and too much of one customer.

    `dirty_share` of the clean prompts appear once more for each sort of dirt; the first training
    customer repeats `heavy_prompts` prompts of others.
    """
    raw = [{**record, "planted": ""} for record in clean]
    count = max(4, round(dirty_share * len(clean)))

    def plant(record: Record, planted: str, before: str = "", after: str = "") -> None:
        new = {**_prefixed(record, before, after), "planted": planted}
        new["id"] = f"raw-{len(raw):06d}"
        raw.append(new)

    for i in range(count):
        sort = list(PERSONAL)[i % len(PERSONAL)]
        form = rng.choice(PERSONAL[sort])
        note = form.format(name=rng.choice(("ana", "ben", "cora")), n=rng.randint(11, 98))
        plant(rng.choice(clean), sort, after=" " + note)
    for i in range(count):
        plant(rng.choice(clean), "long_prefix", before=PREAMBLES[i % len(PREAMBLES)] + " ")
    for _ in range(max(2, count // 4)):
        plant(rng.choice(clean), "over_long", before="and then it slept , and then it sang , " * 12)
    for record in rng.choices([r for r in clean if r["split"] == "train"], k=heavy_prompts):
        plant({**record, "user_id": "train-user-0000"}, "heavy_user")
    rng.shuffle(raw)
    return raw
