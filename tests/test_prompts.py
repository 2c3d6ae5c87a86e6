"""Prompts: left-padded, numbered, traceable to their records."""

from __future__ import annotations

import numpy as np
import pytest

from instructax.config import UserError
from instructax.data.prompts import stream, tokenise
from instructax.data.templates import encode_prompt
from instructax.data.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = Tokenizer.from_bytes(train_tokenizer(["abc abd bcd"] * 9, 276))
RECORDS = [{"prompt": "abc " * (1 + i % 5)} for i in range(12)] + [{"prompt": "abd " * 60}]


def make(batch_size=5, seed=0):
    examples = tokenise(RECORDS, TOKENIZER, max_prompt_tokens=40)
    return examples, stream(examples, batch_size=batch_size, prompt_length=44, seed=seed)


def test_rows_are_left_padded_prompts_of_the_named_records():
    pytest.importorskip("grain")
    examples, batches = make()
    assert examples.dropped == {"prompt_too_long": 1} and len(examples) == 12
    for g in (0, 4, 11):
        batch = batches(g)
        assert batch.token_BxP.shape == batch.mask_BxP.shape == (5, 44)
        assert batch.episode_B.tolist() == list(range(5 * g, 5 * g + 5))
        for b, record in enumerate(batches.record_indices(g)):
            ids = encode_prompt(TOKENIZER, RECORDS[record])
            assert batch.token_BxP[b][batch.mask_BxP[b]].tolist() == ids
            assert batch.mask_BxP[b].tolist() == [False] * (44 - len(ids)) + [True] * len(ids)
            assert (batch.token_BxP[b][~batch.mask_BxP[b]] == TOKENIZER.pad_id).all()


def test_in_order_evaluation_pads_the_last_batch():
    pytest.importorskip("grain")
    _, batches = make()
    evaluation = batches.in_order(8)
    assert len(evaluation) == 2
    assert evaluation.record_indices(1).tolist() == [8, 9, 10, 11]
    assert evaluation[1].episode_B.tolist() == [8, 9, 10, 11, -1, -1, -1, -1]
    assert not evaluation[1].mask_BxP[4:].any() and evaluation[1].mask_BxP[:4].any(1).all()


def test_seed_changes_the_order_only():
    pytest.importorskip("grain")
    orders = [
        np.concatenate([make(4, seed)[1].record_indices(g) for g in range(3)]) for seed in (0, 1)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))
    assert not np.array_equal(*orders)


def test_limits_are_refused_clearly():
    examples, _ = make()
    with pytest.raises(UserError, match="prompt_length is 3"):
        stream(examples, batch_size=2, prompt_length=3, seed=0)
    with pytest.raises(UserError, match="no prompt is left of 13"):
        tokenise(RECORDS, TOKENIZER, max_prompt_tokens=2)
