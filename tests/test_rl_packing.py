"""Plans that lay episodes into rows: nothing lost, nothing twice, few shapes."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.batches import padded_layout
from instructax.rl.packing import (
    episode_rows,
    on_rows,
    packed_rows,
    padded_rows,
    scored_rows,
    take,
    take_layout,
)

WIDTH, PROMPT = 12, 7


def lengths(rng, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    prompt_B = rng.integers(1, PROMPT + 1, episodes)
    return PROMPT - prompt_B, prompt_B + rng.integers(0, WIDTH - PROMPT + 1, episodes)


def slots_of(episode: int, start_B, length_B) -> list[int]:
    first = episode * WIDTH + int(start_B[episode])
    return list(range(first, first + int(length_B[episode])))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 40), shards=st.sampled_from((1, 2, 4)))
def test_every_real_slot_lies_once_in_its_own_group(seed, size, shards):
    size *= shards
    rng = np.random.default_rng(seed)
    start_B, length_B = lengths(rng, 2 * size)
    order_UxM = rng.permutation(2 * size).reshape(2, size)
    source = packed_rows(order_UxM, start_B, length_B, WIDTH, shards)
    assert source.shape[1] % shards == 0 and source.shape[1] <= size
    for order_M, source_RxL in zip(order_UxM, source, strict=True):
        wanted = sorted(slot for e in order_M for slot in slots_of(e, start_B, length_B))
        assert sorted(source_RxL[source_RxL >= 0].tolist()) == wanted
        for row in source_RxL:
            real = row[row >= 0]
            assert (row[: len(real)] >= 0).all(), "padding stands behind"
            for episode in set((real // WIDTH).tolist()):
                inside = real[real // WIDTH == episode].tolist()
                assert inside == slots_of(episode, start_B, length_B), "whole and in order"


def test_rows_come_in_few_numbers_and_padding_is_little():
    rng = np.random.default_rng(0)
    shapes, filled = set(), []
    for _ in range(200):
        start_B, length_B = lengths(rng, 48)
        source = packed_rows(np.arange(48)[None], start_B, length_B, WIDTH)
        shapes.add(source.shape[1])
        filled.append((source >= 0).mean())
    assert shapes <= {20, 24, 28, 32, 40, 48}
    assert np.mean(filled) > 0.8


def test_one_long_episode_a_row_is_as_many_rows_as_episodes():
    source = packed_rows(np.arange(5)[None], np.zeros(5, int), np.full(5, WIDTH), WIDTH)
    np.testing.assert_array_equal(np.sort(source[0].ravel()), np.arange(5 * WIDTH))


@pytest.mark.parametrize(("start", "length"), [(-1, 3), (0, WIDTH + 1), (8, 5)])
def test_an_episode_that_leaves_its_row_is_refused(start, length):
    with pytest.raises(ValueError, match="start_B and length_B"):
        packed_rows(np.zeros((1, 1), int), np.array([start]), np.array([length]), WIDTH)


def test_shards_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="order_UxM has 3"):
        packed_rows(np.arange(3)[None], np.zeros(3, int), np.ones(3, int), WIDTH, shards=2)


def test_half_of_a_rows_slots_are_of_responses_where_these_are_no_longer_than_prompts():
    rng = np.random.default_rng(5)
    prompt_B, response_B = rng.integers(13, 17, 40), rng.integers(12, 17, 40)
    mask = np.arange(16) >= (16 - prompt_B)[:, None]
    source = episode_rows(np.arange(40)[None], mask, response_B, 16)
    scored = scored_rows(source, 16, 32)
    assert scored.shape == (1, source.shape[1], 16)
    of_response = np.take_along_axis(source, np.maximum(scored, 0), axis=2)[scored >= 0]
    assert (of_response % 32 >= 16).all() and of_response.size == response_B.sum()
    assert sorted(source[source >= 0] // 32) == sorted(
        np.repeat(np.arange(40), prompt_B + response_B)
    )
    # Longer ones may have three quarters.
    source = episode_rows(np.arange(40)[None], mask, np.full(40, 20), 20)
    assert scored_rows(source, 16, 36).shape == (1, source.shape[1], 27)


@pytest.fixture
def episodes():
    rng = np.random.default_rng(3)
    start_B, length_B = lengths(rng, 6)
    slot_L = np.arange(WIDTH)
    mask = (slot_L >= start_B[:, None]) & (slot_L < (start_B + length_B)[:, None])
    layout = padded_layout(jnp.asarray(rng.integers(1, 90, (6, WIDTH)), jnp.int32), mask)
    return layout, mask, packed_rows(np.arange(6)[None], start_B, length_B, WIDTH)[0]


def test_packed_episodes_are_segments_with_their_own_positions(episodes):
    layout, _, source = episodes
    rows = take_layout(layout, source)
    for row in range(len(source)):
        real = source[row] >= 0
        episode = source[row][real] // WIDTH
        _, order = np.unique(episode, return_index=True)
        names = {episode[first]: n for n, first in enumerate(sorted(order), start=1)}
        expected = [names[e] for e in episode]
        np.testing.assert_array_equal(rows.segment_BxL[row][real], expected)
        assert not np.asarray(rows.segment_BxL[row])[~real].any()
    np.testing.assert_array_equal(rows.token_BxL, take(layout.token_BxL, source))
    np.testing.assert_array_equal(rows.position_BxL, take(layout.position_BxL, source))


def test_padded_rows_give_the_layout_back(episodes):
    layout, _, _ = episodes
    rows = take_layout(layout, padded_rows(np.arange(6)[None], WIDTH)[0])
    for got, want in zip(
        (rows.token_BxL, rows.position_BxL, rows.segment_BxL),
        (layout.token_BxL, layout.position_BxL, layout.segment_BxL),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_results_come_home(episodes):
    layout, mask, source = episodes
    name = {"token": lambda rows: rows.token_BxL, "position": lambda rows: rows.position_BxL}
    for what in name.values():
        got = on_rows(what, layout, source)
        np.testing.assert_array_equal(got, np.where(mask, what(layout), 0))
        np.testing.assert_array_equal(on_rows(what, layout, None), what(layout))


def test_sampled_episodes_end_at_the_prompts_right_edge_and_go_on_behind_it():
    prompt_B, response_B, slots = np.array([2, 7, 4]), np.array([5, 1, 3]), WIDTH - PROMPT
    mask = np.arange(PROMPT) >= (PROMPT - prompt_B)[:, None]
    order = np.array([[2, 0, 1]])
    np.testing.assert_array_equal(
        episode_rows(order, mask, response_B, slots, packed=False), padded_rows(order, WIDTH)
    )
    source = episode_rows(order, mask, response_B, slots)
    wanted = [s for e in range(3) for s in slots_of(e, PROMPT - prompt_B, prompt_B + response_B)]
    assert sorted(source[source >= 0].tolist()) == sorted(wanted)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.integers(1, 40),
    slots=st.integers(1, 40),
    size=st.integers(1, 12),
    shards=st.sampled_from((1, 2, 4)),
)
def test_whatever_the_lengths_every_slot_lies_once_and_every_response_is_scored(
    seed, prompt, slots, size, shards
):
    rng, episodes, width = np.random.default_rng(seed), size * shards, prompt + slots
    prompt_B = rng.integers(1, rng.integers(1, prompt + 1) + 1, episodes)
    response_B = rng.integers(rng.integers(0, slots + 1), slots + 1, episodes)
    mask_BxP = np.arange(prompt) >= (prompt - prompt_B)[:, None]
    order_UxM = rng.permutation(episodes)[None]
    source = episode_rows(order_UxM, mask_BxP, response_B, slots, shards=shards)
    real = np.sort(source[source >= 0])
    wanted = [
        np.arange(e * width + prompt - p, e * width + prompt + r)
        for e, (p, r) in enumerate(zip(prompt_B, response_B, strict=True))
    ]
    np.testing.assert_array_equal(real, np.concatenate(wanted))
    assert source.shape[1] % shards == 0 and source.size <= episodes * width
    scored = scored_rows(source, prompt, width)
    if scored is not None:
        taken = np.take_along_axis(source, np.maximum(scored, 0), axis=2)[scored >= 0]
        np.testing.assert_array_equal(np.sort(taken), real[real % width >= prompt])


def test_responses_too_long_for_two_in_half_of_a_row_of_two_lengths():
    """A limit may take more rows than there would be without; then it is not kept to."""
    mask_BxP = np.arange(16)[None] >= np.full((12, 1), 14)
    rows = episode_rows(np.arange(12)[None], mask_BxP, np.full(12, 20), 20)
    assert rows.shape == (1, 4, 72) and scored_rows(rows, 16, 36) is None


def test_long_responses_behind_short_prompts_are_packed_all_the_same():
    """Half of a row's slots for responses would leave a row to each."""
    mask_BxP = np.arange(16)[None] >= np.full((8, 1), 14)  # prompts of 2 of 16 slots
    order_UxM = np.arange(8)[None]
    long = episode_rows(order_UxM, mask_BxP, np.full(8, 14), 16)
    assert long.shape == (1, 2, 64) and scored_rows(long, 16, 32) is None
    # Where three quarters or half cost no row, it is that.
    for prompt, response, scored in ((4, 12, 48), (10, 6, 32)):
        mask_BxP = np.arange(16)[None] >= np.full((8, 1), 16 - prompt)
        rows = episode_rows(order_UxM, mask_BxP, np.full(8, response), 16)
        assert scored_rows(rows, 16, 32).shape == (1, 2, scored)


