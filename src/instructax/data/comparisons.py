"""Comparisons: a prompt once, its K ranked responses behind it, all in one row.

All pairs of a prompt belong to one batch element (InstructGPT section 3.5): shuffled over batches
they overfit. A response ends with eos if and only if it is finished, as in rollouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from instructax.batches import ComparisonBatch, Families, Layout, first_fit
from instructax.config import UserError
from instructax.data.pipeline import PlannedUnits, Stream, Unit, derive_seed
from instructax.data.templates import ChatTemplate, encode_prompt, encode_response
from instructax.data.tokenizer import Tokenizer
from instructax.records import Record, finished


@dataclasses.dataclass(frozen=True)
class ComparisonExamples:
    """Tokenised comparisons; ``dropped`` counts the records that are not here, by reason."""

    prompts: list[np.ndarray]
    responses: list[list[np.ndarray]]
    ranks: list[np.ndarray]
    record_index_n: np.ndarray
    dropped: dict[str, int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def slots_n(self) -> np.ndarray:
        """Slots that each comparison takes in a row: its prompt and all its responses."""
        return np.asarray(
            [
                len(prompt) + sum(map(len, responses))
                for prompt, responses in zip(self.prompts, self.responses, strict=True)
            ]
        )

    @property
    def most_responses(self) -> int:
        """The largest K."""
        return max(len(responses) for responses in self.responses)


def tokenise(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int = 1024,
    max_length: int = 2048,
    max_slots: int | None = None,
    chat_template: ChatTemplate = "plain",
    on_long: Literal["refuse", "drop_counted"] = "drop_counted",
) -> ComparisonExamples:
    """Comparison records to ids.

    Prompts over ``max_prompt_tokens`` are filtered and counted. ``max_length`` bounds the prompt
    with its longest response (the positions a model needs); a comparison over it is dropped whole
    and counted, or refused with UserError. So is one whose prompt and responses together take more
    than ``max_slots``, the room of a row: else one long ranking would set every row's length.
    """
    prompts: list[np.ndarray] = []
    responses: list[list[np.ndarray]] = []
    kept: list[int] = []
    dropped = {"prompt_too_long": 0, "example_too_long": 0, "row_too_long": 0}
    for i, record in enumerate(records):
        prompt = encode_prompt(tokenizer, record, chat_template)
        encoded = [
            np.asarray(encode_response(tokenizer, text, done), np.int32)
            for text, done in zip(record["responses"], finished(record), strict=True)
        ]
        longest = len(prompt) + max(map(len, encoded))
        slots = len(prompt) + sum(map(len, encoded))
        if len(prompt) > max_prompt_tokens:
            dropped["prompt_too_long"] += 1
        elif longest > max_length:
            if on_long == "refuse":
                raise UserError(
                    f"comparison {i} has a prompt and response of {longest} tokens, more than "
                    f"{max_length}; shorten it, raise the limit, or let it be dropped and counted"
                )
            dropped["example_too_long"] += 1
        elif max_slots is not None and slots > max_slots:
            if on_long == "refuse":
                raise UserError(
                    f"comparison {i} takes {slots} slots with all its responses, more than "
                    f"{max_slots}; raise row_length, or let it be dropped and counted"
                )
            dropped["row_too_long"] += 1
        else:
            prompts.append(np.asarray(prompt, np.int32))
            responses.append(encoded)
            kept.append(i)
    if not kept:
        raise UserError(f"no comparison is left of {len(records)}: {dropped}; raise the limits")
    return ComparisonExamples(
        prompts,
        responses,
        [np.asarray(records[i]["ranks"], np.int32) for i in kept],
        np.asarray(kept, np.int64),
        dropped,
        tokenizer.pad_id,
    )


@dataclasses.dataclass(frozen=True)
class FamilySizes:
    """Room for the prompts of a row and their responses, where it pays to attend family by family."""

    prompts: int
    """N, of a row."""
    prompt: int
    """P, slots of the longest prompt."""
    response: int
    """T, slots of the longest response."""

    def scores(self, ways: int) -> int:
        """Scores of a row: prompts meet themselves, responses their prompt and themselves."""
        of_responses = ways * self.response * (self.prompt + self.response)
        return self.prompts * (self.prompt**2 + of_responses)

    def empty(self, rows: int, ways: int) -> Families:
        return Families(
            np.full((rows, self.prompts, self.prompt), -1, np.int32),
            np.full((rows, self.prompts, ways, self.response), -1, np.int32),
        )


def family_sizes(
    prompt_n: Sequence[int],
    response_n: Sequence[int],
    *,
    ways: int,
    most_in_row: int,
    row_scores: int,
    tile: int,
) -> FamilySizes | None:
    """Sizes for prompts and responses of these lengths, multiples of ``tile``.

    None where families have no fewer scores than ``row_scores``, what a row has without them.
    """
    prompt, response = (-(-max(n) // tile) * tile for n in (prompt_n, response_n))
    sizes = FamilySizes(most_in_row, prompt, response)
    return sizes if sizes.scores(ways) < row_scores else None


def layout_rows(
    prompts: Sequence[np.ndarray],
    responses: Sequence[Sequence[np.ndarray]],
    *,
    rows: int,
    row_length: int,
    pad_id: int,
    max_responses: int,
    num_prompts: int | None = None,
    one_per_row: bool = False,
    families: FamilySizes | None = None,
) -> tuple[Layout, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts with their responses laid out in rows, several prompts to a row where they fit.

    A prompt is a segment; each of its responses is a segment whose prefix is the prompt's, with
    positions that continue from the prompt's length. Prompts are placed first-fit, in order, or one
    to a row. Returns the Layout (rows x row_length) and row, last and valid, each N x K with
    N = ``num_prompts`` (default: as many as given) and K = ``max_responses``: row and slot of a
    response's last token, and whether there is such a response. ``families`` has them listed in the
    layout. ValueError where they do not fit.
    """
    num = len(prompts) if num_prompts is None else num_prompts
    if len(prompts) > num:
        raise ValueError(f"{len(prompts)} prompts, num_prompts is {num}")
    sizes = [len(p) + sum(map(len, r)) for p, r in zip(prompts, responses, strict=True)]
    placed = [[n] for n in range(len(prompts))] if one_per_row else first_fit(sizes, row_length)
    if len(placed) > rows or (one_per_row and max(sizes, default=0) > row_length):
        raise ValueError(f"{len(prompts)} prompts do not fit in {rows} rows of {row_length} slots")
    shape = (rows, row_length)
    token_BxL = np.full(shape, pad_id, np.int32)
    position_BxL, segment_BxL, prefix_BxL = (np.zeros(shape, np.int32) for _ in range(3))
    row_NxK, last_NxK = (np.zeros((num, max_responses), np.int32) for _ in range(2))
    valid_NxK = np.zeros((num, max_responses), bool)
    listed = None if families is None else families.empty(rows, max_responses)
    for row, members in enumerate(placed):
        start, segment = 0, 0
        for place, n in enumerate(members):
            length = len(prompts[n])
            segment += 1
            prompt_segment = segment
            token_BxL[row, start : start + length] = prompts[n]
            position_BxL[row, start : start + length] = np.arange(length)
            segment_BxL[row, start : start + length] = segment
            if listed is not None:
                listed.prompt_BxNxP[row, place, -length:] = np.arange(start, start + length)
            start += length
            for k, response in enumerate(responses[n]):
                stop = start + len(response)
                if listed is not None:
                    listed.response_BxNxKxT[row, place, k, : len(response)] = np.arange(start, stop)
                segment += 1
                token_BxL[row, start:stop] = response
                position_BxL[row, start:stop] = length + np.arange(len(response))
                segment_BxL[row, start:stop] = segment
                prefix_BxL[row, start:stop] = prompt_segment
                row_NxK[n, k], last_NxK[n, k], valid_NxK[n, k] = row, stop - 1, True
                start = stop
    return (
        Layout(token_BxL, position_BxL, segment_BxL, prefix_BxL, families=listed),
        row_NxK,
        last_NxK,
        valid_NxK,
    )


