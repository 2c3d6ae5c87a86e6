"""Win rates and their intervals. Prompts of one content stand or fall together, so contents are what is drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray
CENTRAL = (0.025, 0.975)


def wins(a_N: Array, b_N: Array) -> Array:
    """1 where a beats b, one half where they tie."""
    return (a_N > b_N) + 0.5 * (a_N == b_N)


def length_matched(a_N: Array, b_N: Array, within: int = 1) -> Array:
    """Prompts whose two responses differ by at most ``within`` tokens."""
    return np.abs(a_N - b_N) <= within


def by_content(won_N: Array, key_N: Array) -> dict[str, list]:
    """Wins and prompts of each content: what an interval over seeds is drawn from without the samples."""
    keys, group_N = np.unique(key_N, return_inverse=True)
    return {
        "keys": keys.tolist(),
        "won": np.bincount(group_N, won_N, len(keys)).tolist(),
        "n": np.bincount(group_N, minlength=len(keys)).tolist(),
    }


def interval(won_N: Array, key_N: Array, resamples: int, seed: int) -> dict[str, float]:
    """Mean and 95% interval of one seed's wins, by bootstrap over contents."""
    found = by_content(won_N, key_N)
    won, count = np.asarray(found["won"]), np.asarray(found["n"])
    drawn = np.random.default_rng([seed, 7]).integers(0, won.size, (resamples, won.size))
    means = won[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    return _summary(won_N.mean(), means) | {"n": int(won_N.size)}


def interval_over_seeds(
    seeds: Sequence[dict[str, Any]], resamples: int, seed: int
) -> dict[str, float]:
    """Mean and 95% interval by bootstrap over seeds and, within them, over contents.

    Args:
      seeds: what :func:`by_content` gave for each.
    """
    rng = np.random.default_rng([seed, 11])
    won = [np.asarray(s["won"], float) for s in seeds]
    count = [np.asarray(s["n"], float) for s in seeds]
    means = []
    for _ in range(resamples):
        total = number = 0.0
        for s in rng.integers(0, len(seeds), len(seeds)):
            drawn = rng.integers(0, won[s].size, won[s].size)
            total, number = total + won[s][drawn].sum(), number + count[s][drawn].sum()
        means.append(total / number)
    return _summary(np.mean([w.sum() / n.sum() for w, n in zip(won, count, strict=True)]), means)


def _summary(mean: float, means: Any) -> dict[str, float]:
    low, high = np.quantile(means, CENTRAL)
    return {"mean": float(mean), "low": float(low), "high": float(high)}