def test_short_episodes_share_rows_of_two_lengths():
    """Three of 20 slots fit in 64, one in 32. Lengths that drift change the number of rows alone: few programs."""
    order_UxM = np.arange(12)[None]
    mask_BxP = np.arange(16)[None] >= np.full((12, 1), 6)
    rows = episode_rows(order_UxM, mask_BxP, np.full(12, 10), 16)
    assert rows.shape == (1, 4, 64)
    assert sorted(rows[rows >= 0] // 32) == sorted(np.repeat(np.arange(12), 20))
    assert scored_rows(rows, 16, 32).shape[2] == 32
    drifting = [episode_rows(order_UxM, mask_BxP, np.full(12, n), 16) for n in range(1, 12)]
    assert {rows.shape[2] for rows in drifting} == {64}
    assert {rows.shape[1] for rows in drifting} == {3, 4}
    # Shards that leave a row of one length each keep it, and so do episodes of which no two fit in less.
    assert episode_rows(order_UxM, mask_BxP, np.full(12, 10), 16, shards=12).shape == (1, 12, 32)
    full_BxP = np.ones((12, 16), bool)
    assert episode_rows(order_UxM, full_BxP, np.full(12, 16), 16).shape == (1, 12, 32)


def test_long_episodes_keep_rows_of_their_length():
    """Attention over two of them would be no small part."""
    order_UxM, mask_BxP = np.arange(4)[None], np.arange(1024)[None] >= np.full((4, 1), 900)
    long = episode_rows(order_UxM, mask_BxP, np.full(4, 10), 1024)
    assert long.shape == (1, 1, 2048)
    short = episode_rows(order_UxM, mask_BxP[:, 512:], np.full(4, 10), 512)
    assert short.shape == (1, 1, 2048)
