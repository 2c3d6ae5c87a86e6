from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.losses import value


def draw(seed, shape=(3, 4)) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape).astype(np.float32) for _ in range(3)]
    return *arrays, rng.random(shape) < 0.7


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 0.0, 0.2, 1.0]))
def test_equals_a_loop_in_loss_and_metrics(seed, clip_range):
    args = draw(seed)
    loss, metrics = value.clipped_value_loss(*args, clip_range)
    expected = oracles.clipped_value_loss(*args, clip_range)
    assert metrics.keys() == expected.keys()
    assert metrics["loss"] == loss
    for name, number in expected.items():
        # 1 - error / var amplifies rounding where two returns almost coincide.
        np.testing.assert_allclose(metrics[name], number, rtol=1e-4, atol=1e-5, err_msg=name)


def test_golden():
    # Old values 0, returns 1, c = 0.2. V = 0.5: max(.25, .64); V = 0.1: .81; V = -1: max(4, 1.44)
    v = np.array([[0.5, 0.1, -1.0]], np.float32)
    old, returns, mask = np.zeros_like(v), np.ones_like(v), np.ones((1, 3), bool)
    loss, metrics = value.clipped_value_loss(v, old, returns, mask, 0.2)
    np.testing.assert_allclose(loss, 0.5 * (0.64 + 0.81 + 4.0) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["error"], (0.25 + 0.81 + 4.0) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["clipfrac"], 1 / 3, rtol=1e-6)
    assert metrics["var_explained"] == 0  # the returns do not vary
    loss, metrics = value.clipped_value_loss(v, old, returns, mask, None)
    np.testing.assert_allclose(loss, 0.5 * (0.25 + 0.81 + 4.0) / 3, rtol=1e-6)
    assert metrics["clipfrac"] == 0


def test_clipping_never_lowers_the_loss_and_a_wide_range_is_none():
    args = draw(1)
    free = value.clipped_value_loss(*args, None)[0]
    assert value.clipped_value_loss(*args, 0.2)[0] >= free
    assert value.clipped_value_loss(*args, 100.0)[0] == free
    # Zero is a range, not "no range".
    old = value.clipped_value_loss(args[1], *args[1:], None)[0]
    assert value.clipped_value_loss(*args, 0.0)[0] >= max(old, free)


def test_perfect_and_mean_predictions():
    _, old, returns, _ = draw(2)
    mask = np.ones(returns.shape, bool)
    assert value.clipped_value_loss(returns, old, returns, mask, None)[1]["var_explained"] == 1
    constant = np.full_like(returns, returns.mean())
    explained = value.clipped_value_loss(constant, old, returns, mask, None)[1]["var_explained"]
    np.testing.assert_allclose(explained, 0.0, atol=1e-5)


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_gradient_equals_finite_differences_of_the_oracle(clip_range):
    v, old, returns, mask = draw(3)
    v, old, returns = (a.astype(np.float64) for a in (v, old, returns))
    with jax.enable_x64(True):
        grad = jax.grad(lambda x: value.clipped_value_loss(x, old, returns, mask, clip_range)[0])(
            jnp.asarray(v)
        )
    expected = oracles.central_difference(
        lambda x: oracles.clipped_value_loss(x, old, returns, mask, clip_range)["loss"], v
    )
    np.testing.assert_allclose(grad, expected, atol=1e-8)


def test_the_rollout_is_frozen():
    v, old, returns, mask = draw(4)
    grads = jax.grad(
        lambda old, returns: value.clipped_value_loss(v, old, returns, mask, 0.2)[0], argnums=(0, 1)
    )(jnp.asarray(old), jnp.asarray(returns))
    assert not any(np.any(g) for g in grads)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_outside_the_mask_nothing_counts(junk):
    *arrays, mask = draw(5)
    value_and_grad = jax.value_and_grad(
        lambda v, old, r: value.clipped_value_loss(v, old, r, mask, 0.2), has_aux=True
    )
    clean = value_and_grad(*map(jnp.asarray, arrays))
    dirty = value_and_grad(*(jnp.asarray(np.where(mask, a, np.float32(junk))) for a in arrays))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_microbatches_add_up():
    v, old, returns, mask = draw(6)

    def metrics(rows, normalizer):
        row_args = v[rows], old[rows], returns[rows], mask[rows]
        return value.clipped_value_loss(*row_args, 0.2, normalizer)[1]

    whole = metrics(slice(None), None)
    parts = [metrics(slice(i, i + 1), mask.sum()) for i in range(3)]
    for name in ("loss", "error", "clipfrac", "vpred"):
        np.testing.assert_allclose(sum(p[name] for p in parts), whole[name], rtol=1e-5)


def test_a_float64_clip_range_gives_what_its_float32_rounding_gives():
    arguments = draw(8, (8, 16))
    with jax.enable_x64(True):
        wide = value.clipped_value_loss(*arguments, np.float64(0.3))
        narrow = value.clipped_value_loss(*arguments, np.float32(0.3))
    jax.tree.map(np.testing.assert_array_equal, wide, narrow)


def test_empty_dtypes_and_door():
    v, old, returns, mask = draw(7)
    run = value.clipped_value_loss
    loss, metrics = run(v, old, returns, np.zeros_like(mask), 0.2)
    assert loss == 0 and all(m == 0 for m in metrics.values())
    low = jnp.asarray(v, jnp.bfloat16)
    assert all(m.dtype == jnp.float32 for m in run(low, low, low, mask, 0.2)[1].values())
    with jax.enable_x64(True):
        wide = v.astype(np.float64)
        assert run(wide, wide, wide, mask, 0.2)[0].dtype == jnp.float64
    for args, error, name in (
        ((v.astype(int), old, returns, mask, 0.2), TypeError, "value_BxT"),
        ((v, old, returns.astype(int), mask, 0.2), TypeError, "return_BxT"),
        ((v, old, returns, mask.astype(int), 0.2), TypeError, "mask_BxT"),
        ((v, old[:1], returns, mask, 0.2), ValueError, "old_value_BxT"),
        ((v, old, returns, mask, "0.2"), TypeError, "clip_range"),
    ):
        with pytest.raises(error, match=name):
            run(*args)
