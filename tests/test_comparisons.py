"""Comparisons: one copy of the prompt, all responses behind it, scores read at their last tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.batches import predecessor
from instructax.config import UserError
from instructax.data.comparisons import ComparisonExamples, layout_rows, stream, tokenise
from instructax.data.convert import open_assistant
from instructax.data.readers import parse_line
from instructax.data.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = Tokenizer.from_bytes(train_tokenizer(["abc abd bcd"] * 9, 276))
RECORDS = [
    {"prompt": "abc", "responses": ["a", "bcd", ""], "ranks": [3, 1, 1],
     "finished": [False, True, True]},
    {"prompt": "abc " * 40, "responses": ["a", "b"], "ranks": [0, 1]},
    {"prompt": "abd", "responses": ["a", "b " * 60], "ranks": [0, 1]},
]  # fmt: skip


def test_tokenise_appends_eos_only_to_finished_and_counts_what_it_drops():
    examples = tokenise(RECORDS, TOKENIZER, max_prompt_tokens=30, max_length=50)
    assert examples.record_index_n.tolist() == [0]
    assert examples.dropped == {"prompt_too_long": 1, "example_too_long": 1, "row_too_long": 0}
    assert [r.tolist() for r in examples.responses[0]] == [
        TOKENIZER.encode("a"),
        [*TOKENIZER.encode("bcd"), TOKENIZER.eos_id],
        [TOKENIZER.eos_id],
    ]
    assert examples.ranks[0].tolist() == [3, 1, 1] and examples.most_responses == 3
    with pytest.raises(UserError, match="comparison 2 has"):
        tokenise(RECORDS, TOKENIZER, max_prompt_tokens=30, max_length=50, on_long="refuse")
    with pytest.raises(UserError, match="no comparison is left of 3"):
        tokenise(RECORDS, TOKENIZER, max_prompt_tokens=1)


def test_a_comparison_longer_than_a_row_is_dropped_and_counted_or_refused():
    two = [RECORDS[0], {"prompt": "abc", "responses": ["a", "b " * 9], "ranks": [0, 1]}]
    slots_n = tokenise(two, TOKENIZER).slots_n
    room = int(slots_n[0])
    assert slots_n[1] > room
    examples = tokenise(two, TOKENIZER, max_slots=room)
    assert examples.record_index_n.tolist() == [0] and examples.dropped["row_too_long"] == 1
    with pytest.raises(UserError, match=f"comparison 1 takes {slots_n[1]} slots"):
        tokenise(two, TOKENIZER, max_slots=room, on_long="refuse")


def random_examples(shapes, seed=0) -> ComparisonExamples:
    """Shapes: (prompt length, response lengths) of each comparison; tokens drawn from a wide range."""
    rng = np.random.default_rng(seed)
    return ComparisonExamples(
        prompts=[rng.integers(1, 10**6, p, dtype=np.int32) for p, _ in shapes],
        responses=[[rng.integers(1, 10**6, r, dtype=np.int32) for r in rs] for _, rs in shapes],
        ranks=[rng.integers(0, 3, len(rs), dtype=np.int32) for _, rs in shapes],
        record_index_n=10 + np.arange(len(shapes)),
        dropped={},
        pad_id=0,
    )


shape = st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=2, max_size=9))


def check_batch(batch, examples, members):
    """Each response, read through the layout's own rules, is its prompt and itself."""
    layout = batch.layout
    index, exists = (np.asarray(x) for x in predecessor(layout))
    assert batch.valid_NxK.sum() == sum(len(examples.responses[i]) for i in members)
    for n, i in enumerate(members):
        for k, response in enumerate(examples.responses[i]):
            row, slot = batch.row_NxK[n, k], batch.last_NxK[n, k]
            assert batch.valid_NxK[n, k]
            path = [slot]
            while exists[row, path[-1]]:
                path.append(index[row, path[-1]])
            path.reverse()
            expected = [*examples.prompts[i], *response]
            assert layout.token_BxL[row, path].tolist() == expected
            assert layout.position_BxL[row, path].tolist() == list(range(len(expected)))
            mine = {layout.segment_BxL[row, slot], layout.prefix_BxL[row, slot]} - {0}
            sees = [t for t in range(slot + 1) if layout.segment_BxL[row, t] in mine]
            assert sees == path, "a response sees its prompt and itself, nothing else"
            assert batch.rank_NxK[n, k] == examples.ranks[i][k]
    slots = sum(examples.slots_n[i] for i in members)
    assert (layout.segment_BxL > 0).sum() == slots, "each token is computed once"


@settings(deadline=None, max_examples=40)
@given(shapes=st.lists(shape, min_size=1, max_size=9), rows=st.sampled_from([None, 1, 2]))
def test_an_epoch_is_every_comparison_once(shapes, rows):
    pytest.importorskip("grain")
    examples = random_examples(shapes)
    batches = stream(
        examples, batch_size=4, row_length=70, max_responses=9, seed=3, rows=rows
    )  # fmt: skip
    seen = []
    for g in range(batches.steps_per_epoch()):
        members = batches.record_indices(g) - 10
        batch = batches(g)
        assert batch.layout.token_BxL.shape == (4 if rows is None else rows, 70)
        assert batch.rank_NxK.shape == batch.valid_NxK.shape == (4, 9)
        check_batch(batch, examples, members.tolist())
        seen += members.tolist()
    assert sorted(seen) == list(range(len(shapes)))
    ordered = batches.in_order()
    in_order = np.concatenate([ordered.record_indices(i) for i in range(len(ordered))]) - 10
    assert in_order.tolist() == list(range(len(shapes)))


