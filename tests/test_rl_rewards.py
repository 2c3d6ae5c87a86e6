from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.rl import rewards


def draw(seed, rows=4, length=5) -> tuple[Any, Any, Any]:
    """Contiguous masks that start anywhere, some of them empty."""
    rng = np.random.default_rng(seed)
    start = rng.integers(0, length, rows)[:, None]
    stop = start + rng.integers(0, length + 1, rows)[:, None]
    slot = np.arange(length)[None]
    score, kl = rng.normal(size=rows), rng.normal(size=(rows, length))
    return score.astype(np.float32), kl.astype(np.float32), (slot >= start) & (slot < stop)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.02, 2.0]))
def test_equals_a_loop(seed, kl_coef):
    args = draw(seed)
    out = rewards.shaped_reward(*args, kl_coef)
    np.testing.assert_allclose(out, oracles.shaped_reward(*args, kl_coef), rtol=1e-5, atol=1e-6)


def test_golden():
    kl = np.array([[1.0, 2.0, 9.0], [9.0, 4.0, -1.0], [9.0, 9.0, 9.0]], np.float32)
    mask = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
    out = rewards.shaped_reward(np.array([0.7, -1.9, 5.0], np.float32), kl, mask, 0.5)
    np.testing.assert_allclose(out, [[-0.5, -0.3, 0.0], [0.0, -2.0, -1.4], [0.0] * 3], rtol=1e-6)


def test_the_score_is_paid_once_and_beta_zero_leaves_it_alone():
    score, kl, mask = draw(1)
    some = mask.any(axis=1)
    total = rewards.shaped_reward(score, kl, mask, 0.0).sum(axis=1)
    np.testing.assert_array_equal(total, np.where(some, score, 0))
    total = rewards.shaped_reward(score, kl, mask, 0.3).sum(axis=1)
    expected = np.where(some, score, 0) - 0.3 * (kl * mask).sum(1)
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_outside_the_mask_nothing_counts():
    score, kl, mask = draw(2)
    mask[1] = False
    dirty_kl = np.where(mask, kl, np.float32(np.nan))
    dirty_score = np.where(mask.any(axis=1), score, np.float32(np.nan))
    value_and_grad = jax.value_and_grad(
        lambda s, k: jnp.sum(rewards.shaped_reward(s, k, mask, 0.1) ** 2), argnums=(0, 1)
    )
    clean = value_and_grad(jnp.asarray(score), jnp.asarray(kl))
    dirty = value_and_grad(jnp.asarray(dirty_score), jnp.asarray(dirty_kl))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_integer_scores_are_refused():
    score, kl, mask = draw(3)
    with pytest.raises(TypeError, match="score_B must be floating"):
        rewards.shaped_reward(score.astype(np.int32), kl, mask, 0.1)
    with pytest.raises(TypeError, match="kl_BxT must be floating"):
        rewards.shaped_reward(score, kl.astype(np.int32), mask, 0.1)
    with pytest.raises(TypeError, match="score_B must be floating"):
        rewards.apply_missing_eos(score.astype(np.int32), mask[:, 0], "none", 0.0)


def test_door_and_dtypes():
    score, kl, mask = draw(4)
    with pytest.raises(ValueError, match="score_B has 1 rows"):
        rewards.shaped_reward(score[:1], kl, mask, 0.1)
    with pytest.raises(ValueError, match="mask_BxT has shape"):
        rewards.shaped_reward(score, kl, mask[:, :1], 0.1)
    with pytest.raises(ValueError, match="kl_coef must be a scalar"):
        rewards.shaped_reward(score, kl, mask, kl)
    low = rewards.shaped_reward(jnp.asarray(score, jnp.bfloat16), kl, mask, jnp.float32(0.1))
    assert low.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = rewards.shaped_reward(score.astype(np.float64), kl.astype(np.float64), mask, 0.1)
        assert wide.dtype == jnp.float64
        assert rewards.shaped_reward(score, kl, mask, np.float64(0.1)).dtype == jnp.float32


@pytest.mark.parametrize("wide", ["score", "kl"])
def test_beta_has_the_precision_of_the_wider_argument(wide):
    """Where either is float64 so are the rewards, and a rounded beta would show at 1e-9."""
    score, kl, mask = draw(5)
    with jax.enable_x64(True):
        arguments = {"score_B": score, "kl_BxT": kl}
        name = {"score": "score_B", "kl": "kl_BxT"}[wide]
        arguments[name] = arguments[name].astype(np.float64)
        out = rewards.shaped_reward(**arguments, mask_BxT=mask, kl_coef=0.1)
        assert out.dtype == jnp.float64
    np.testing.assert_allclose(out, oracles.shaped_reward(score, kl, mask, 0.1), rtol=1e-14)


def test_missing_eos_rules():
    score = np.array([0.5, 0.5, -3.0], np.float32)
    finished = np.array([True, False, False])

    def apply(rule, value):
        return rewards.apply_missing_eos(score, finished, rule, value).tolist()

    assert apply("replace", -1.0) == [0.5, -1.0, -1.0]
    assert apply("replace", 0) == [0.5, 0.0, 0.0]
    assert apply("subtract", 1.0) == [0.5, -0.5, -4.0]
    assert apply("none", None) == [0.5, 0.5, -3.0]
    with pytest.raises(ValueError, match="rule must be one of replace, subtract, none"):
        apply("add", 1.0)
    with pytest.raises(TypeError, match="finished_B must be bool"):
        rewards.apply_missing_eos(score, finished.astype(int), "none", 0.0)
