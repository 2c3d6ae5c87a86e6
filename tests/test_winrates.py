"""Win rates: their symmetry, and intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest

from instructax.stages.winrates import (
    by_content,
    interval,
    interval_over_seeds,
    length_matched,
    wins,
)

RNG = np.random.default_rng(0)


@pytest.mark.laws
def test_wins_of_both_sides_add_to_one_and_a_tie_is_half():
    a, b = RNG.integers(0, 3, (2, 50))
    np.testing.assert_array_equal(wins(a, b) + wins(b, a), 1.0)
    np.testing.assert_array_equal(wins(a, a), 0.5)


@pytest.mark.laws
def test_shifting_both_judges_changes_nothing():
    a, b = RNG.normal(size=(2, 50))
    np.testing.assert_array_equal(wins(a + 3.0, b + 3.0), wins(a, b))


def test_lengths_match_within_a_token():
    np.testing.assert_array_equal(
        length_matched(np.full(4, 5), np.array([4, 5, 6, 7])), [True, True, True, False]
    )


def test_contents_hold_their_wins_and_prompts():
    found = by_content(np.array([1.0, 0.5, 0.0, 1.0]), np.array(["b", "a", "b", "b"]))
    assert found == {"keys": ["a", "b"], "won": [0.5, 2.0], "n": [1, 3]}


@pytest.mark.laws
def test_the_order_of_prompts_does_not_matter():
    won, key = RNG.random(60), RNG.integers(0, 20, 60)
    order = RNG.permutation(60)
    one, other = (interval(w, k, 200, 0) for w, k in ((won, key), (won[order], key[order])))
    assert one == pytest.approx(other)


@pytest.mark.laws
def test_prompts_that_repeat_a_content_make_the_interval_no_narrower():
    """As if each content had been asked once: copies are no new evidence."""
    won, key = (RNG.random(80) < 0.6).astype(float), np.arange(80)
    once = interval(won, key, 500, 3)
    copied = interval(np.tile(won, 5), np.tile(key, 5), 500, 3)
    assert copied == pytest.approx(once | {"n": 400})
    apart = interval(np.tile(won, 5), np.arange(400), 500, 3)
    assert apart["high"] - apart["low"] < 0.7 * (once["high"] - once["low"])


@pytest.mark.laws
def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Contents whose prompts win together with probability .65; 400 evaluations of 100 contents."""
    truth, covered = 0.65, 0
    for i in range(400):
        rng = np.random.default_rng([1, i])
        key = np.repeat(np.arange(100), rng.integers(1, 4, 100))
        found = interval((rng.random(100) < truth)[key].astype(float), key, 300, i)
        covered += found["low"] <= truth <= found["high"]
    # A bootstrap of 100 contents is a little narrow; three deviations of 400 draws at 94%.
    assert abs(covered / 400 - 0.94) < 3 * (0.94 * 0.06 / 400) ** 0.5


@pytest.mark.laws
def test_of_one_seed_the_interval_over_seeds_is_that_of_its_contents():
    won, key = (RNG.random(300) < 0.7).astype(float), RNG.integers(0, 120, 300)
    one = interval(won, key, 4000, 0)
    over = interval_over_seeds([by_content(won, key)], 4000, 0)
    assert over["mean"] == pytest.approx(one["mean"])
    for end in ("low", "high"):
        assert over[end] == pytest.approx(one[end], abs=0.01)


@pytest.mark.laws
def test_seeds_that_disagree_widen_the_interval():
    def seeds(*rates: float):
        return [by_content(np.full(200, rate), np.arange(200)) for rate in rates]

    agreeing, disagreeing = (
        interval_over_seeds(s, 500, 0) for s in (seeds(0.6, 0.6, 0.6), seeds(0.4, 0.6, 0.8))
    )
    assert agreeing == pytest.approx({"mean": 0.6, "low": 0.6, "high": 0.6})
    assert disagreeing["mean"] == pytest.approx(0.6)
    assert disagreeing["low"] < 0.5 and disagreeing["high"] > 0.7
