"""Pretraining rows: every token a target once, documents apart only where asked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.config import UserError
from instructax.data.pretraining import stream, tokenise
from instructax.data.tokenizer import Tokenizer, train_tokenizer

pytest.importorskip("grain")
TOKENIZER = Tokenizer.from_bytes(train_tokenizer(["abc abd bcd"] * 9, 276))
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


def test_a_document_is_bos_text_eos():
    docs = tokenise([{"text": "abc"}], TOKENIZER)
    assert docs[0].tolist() == [BOS, *TOKENIZER.encode("abc"), EOS]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    row_length=st.integers(2, 17),
    mask=st.booleans(),
)
def test_every_token_but_bos_is_a_target_once(lengths, row_length, mask):
    # Text tokens are unique numbers, so that a target names its place.
    names = iter(range(1000, 2000))
    docs = [np.asarray([BOS, *(next(names) for _ in range(n)), EOS]) for n in lengths]
    batches = stream(
        docs, batch_size=3, row_length=row_length, seed=2, cross_document_mask=mask
    ).in_order()
    targets, bigrams = [], set()
    for batch in batches:
        layout, weight = batch.layout, batch.weight_BxL
        assert layout.token_BxL.shape == (3, row_length)
        targets += layout.token_BxL[weight > 0].tolist()
        for row in range(3):
            token, segment = layout.token_BxL[row], layout.segment_BxL[row]
            assert not weight[row][segment == 0].any() and weight[row][0] == 0
            for t in np.flatnonzero(weight[row]):
                assert segment[t] == segment[t - 1], "a target needs its predecessor in sight"
                assert layout.position_BxL[row][t] == layout.position_BxL[row][t - 1] + 1
                bigrams.add((int(token[t - 1]), int(token[t])))
            if mask:
                begins = np.flatnonzero((token == BOS) & (segment > 0))
                assert not layout.position_BxL[row][begins].any()
                assert len(np.unique(segment[segment > 0])) <= 1 + len(begins)
            else:
                assert set(segment.tolist()) <= {0, 1}
    assert sorted(targets) == sorted(t for doc in docs for t in doc[1:].tolist())
    assert bigrams == {(int(a), int(b)) for d in docs for a, b in itertools.pairwise(d)}


def test_without_mask_rows_run_through_documents():
    docs = [np.asarray([BOS, 1000 + i, EOS]) for i in range(7)]
    batch = stream(docs, batch_size=1, row_length=6, seed=0)(0)
    assert batch.layout.position_BxL.tolist() == [list(range(6))]
    assert len(set(batch.layout.token_BxL[0].tolist()) - {BOS, EOS}) >= 2


def test_epochs_reshuffle_rows_and_seeds_documents():
    docs = [np.asarray([BOS, *range(1000 + 10 * i, 1009 + 10 * i), EOS]) for i in range(20)]
    first, other = (stream(docs, batch_size=2, row_length=9, seed=s) for s in (0, 1))
    steps = first.steps_per_epoch()
    assert first.num_examples == -(-(20 * 11 - 1) // 8) and steps == -(-first.num_examples // 2)
    assert not np.array_equal(first(0).layout.token_BxL, other(0).layout.token_BxL)
    rows = [first.rows(e * first.num_examples, first.num_examples) for e in (0, 1)]
    keys = [{tuple(r) for r in batch.layout.token_BxL.tolist()} for batch in rows]
    assert keys[0] == keys[1]
    assert not np.array_equal(rows[0].layout.token_BxL, rows[1].layout.token_BxL)


def test_nothing_to_read_is_refused():
    with pytest.raises(UserError, match="no pretraining text"):
        stream([], batch_size=1, row_length=8, seed=0)
    with pytest.raises(UserError, match="row_length is 1"):
        stream([np.asarray([BOS, EOS])], batch_size=1, row_length=1, seed=0)
