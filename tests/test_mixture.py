"""Mixtures: exact shares, no row lost, epochs of the first component."""

from __future__ import annotations

import numpy as np
import pytest
from streams import equal, lm_stream, text_stream

from instructax.config import UserError
from instructax.data.mixture import MixedStream, mix_lm

pytest.importorskip("grain")


@pytest.mark.parametrize("weight", [0.1, 0.5, 1 / 3, 0.02])
def test_mixture_shares_are_exact_and_lose_no_row(weight):
    a, b = lm_stream(count=20, batch_size=8), text_stream()
    mixed = mix_lm(a, b, weight)
    rows_b = 0
    for g in range(30):
        tokens = mixed(g).layout.token_BxL
        assert tokens.shape == (8, 8)
        rows_b += int((tokens.max(1) >= 1000).sum())
        assert abs(rows_b - weight * 8 * (g + 1)) <= 1
        assert mixed.cursors(g + 1) == [8 * (g + 1) - rows_b, rows_b]
    mine = np.concatenate([mixed(g).layout.token_BxL for g in range(12)])
    mine = mine[mine.max(1) < 1000]
    assert np.array_equal(mine, a.rows(0, len(mine)).layout.token_BxL)
    again = mix_lm(lm_stream(count=20, batch_size=8), text_stream(), weight)
    assert equal(again(7), mixed(7))


def test_a_mixtures_epoch_is_its_first_components():
    mixed = mix_lm(lm_stream(count=20, batch_size=8), text_stream(), 0.25)
    assert [mixed.steps_per_epoch(e) for e in range(3)] == [4, 3, 3]
    assert mixed.cursors(4)[0] >= 20 > mixed.cursors(3)[0]
    assert mixed.num_examples == 20


def test_mixture_edges():
    a, b = lm_stream(), text_stream()
    assert mix_lm(a, b, 0.0) is a
    for weight in (-0.1, 1.0):
        with pytest.raises(ValueError, match="weight_b"):
            mix_lm(a, b, weight)
    for components in ([], [(a, 0.0)], [(a, 1.0), (b, -1.0)]):
        with pytest.raises(ValueError, match="weights"):
            MixedStream(components, 4)
    with pytest.raises(UserError, match="rows of one length"):
        mix_lm(lm_stream(row_length=9), b, 0.5)(0)