def stream(
    examples: ComparisonExamples,
    *,
    batch_size: int,
    row_length: int,
    max_responses: int,
    seed: int,
    rows: int | None = None,
    row_multiple: int = 1,
    row_scores: int = 0,
    tile: int = 1,
    shuffle: bool = True,
) -> Stream[ComparisonBatch]:
    """Batches of ``batch_size`` prompts with all their responses, K padded to ``max_responses``.

    Without ``rows`` each prompt has a row of its own. With it, prompts are packed into that many
    rows; a batch is then as many prompts, at most ``batch_size``, as fit. An epoch ends with its own
    batch, partly empty where it must be: in one epoch every comparison is seen once, as the paper
    trains. A unit of this stream is a batch. ``row_multiple`` adds empty rows up to a multiple, as a
    mesh may need them; which prompts a batch holds does not depend on it. Families are listed where they
    have fewer scores than ``row_scores``, a row's without them; by default nowhere. ``tile`` divides their
    lengths.
    """
    slots_n = examples.slots_n
    if slots_n.max() > row_length:
        raise UserError(
            f"a comparison takes {slots_n.max()} slots and row_length is {row_length}; raise it to "
            "hold a prompt with all its responses, or lower the limits on tokens"
        )
    if examples.most_responses > max_responses:
        raise UserError(
            f"a comparison has {examples.most_responses} responses and max_responses is "
            f"{max_responses}; raise it"
        )
    if rows is not None and rows < 1:
        raise UserError(f"rows is {rows}; a batch needs at least one row")

    families = family_sizes(
        list(map(len, examples.prompts)),
        [max(map(len, responses)) for responses in examples.responses],
        ways=max_responses,
        most_in_row=1 if rows is None else row_length // int(slots_n.min()),
        row_scores=row_scores,
        tile=tile,
    )

    def plan(order: Sequence[int]) -> list[Unit]:
        batches: list[Unit] = []
        left = list(order)
        while left:
            candidates = left[:batch_size]
            count = len(candidates)
            if rows is not None:
                packed = first_fit(slots_n[candidates].tolist(), row_length, max_rows=rows)
                count = sum(map(len, packed))
            batches.append(tuple(candidates[:count]))
            left = left[count:]
        return batches

    def assemble(units: Sequence[Unit], size: int, first: int) -> ComparisonBatch:
        (members,) = units
        layout, row_NxK, last_NxK, valid_NxK = layout_rows(
            [examples.prompts[i] for i in members],
            [examples.responses[i] for i in members],
            rows=row_multiple * -(-(batch_size if rows is None else rows) // row_multiple),
            row_length=row_length,
            pad_id=examples.pad_id,
            max_responses=max_responses,
            num_prompts=batch_size,
            one_per_row=rows is None,
            families=families,
        )
        rank_NxK = np.zeros((batch_size, max_responses), np.int32)
        for n, i in enumerate(members):
            rank_NxK[n, : len(examples.ranks[i])] = examples.ranks[i]
        return ComparisonBatch(layout, row_NxK, last_NxK, rank_NxK, valid_NxK)

    order_seed = derive_seed(seed, "comparisons") if shuffle else None
    return Stream(
        units=PlannedUnits(len(examples), order_seed, plan),
        ordered=lambda: plan(range(len(examples))),
        assemble=assemble,
        record_index_n=examples.record_index_n,
        batch_size=batch_size,
        units_per_step=1,
    )