def test_batches_are_full_where_rows_allow_and_pure_in_the_step():
    pytest.importorskip("grain")
    examples = random_examples([(4, [3] * (2 + i % 8)) for i in range(23)])
    make = {"batch_size": 5, "row_length": 40, "max_responses": 9, "seed": 0}
    plain = stream(examples, **make)
    assert plain.steps_per_epoch() == 5 and plain.num_examples == 23
    assert sorted(len(plain.record_indices(g)) for g in range(5)) == [3, 5, 5, 5, 5]
    packed = stream(examples, rows=3, **make)
    counts = sorted(len(packed.record_indices(g)) for g in range(packed.steps_per_epoch()))
    assert min(counts[1:]) >= 3, "three prompts always fit in three rows; one batch may be a rest"
    for first in (plain, packed):
        again = stream(examples, rows=3 if first is packed else None, **make)
        assert np.array_equal(again(6).layout.token_BxL, first(6).layout.token_BxL)
    assert not np.array_equal(plain.record_indices(0), plain.record_indices(5))
    still = stream(examples, shuffle=False, **make)
    assert still.record_indices(1).tolist() == [15, 16, 17, 18, 19]
    with pytest.raises(ValueError, match="whole batches"):
        plain.in_order(3)


def test_empty_rows_for_a_mesh_change_no_batch():
    pytest.importorskip("grain")
    examples = random_examples([(4, [3] * (2 + i % 8)) for i in range(23)])
    make = {"batch_size": 5, "row_length": 40, "max_responses": 9, "seed": 0}
    for rows, whole in ((3, 4), (None, 8)):
        plain = stream(examples, rows=rows, **make)
        wide = stream(examples, rows=rows, row_multiple=4, **make)
        assert plain.steps_per_epoch() == wide.steps_per_epoch()
        for g in range(7):
            a, b = plain(g), wide(g)
            given = len(a.layout.token_BxL)
            assert b.layout.token_BxL.shape == (whole, 40)
            assert np.array_equal(a.layout.token_BxL, b.layout.token_BxL[:given])
            assert not b.layout.segment_BxL[given:].any()
            assert np.array_equal(a.row_NxK, b.row_NxK)


def test_several_prompts_share_a_row():
    examples = random_examples([(2, [1, 2]), (1, [3, 1])])
    layout, row, last, valid = layout_rows(
        examples.prompts, examples.responses, rows=1, row_length=12, pad_id=0, max_responses=3
    )
    assert layout.segment_BxL.tolist() == [[1, 1, 2, 3, 3, 4, 5, 5, 5, 6, 0, 0]]
    assert layout.prefix_BxL.tolist() == [[0, 0, 1, 1, 1, 0, 4, 4, 4, 4, 0, 0]]
    assert layout.position_BxL.tolist() == [[0, 1, 2, 2, 3, 0, 1, 2, 3, 1, 0, 0]]
    assert last.tolist() == [[2, 4, 0], [8, 9, 0]] and not row.any()
    assert valid.tolist() == [[True, True, False]] * 2


def test_what_does_not_fit_is_refused():
    examples = random_examples([(2, [1, 2]), (1, [3, 1, 1])])
    make = {"batch_size": 2, "row_length": 6, "max_responses": 3, "seed": 0}
    for change, reason in [
        ({"row_length": 5}, "takes 6 slots and row_length is 5"),
        ({"max_responses": 2}, "has 3 responses and max_responses is 2"),
        ({"rows": 0}, "rows is 0"),
    ]:
        with pytest.raises(UserError, match=reason):
            stream(examples, **(make | change))
    sized = {"row_length": 6, "pad_id": 0, "max_responses": 3}
    with pytest.raises(ValueError, match="do not fit in 1 rows"):
        layout_rows(examples.prompts, examples.responses, rows=1, **sized)
    with pytest.raises(ValueError, match="num_prompts is 1"):
        layout_rows(examples.prompts, examples.responses, rows=2, num_prompts=1, **sized)


def test_on_real_rankings(real_data):
    pytest.importorskip("grain")
    path = real_data / "oasst_trees" / "en_100_tree.jsonl"
    records, _ = open_assistant(parse_line(x, "trees") for x in path.read_bytes().splitlines())
    tokenizer = Tokenizer.from_bytes(
        train_tokenizer([r for x in records for r in x["responses"]], 1500)
    )
    examples = tokenise(records, tokenizer)
    assert len(examples) + sum(examples.dropped.values()) == len(records)
    longest = int(examples.slots_n.max())
    batches = stream(examples, batch_size=8, row_length=longest, max_responses=9, rows=4, seed=0)
    seen = np.concatenate([batches.record_indices(g) for g in range(batches.steps_per_epoch())])
    assert sorted(seen.tolist()) == sorted(examples.record_index_n.tolist())
    members = [
        int(np.flatnonzero(examples.record_index_n == r)[0]) for r in batches.record_indices(0)
    ]
    check_batch(batches(0), examples, members)
