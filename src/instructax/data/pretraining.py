"""Pretraining text: documents joined behind one another and cut into rows of one length.

GPT-3 packs documents to the context with an end token between and no mask across documents. Here a
document is ``bos text eos``: it begins as a prompt does. bos is never a target, since it follows every
eos and would only flatter the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instructax.batches import Layout, LmBatch
from instructax.config import UserError
from instructax.data.pipeline import SingleUnits, Stream, Unit, derive_seed
from instructax.data.tokenizer import Tokenizer
from instructax.records import Record


def tokenise(records: Sequence[Record], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Text records to documents ``bos text eos``."""
    return [
        np.asarray([tokenizer.bos_id, *tokenizer.encode(r["text"]), tokenizer.eos_id], np.int32)
        for r in records
    ]


def stream(
    token_docs: Sequence[np.ndarray],
    *,
    batch_size: int,
    row_length: int,
    seed: int,
    cross_document_mask: bool = False,
) -> Stream[LmBatch]:
    """Rows of ``row_length`` tokens from documents joined in a shuffled order, shuffled every epoch.

    A row begins with the last token of the row before it, as context of weight 0, so that every token
    but the bos of each document is a target exactly once. Only the very last row can be padded.
    ``cross_document_mask`` makes each document of a row a segment of its own. A row counts as one
    example; ``record_indices`` gives rows.
    """
    if not token_docs:
        raise UserError("no pretraining text; name files that hold text")
    if row_length < 2:
        raise UserError(f"row_length is {row_length}; pretraining rows need at least 2 tokens")
    own_seed = derive_seed(seed, "pretraining")
    shuffled = SingleUnits(len(token_docs), derive_seed(own_seed, "documents"))
    # In evaluation too the documents stand in this order; a sum over all rows does not depend on it.
    order = [shuffled[i][0] for i in range(len(token_docs))]
    flat = np.concatenate([token_docs[i] for i in order]).astype(np.int32)
    starts = np.cumsum([0] + [len(token_docs[i]) for i in order])[:-1]
    document = np.zeros(len(flat), np.int32)
    document[starts] = 1
    is_bos = document.astype(bool)
    document = np.cumsum(document, dtype=np.int32)
    num_rows = max(1, -(-(len(flat) - 1) // (row_length - 1)))

    def assemble(units: Sequence[Unit], size: int, first: int) -> LmBatch:
        slot_BxL = np.full((size, row_length), len(flat), np.int64)
        slot_BxL[: len(units)] = np.asarray(units, np.int64).reshape(-1, 1) * (
            row_length - 1
        ) + np.arange(row_length)
        real_BxL = slot_BxL < len(flat)
        slot_BxL = np.minimum(slot_BxL, len(flat) - 1)
        token_BxL = np.where(real_BxL, flat[slot_BxL], 0)
        document_BxL = document[slot_BxL]
        segment_BxL = real_BxL.astype(np.int32)
        position_BxL = np.broadcast_to(np.arange(row_length, dtype=np.int32), token_BxL.shape)
        if cross_document_mask:
            segment_BxL = (document_BxL - document_BxL[:, :1] + 1).astype(np.int32)
            begins_BxL = np.diff(segment_BxL, axis=1, prepend=0) > 0
            start_BxL = np.maximum.accumulate(np.where(begins_BxL, position_BxL, 0), axis=1)
            position_BxL = position_BxL - start_BxL
        weight_BxL = (real_BxL & ~is_bos[slot_BxL]).astype(np.float32)
        weight_BxL[:, 0] = 0
        layout = Layout(
            token_BxL=token_BxL.astype(np.int32),
            position_BxL=np.where(real_BxL, position_BxL, 0).astype(np.int32),
            segment_BxL=np.where(real_BxL, segment_BxL, 0).astype(np.int32),
            prefix_BxL=np.zeros((size, row_length), np.int32),
            prefixed=False,
        )
        return LmBatch(layout, weight_BxL)

    return Stream(
        units=SingleUnits(num_rows, own_seed),
        ordered=lambda: [(i,) for i in range(num_rows)],
        assemble=assemble,
        record_index_n=np.arange(num_rows),
        batch_size=batch_size,
    )
