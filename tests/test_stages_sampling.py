"""Scores of samples as a figure with its error: what is averaged over what, and from which keys."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from instructax.stages.sampling import Sample, mean_reward

PROMPTS = 7


class Drawn:
    """A sampler whose scores are the prompt's own number plus what its key draws."""

    def __init__(self, noise: float = 1.0, prompts: int = PROMPTS):
        self.noise, self.prompts = noise, prompts
        self.scores: list[np.ndarray] = []

    def rounds(self, params, keys, *, reward):
        return [self.round(key) for key in keys]

    def round(self, key):
        self.scores.append(
            np.arange(self.prompts) + self.noise * np.asarray(jax.random.normal(key, self.prompts))
        )
        return [Sample(i, "", True, 1, 1, score=float(s)) for i, s in enumerate(self.scores[-1])]


def test_every_sample_has_a_key_of_its_own_and_every_candidate_the_same_keys():
    sampler = Drawn()
    first = mean_reward(sampler, None, None, jax.random.key(0), 3)
    again = mean_reward(sampler, None, None, jax.random.key(0), 3)
    drawn = sampler.scores
    assert first == again and len(drawn) == 6
    assert np.array_equal(drawn[:3], drawn[3:])
    assert len({tuple(scores) for scores in drawn}) == 3


def test_the_error_is_over_prompts_not_over_samples():
    """Many samples take away their own noise and leave that of the choice of prompts."""
    spread = np.arange(PROMPTS).std(ddof=1) / np.sqrt(PROMPTS)
    for num_samples in (1, 4, 40):
        mean, error = mean_reward(Drawn(noise=0.0), None, None, jax.random.key(1), num_samples)
        assert mean == pytest.approx((PROMPTS - 1) / 2) and error == pytest.approx(spread)
    sampler = Drawn(noise=20.0)
    mean, error = mean_reward(sampler, None, None, jax.random.key(1), 40)
    assert mean == pytest.approx(np.mean(sampler.scores))
    one = mean_reward(Drawn(noise=20.0), None, None, jax.random.key(1), 1)[1]
    assert error is not None and one is not None and error < one / 2


def test_one_prompt_has_no_error():
    assert mean_reward(Drawn(prompts=1), None, None, jax.random.key(2), 3)[1] is None
