from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rl_rewards import draw as draw_rewards

from instructax.rl.gae import generalized_advantage


def draw(seed, rows=4, length=5) -> tuple[Any, Any, Any]:
    _, reward, mask = draw_rewards(seed, rows, length)
    value = np.random.default_rng(seed + 1).normal(size=mask.shape).astype(np.float32)
    return reward, value, mask


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([1.0, 0.9, 0.0]), st.sampled_from([0.95, 1.0, 0.0, 0.5])
)
def test_equals_the_sum_of_discounted_deltas(seed, discount, gae_lambda):
    args = draw(seed)
    got = generalized_advantage(*args, discount, gae_lambda)
    expected = oracles.generalized_advantage(*args, discount, gae_lambda)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_golden():
    # lambda 0.5, discount 1, rewards (0, 0, 1), values (0.1, 0.2, 0.3):
    # deltas (0.1, 0.1, 0.7); A_2 = 0.7, A_1 = 0.45, A_0 = 0.325. The 9s are padding.
    reward = np.array([[9, 0.0, 0.0, 1.0, 9]], np.float32)
    value = np.array([[9, 0.1, 0.2, 0.3, 9]], np.float32)
    mask = np.array([[0, 1, 1, 1, 0]], bool)
    advantage, returns = generalized_advantage(reward, value, mask, 1.0, 0.5)
    np.testing.assert_allclose(advantage, [[0, 0.325, 0.45, 0.7, 0]], rtol=1e-6)
    np.testing.assert_allclose(returns, [[0, 0.425, 0.65, 1.0, 0]], rtol=1e-6)


def test_lambda_one_returns_are_the_reward_to_go():
    reward, value, mask = draw(1)
    _, returns = generalized_advantage(reward, value, mask, 1.0, 1.0)
    paid = np.where(mask, reward, 0)
    to_go = np.flip(np.cumsum(np.flip(paid, 1), axis=1), 1)
    np.testing.assert_allclose(returns, np.where(mask, to_go, 0), rtol=1e-4, atol=1e-5)


def test_lambda_zero_is_the_one_step_error_and_a_perfect_value_has_no_advantage():
    reward, _, mask = draw(2)
    mask[:] = True
    to_go = np.flip(np.cumsum(np.flip(reward, 1), axis=1), 1)
    for gae_lambda in (0.0, 0.95):
        advantage, _ = generalized_advantage(reward, to_go, mask, 1.0, gae_lambda)
        np.testing.assert_allclose(advantage, 0.0, atol=1e-5)


def test_the_end_is_the_rows_not_the_buffers():
    reward, value, mask = draw(3)
    length = reward.shape[1]
    wide_reward, wide_value = (
        np.pad(a, ((0, 0), (2, 3)), constant_values=7) for a in (reward, value)
    )
    wide_mask = np.pad(mask, ((0, 0), (2, 3)))
    got = generalized_advantage(wide_reward, wide_value, wide_mask, 1.0, 0.95)
    expected = generalized_advantage(reward, value, mask, 1.0, 0.95)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a[:, 2 : 2 + length], b)
        assert not np.any(np.asarray(a)[~wide_mask])


def test_outside_the_mask_nothing_counts():
    reward, value, mask = draw(4)
    dirty = [jnp.asarray(np.where(mask, a, np.float32(np.nan))) for a in (reward, value)]

    def total(reward, value):
        advantage, returns = generalized_advantage(reward, value, mask, 0.9, 0.95)
        return jnp.sum(advantage**2) + jnp.sum(returns**2)

    value_and_grad = jax.value_and_grad(total, argnums=(0, 1))
    clean = value_and_grad(jnp.asarray(reward), jnp.asarray(value))
    jax.tree.map(np.testing.assert_array_equal, clean, value_and_grad(*dirty))


def test_door_dtypes_and_edges():
    reward, value, mask = draw(5)
    with pytest.raises(TypeError, match="reward_BxT must be floating"):
        generalized_advantage(reward.astype(int), value, mask, 1.0, 0.95)
    with pytest.raises(ValueError, match="value_BxT has shape"):
        generalized_advantage(reward, value[:, :2], mask, 1.0, 0.95)
    with pytest.raises(TypeError, match="discount"):
        generalized_advantage(reward, value, mask, None, 0.95)
    low = generalized_advantage(jnp.asarray(reward, jnp.bfloat16), value, mask, 1, jnp.float32(0.9))
    assert low[0].dtype == low[1].dtype == jnp.float32
    with jax.enable_x64(True):
        wide = generalized_advantage(reward.astype(np.float64), value, mask, 1.0, 0.95)
        assert wide[0].dtype == wide[1].dtype == jnp.float64
    none = np.zeros((2, 0), np.float32)
    assert generalized_advantage(none, none, none.astype(bool), 1.0, 0.95)[0].shape == (2, 0)


@pytest.mark.parametrize("wide", [0, 1])
def test_the_precision_is_that_of_the_wider_argument(wide):
    """Where either is float64 all is computed in it, discount and lambda included."""
    *arrays, mask = draw(8)
    arrays[wide] = arrays[wide].astype(np.float64)
    with jax.enable_x64(True):
        out = generalized_advantage(*arrays, mask, 0.9, 0.7)
    for got, expected in zip(
        out, oracles.generalized_advantage(*arrays, mask, 0.9, 0.7), strict=True
    ):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
