"""Demonstrations: prompt, response, eos; the loss on what the labeler wrote.

InstructGPT does not say which tokens are in the loss of supervised fine-tuning. Here response and
EOS count 1 and prompt tokens ``prompt_loss_weight``; the first token of a document has nothing
before it and counts 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from instructax.batches import Layout, LmBatch, first_fit, scored_slots
from instructax.config import UserError
from instructax.data.pipeline import PlannedUnits, SingleUnits, Stream, Unit, derive_seed
from instructax.data.templates import ChatTemplate, encode_prompt, encode_response
from instructax.data.tokenizer import Tokenizer
from instructax.records import Record


@dataclasses.dataclass(frozen=True)
class DemonstrationExamples:
    """Tokenised demonstrations; ``dropped`` counts the records that are not here, by reason."""

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    record_index_n: np.ndarray
    dropped: dict[str, int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest example, prompt and response."""
        return max(len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True))


def tokenise(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int = 1024,
    max_length: int = 2048,
    chat_template: ChatTemplate = "plain",
    on_long: Literal["refuse", "drop_counted"] = "drop_counted",
) -> DemonstrationExamples:
    """Demonstration records to ids.

    Prompts over ``max_prompt_tokens`` are filtered and counted (InstructGPT: 1k). An example over
    ``max_length`` in all is dropped and counted, or refused with UserError; never cut, because a cut
    demonstration teaches to stop in mid-sentence.
    """
    prompts: list[np.ndarray] = []
    responses: list[np.ndarray] = []
    kept: list[int] = []
    dropped = {"prompt_too_long": 0, "example_too_long": 0}
    for i, record in enumerate(records):
        prompt = encode_prompt(tokenizer, record, chat_template)
        response = encode_response(tokenizer, record["response"])
        if len(prompt) > max_prompt_tokens:
            dropped["prompt_too_long"] += 1
        elif len(prompt) + len(response) > max_length:
            if on_long == "refuse":
                raise UserError(
                    f"demonstration {i} has {len(prompt) + len(response)} tokens, more than "
                    f"{max_length}; shorten it, raise the limit, or let it be dropped and counted"
                )
            dropped["example_too_long"] += 1
        else:
            prompts.append(np.asarray(prompt, np.int32))
            responses.append(np.asarray(response, np.int32))
            kept.append(i)
    if not kept:
        raise UserError(f"no demonstration is left of {len(records)}: {dropped}; raise the limits")
    return DemonstrationExamples(
        prompts, responses, np.asarray(kept, np.int64), dropped, tokenizer.pad_id
    )


def stream(
    examples: DemonstrationExamples,
    *,
    batch_size: int,
    row_length: int,
    packed: bool,
    seed: int,
    prompt_loss_weight: float = 0.0,
) -> Stream[LmBatch]:
    """Batches of ``batch_size`` rows, one demonstration each or, ``packed``, as many as fit.

    Packing is first-fit over each epoch's shuffle; documents of a row are segments 1, 2, ... and
    see nothing of each other.
    """
    if examples.longest > row_length:
        raise UserError(
            f"a demonstration has {examples.longest} tokens and row_length is {row_length}; "
            "raise it, or lower the limit on tokens"
        )
    size_n = np.asarray(
        [len(p) + len(r) for p, r in zip(examples.prompts, examples.responses, strict=True)]
    )

    def pack(order: Sequence[int]) -> list[Unit]:
        rows = first_fit(size_n[list(order)].tolist(), row_length)
        return [tuple(order[i] for i in row) for row in rows]

    def in_order() -> list[Unit]:
        order = range(len(examples))
        return pack(order) if packed else [(i,) for i in order]

    def assemble(units: Sequence[Unit], size: int, first: int) -> LmBatch:
        return _assemble(examples, units, size, row_length, prompt_loss_weight)

    order_seed = derive_seed(seed, "demonstrations")
    return Stream(
        units=(
            PlannedUnits(len(examples), order_seed, pack)
            if packed
            else SingleUnits(len(examples), order_seed)
        ),
        ordered=in_order,
        assemble=assemble,
        record_index_n=examples.record_index_n,
        batch_size=batch_size,
    )


def _assemble(
    examples: DemonstrationExamples,
    units: Sequence[Unit],
    size: int,
    row_length: int,
    prompt_loss_weight: float,
) -> LmBatch:
    token_BxL = np.full((size, row_length), examples.pad_id, np.int32)
    position_BxL = np.zeros((size, row_length), np.int32)
    segment_BxL = np.zeros((size, row_length), np.int32)
    weight_BxL = np.zeros((size, row_length), np.float32)
    for row, unit in enumerate(units):
        start = 0
        for segment, i in enumerate(unit, 1):
            prompt, response = examples.prompts[i], examples.responses[i]
            middle = start + len(prompt)
            stop = middle + len(response)
            token_BxL[row, start:middle] = prompt
            token_BxL[row, middle:stop] = response
            position_BxL[row, start:stop] = np.arange(stop - start)
            segment_BxL[row, start:stop] = segment
            weight_BxL[row, start + 1 : middle] = prompt_loss_weight
            weight_BxL[row, middle:stop] = 1.0
            start = stop
    prefix_BxL = np.zeros((size, row_length), np.int32)
    layout = Layout(token_BxL, position_BxL, segment_BxL, prefix_BxL, prefixed=False)
    return LmBatch(layout, weight_BxL, scored_slots(weight_BxL))
