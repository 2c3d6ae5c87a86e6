"""Demonstrations: every token once, the loss where it belongs, no document sees another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.config import UserError
from instructax.data.convert import self_instruct
from instructax.data.demonstrations import DemonstrationExamples, stream, tokenise
from instructax.data.readers import parse_line
from instructax.data.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = Tokenizer.from_bytes(train_tokenizer(["abc abd bcd some words"] * 9, 280))
RECORDS = [
    {"prompt": "abc", "response": "bcd"},
    {"prompt": "abc " * 30, "response": "a"},
    {"prompt": "a", "response": "abd " * 30},
    {"messages": [{"role": "user", "content": "some"}], "response": "words"},
]


def test_tokenise_frames_filters_and_counts():
    examples = tokenise(RECORDS, TOKENIZER, max_prompt_tokens=20, max_length=40)
    assert examples.record_index_n.tolist() == [0, 3]
    assert examples.dropped == {"prompt_too_long": 1, "example_too_long": 1}
    assert len(examples) == 2 and examples.pad_id == TOKENIZER.pad_id
    role = TOKENIZER.role_ids
    assert examples.prompts[0].tolist() == [
        TOKENIZER.bos_id, *TOKENIZER.encode("abc"), role["assistant"]
    ]  # fmt: skip
    assert examples.responses[0].tolist() == [*TOKENIZER.encode("bcd"), TOKENIZER.eos_id]
    assert examples.longest == max(
        len(p) + len(r) for p, r in zip(examples.prompts, examples.responses, strict=True)
    )
    with pytest.raises(UserError, match="demonstration 2 has .* tokens"):
        tokenise(RECORDS, TOKENIZER, max_prompt_tokens=20, max_length=40, on_long="refuse")
    with pytest.raises(UserError, match="no demonstration is left of 4"):
        tokenise(RECORDS, TOKENIZER, max_prompt_tokens=1)


lengths = st.lists(st.tuples(st.integers(2, 9), st.integers(1, 9)), min_size=1, max_size=25)


@settings(deadline=None, max_examples=50)
@given(lengths=lengths, packed=st.booleans(), weight=st.sampled_from([0.0, 0.3, 1.0]))
def test_an_epoch_holds_every_token_once(lengths, packed, weight):
    pytest.importorskip("grain")
    rng = np.random.default_rng(0)
    # Tokens are drawn from a wide range: a document is recognised by its contents.
    prompts = [rng.integers(1, 10**6, p, dtype=np.int32) for p, _ in lengths]
    responses = [rng.integers(1, 10**6, r, dtype=np.int32) for _, r in lengths]
    n = len(lengths)
    examples = DemonstrationExamples(prompts, responses, np.arange(n), {}, pad_id=0)
    batches = stream(
        examples, batch_size=1, row_length=18, packed=packed, seed=1, prompt_loss_weight=weight
    )
    found = []
    for g in range(batches.epoch_start(1), batches.epoch_start(2)):
        batch = batches(g)
        token, segment = batch.layout.token_BxL[0], batch.layout.segment_BxL[0]
        members = batches.record_indices(g)
        assert segment.max() == len(members) and (packed or len(members) == 1)
        assert not batch.layout.prefix_BxL.any()
        assert not batch.weight_BxL[0][segment == 0].any()
        for s, i in enumerate(members, 1):
            at = np.flatnonzero(segment == s)
            assert np.array_equal(at, np.arange(at[0], at[-1] + 1)), "segments are contiguous"
            assert token[at].tolist() == [*prompts[i], *responses[i]]
            assert batch.layout.position_BxL[0][at].tolist() == list(range(len(at)))
            context = [0.0] + [weight] * (len(prompts[i]) - 1)
            expected = np.asarray(context + [1.0] * len(responses[i]), np.float32)
            assert np.array_equal(batch.weight_BxL[0][at], expected)
            found.append(i)
    assert sorted(found) == list(range(n))


def test_packing_saves_rows_and_in_order_evaluation_packs_too():
    pytest.importorskip("grain")
    examples = tokenise(RECORDS[::3] * 10, TOKENIZER)
    kwargs = {"batch_size": 2, "row_length": 3 * examples.longest, "seed": 0}
    packed = stream(examples, packed=True, **kwargs)
    padded = stream(examples, packed=False, **kwargs)
    assert packed.steps_per_epoch() <= 4 < padded.steps_per_epoch() == 10
    weights = [sum(b.weight_BxL.sum() for b in s.in_order()) for s in (packed, padded)]
    assert weights[0] == weights[1] == sum(map(len, examples.responses))


def test_a_row_too_short_is_refused():
    examples = tokenise(RECORDS, TOKENIZER)
    with pytest.raises(UserError, match="row_length is 5"):
        stream(examples, batch_size=2, row_length=5, packed=True, seed=0)


def test_on_real_demonstrations(real_data):
    pytest.importorskip("grain")
    lines = (real_data / "self_instruct" / "seed_tasks.jsonl").read_bytes().splitlines()
    records, left_out = self_instruct([parse_line(line, "seed_tasks") for line in lines])
    assert len(lines) == 175 and len(records) + sum(left_out.values()) >= 175
    tokenizer = Tokenizer.from_bytes(train_tokenizer([r["prompt"] for r in records], 1000))
    examples = tokenise(records, tokenizer)
    assert len(examples) + sum(examples.dropped.values()) == len(records)
    assert all(
        tokenizer.decode(ids) == records[i]["response"]
        for ids, i in zip(examples.responses, examples.record_index_n, strict=True)
    )
    batches = stream(examples, batch_size=4, row_length=2048, packed=True, seed=0)
    total = sum(int((b.layout.segment_BxL > 0).sum()) for b in batches.in_order())
    assert total == sum(map(len, examples.prompts)) + sum(map(len, examples.responses))
