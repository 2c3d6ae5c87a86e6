"""Prompts for rollouts: left-padded to one length, each with its global episode number."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from instructax.batches import PromptBatch
from instructax.config import UserError
from instructax.data.pipeline import SingleUnits, Stream, Unit, derive_seed
from instructax.data.templates import ChatTemplate, encode_prompt
from instructax.data.tokenizer import Tokenizer
from instructax.records import Record


@dataclasses.dataclass(frozen=True)
class PromptExamples:
    """Tokenised prompts; ``dropped`` counts the records that are not here, by reason."""

    prompts: list[np.ndarray]
    record_index_n: np.ndarray
    dropped: dict[str, int]
    pad_id: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt) for prompt in self.prompts)


def tokenise(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int = 1024,
    chat_template: ChatTemplate = "plain",
) -> PromptExamples:
    """Any records with a prompt to ids; longer prompts are filtered and counted (InstructGPT: 1k)."""
    encoded = [encode_prompt(tokenizer, record, chat_template) for record in records]
    kept = [i for i, ids in enumerate(encoded) if len(ids) <= max_prompt_tokens]
    dropped = {"prompt_too_long": len(encoded) - len(kept)}
    if not kept:
        raise UserError(f"no prompt is left of {len(records)}: {dropped}; raise the limit")
    return PromptExamples(
        [np.asarray(encoded[i], np.int32) for i in kept],
        np.asarray(kept, np.int64),
        dropped,
        tokenizer.pad_id,
    )


def stream(
    examples: PromptExamples,
    *,
    batch_size: int,
    prompt_length: int,
    seed: int,
) -> Stream[PromptBatch]:
    """Batches of prompts, left-padded to ``prompt_length``; ``record_indices(step)`` has a record a row.

    ``episode_B`` counts the rows of the stream from its beginning: row b of batch g is episode
    ``g * batch_size + b``. In an in-order batch it is the example's own number, and padding rows have
    an empty mask and episode -1.
    """
    if examples.longest > prompt_length:
        raise UserError(
            f"a prompt has {examples.longest} tokens and prompt_length is {prompt_length}; "
            "raise it, or lower the limit on prompt tokens"
        )

    def assemble(units: Sequence[Unit], size: int, first: int) -> PromptBatch:
        token_BxP = np.full((size, prompt_length), examples.pad_id, np.int32)
        mask_BxP = np.zeros((size, prompt_length), bool)
        episode_B = np.full(size, -1, np.int32)
        episode_B[: len(units)] = first + np.arange(len(units))
        for row, (i,) in enumerate(units):
            begin = prompt_length - len(examples.prompts[i])
            token_BxP[row, begin:] = examples.prompts[i]
            mask_BxP[row, begin:] = True
        return PromptBatch(token_BxP, mask_BxP, episode_B)

    return Stream(
        units=SingleUnits(len(examples), derive_seed(seed, "prompts")),
        ordered=lambda: [(i,) for i in range(len(examples))],
        assemble=assemble,
        record_index_n=examples.record_index_n,
        batch_size=batch_size,
    )
