import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.losses import surrogate


def draw(seed, shape=(3, 4), spread=0.4) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    old_logp = -rng.exponential(size=shape).astype(np.float32)
    logp = old_logp + (spread * rng.normal(size=shape)).astype(np.float32)
    advantage = rng.normal(size=shape).astype(np.float32)
    return logp, old_logp, advantage, rng.random(shape) < 0.7


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 0.2]), st.sampled_from([0.4, 30.0]))
def test_equals_a_loop_in_loss_and_metrics(seed, clip_range, spread):
    logp, old_logp, advantage, mask = draw(seed, spread=spread)
    loss, metrics = surrogate.clipped_policy_loss(logp, old_logp, advantage, mask, clip_range)
    expected = oracles.clipped_policy_loss(logp, old_logp, advantage, mask, clip_range)
    assert metrics.keys() == expected.keys()
    assert metrics["loss"] == loss
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=2e-6, err_msg=name)


def test_golden():
    # Ratios 1.5, 0.5, 1.5, 0.5 with A = 1, 1, -1, -1 and c = 0.2:
    # max(-1.5, -1.2), max(-.5, -.8), max(1.5, 1.2), max(.5, .8) = -1.2, -.5, 1.5, .8
    logp = np.log(np.array([[1.5, 0.5], [1.5, 0.5]], np.float32))
    advantage = np.array([[1.0, 1.0], [-1.0, -1.0]], np.float32)
    loss, metrics = surrogate.clipped_policy_loss(
        logp, np.zeros_like(logp), advantage, np.ones((2, 2), bool), 0.2
    )
    np.testing.assert_allclose(loss, 0.6 / 4, rtol=1e-6)
    assert metrics["clipfrac"] == 0.5
    np.testing.assert_allclose(metrics["ratio_var"], 0.25, rtol=1e-6)
    approxkl = (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 4
    np.testing.assert_allclose(metrics["approxkl"], approxkl, rtol=1e-6)


def test_at_ratio_one_it_is_the_policy_gradient():
    _, old_logp, advantage, mask = draw(1)
    loss, metrics = surrogate.clipped_policy_loss(old_logp, old_logp, advantage, mask, 0.2)
    np.testing.assert_allclose(loss, -oracles.masked_mean(advantage, mask), rtol=1e-5)
    assert metrics["ratio_max_deviation"] == metrics["clipfrac"] == metrics["approxkl"] == 0
    assert metrics["ratio"] == 1
    grad = jax.grad(lambda x: surrogate.clipped_policy_loss(x, old_logp, advantage, mask, 0.2)[0])(
        jnp.asarray(old_logp)
    )
    np.testing.assert_allclose(grad, -np.where(mask, advantage, 0) / mask.sum(), rtol=1e-5)


def test_clipping_stops_the_gradient_on_the_improving_side_only():
    logp = jnp.log(jnp.array([[1.5, 0.5, 1.5, 0.5]]))
    advantage = np.array([[1.0, 1.0, -1.0, -1.0]], np.float32)
    mask, old = np.ones((1, 4), bool), np.zeros((1, 4), np.float32)
    grad = jax.grad(lambda x: surrogate.clipped_policy_loss(x, old, advantage, mask, 0.2)[0])(logp)
    np.testing.assert_allclose(grad, [[0.0, -0.5 / 4, 1.5 / 4, 0.0]], rtol=1e-5)


def test_gradient_equals_finite_differences_of_the_oracle():
    logp, old_logp, advantage, mask = draw(2)
    logp = logp.astype(np.float64)
    rest = old_logp.astype(np.float64), advantage.astype(np.float64), mask
    with jax.enable_x64(True):
        grad = jax.grad(lambda x: surrogate.clipped_policy_loss(x, *rest, 0.2)[0])(
            jnp.asarray(logp)
        )
    expected = oracles.central_difference(
        lambda x: oracles.clipped_policy_loss(x, *rest, 0.2)["loss"], logp
    )
    np.testing.assert_allclose(grad, expected, atol=1e-8)


def test_the_rollout_is_frozen():
    logp, old_logp, advantage, mask = draw(3)

    def loss(old_logp, advantage):
        return surrogate.clipped_policy_loss(logp, old_logp, advantage, mask, 0.2)[0]

    for grad in jax.grad(loss, argnums=(0, 1))(jnp.asarray(old_logp), jnp.asarray(advantage)):
        assert not np.any(grad)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_outside_the_mask_nothing_counts(junk):
    *arrays, mask = draw(4)
    value_and_grad = jax.value_and_grad(
        lambda x, old, a: surrogate.clipped_policy_loss(x, old, a, mask, 0.2), has_aux=True
    )
    clean = value_and_grad(*map(jnp.asarray, arrays))
    dirty = value_and_grad(*(jnp.asarray(np.where(mask, a, np.float32(junk))) for a in arrays))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_huge_log_ratios_are_clamped_and_counted():
    logp = np.array([[0.0, -500.0, 0.0, 0.0]], np.float32)
    old_logp = np.array([[-500.0, 0.0, 0.0, -np.inf]], np.float32)
    mask = np.ones((1, 4), bool)
    run = functools.partial(surrogate.clipped_policy_loss, clip_range=0.2)
    (loss, metrics), grad = jax.value_and_grad(run, has_aux=True)(
        jnp.asarray(logp), old_logp, -np.ones_like(logp), mask
    )
    assert np.isfinite(loss) and np.all(np.isfinite(grad))
    assert metrics["logratio_clamped_fraction"] == 0.75
    np.testing.assert_allclose(metrics["ratio_max_deviation"], math.exp(20), rtol=1e-6)


@pytest.mark.parametrize("log_ratio, clamped", [(-25.0, -20.0), (25.0, 20.0)])
def test_a_clamped_token_keeps_the_limits_ratio_and_has_no_gradient(log_ratio, clamped):
    old, mask = np.zeros((1, 1), np.float32), np.ones((1, 1), bool)
    advantage = np.full((1, 1), -np.sign(log_ratio), np.float32)  # where clipping does not act
    run = functools.partial(surrogate.clipped_policy_loss, clip_range=0.2)
    (loss, metrics), grad = jax.value_and_grad(run, has_aux=True)(
        jnp.full((1, 1), log_ratio), old, advantage, mask
    )
    np.testing.assert_allclose(metrics["ratio"], math.exp(clamped), rtol=1e-5)
    np.testing.assert_allclose(loss, -advantage[0, 0] * math.exp(clamped), rtol=1e-5)
    assert grad == 0 and metrics["logratio_clamped_fraction"] == 1
    # Exactly at the limit nothing is changed, and nothing is counted.
    _, metrics = run(np.full((1, 1), clamped, np.float32), old, advantage, mask)
    assert metrics["logratio_clamped_fraction"] == 0


def test_microbatches_add_up():
    logp, old_logp, advantage, mask = draw(5)

    def metrics(rows, normalizer):
        row_args = logp[rows], old_logp[rows], advantage[rows], mask[rows]
        return surrogate.clipped_policy_loss(*row_args, 0.2, normalizer)[1]

    whole = metrics(slice(None), None)
    parts = [metrics(slice(i, i + 1), mask.sum()) for i in range(3)]
    for name in ("loss", "approxkl", "clipfrac", "ratio", "logratio_clamped_fraction"):
        np.testing.assert_allclose(sum(p[name] for p in parts), whole[name], rtol=1e-5)


def test_a_float64_clip_range_gives_what_its_float32_rounding_gives():
    arguments = draw(7, (8, 16))
    with jax.enable_x64(True):
        wide = surrogate.clipped_policy_loss(*arguments, np.float64(0.3))
        narrow = surrogate.clipped_policy_loss(*arguments, np.float32(0.3))
    jax.tree.map(np.testing.assert_array_equal, wide, narrow)


def test_empty_dtypes_and_door():
    logp, old_logp, advantage, mask = draw(6)
    run = surrogate.clipped_policy_loss
    loss, metrics = run(logp, old_logp, advantage, np.zeros_like(mask), 0.2)
    assert loss == 0 and all(m == 0 for m in metrics.values())
    low = jnp.asarray(logp, jnp.bfloat16)
    assert all(m.dtype == jnp.float32 for m in run(low, low, low, mask, 0.2)[1].values())
    for args, error, name in (
        ((logp.astype(int), old_logp, advantage, mask, 0.2), TypeError, "logp_BxT"),
        ((logp, old_logp, advantage.astype(int), mask, 0.2), TypeError, "advantage_BxT"),
        ((logp, old_logp, advantage, mask.astype(int), 0.2), TypeError, "mask_BxT"),
        ((logp, old_logp[:1], advantage, mask, 0.2), ValueError, "old_logp_BxT"),
        ((logp, old_logp, advantage, mask, None), TypeError, "clip_range"),
    ):
        with pytest.raises(error, match=name):
            run(*args)


def test_rows_without_slots_have_no_loss():
    nothing = np.zeros((2, 0), np.float32)
    loss, metrics = surrogate.clipped_policy_loss(
        nothing, nothing, nothing, np.zeros((2, 0), bool), 0.2
    )
    assert float(loss) == 0.0 and all(np.isfinite(float(value)) for value in metrics.values())
