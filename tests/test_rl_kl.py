from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.rl import kl


def draw(seed, shape=(3, 4)) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    logp, ref_logp = (-rng.exponential(size=shape).astype(np.float32) for _ in range(2))
    return logp, ref_logp, rng.random(shape) < 0.7


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(kl.ESTIMATORS))
def test_equals_a_loop(seed, estimator):
    args = draw(seed)
    np.testing.assert_allclose(
        kl.per_token_kl(*args, estimator),
        oracles.per_token_kl(*args, estimator),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_default_is_signed_and_summed_is_the_sequence_log_ratio():
    logp, ref_logp, mask = draw(1)
    out = kl.per_token_kl(logp, ref_logp, mask)
    np.testing.assert_array_equal(out, kl.per_token_kl(logp, ref_logp, mask, "k1"))
    np.testing.assert_array_equal(out, -kl.per_token_kl(ref_logp, logp, mask))
    assert np.any(np.asarray(out) < 0)
    expected = (logp * mask).sum(1) - (ref_logp * mask).sum(1)
    np.testing.assert_allclose(np.sum(out, axis=1), expected, rtol=1e-5)


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative():
    # Expectations over all tokens of one step, weighted by pi: exact, no sampling.
    rng = np.random.default_rng(0)
    logp, ref_logp = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(1, 50)))) for _ in range(2))
    mask, p = np.ones((1, 50), bool), jnp.exp(logp)
    truth = float(jnp.sum(p * (logp - ref_logp)))
    for estimator in ("k1", "k3"):
        estimate = float(jnp.sum(p * kl.per_token_kl(logp, ref_logp, mask, estimator)))
        np.testing.assert_allclose(estimate, truth, rtol=1e-5)
    assert np.all(np.asarray(kl.per_token_kl(logp, ref_logp, mask, "k3")) >= -1e-7)
    for estimator in ("abs", "max0"):
        assert float(jnp.sum(p * kl.per_token_kl(logp, ref_logp, mask, estimator))) > truth * 1.05


@pytest.mark.parametrize("estimator", kl.ESTIMATORS)
def test_outside_the_mask_nothing_counts(estimator):
    logp, ref_logp, mask = draw(2)
    nan, nan_ref = (jnp.asarray(np.where(mask, a, np.float32(np.nan))) for a in (logp, ref_logp))

    def total(logp, ref_logp):
        return jnp.sum(kl.per_token_kl(logp, ref_logp, mask, estimator))

    clean = jax.value_and_grad(total)(jnp.asarray(logp), jnp.asarray(ref_logp))
    other = jax.value_and_grad(total)(nan, nan_ref)
    assert clean[0] == other[0]
    np.testing.assert_array_equal(clean[1], other[1])
    assert not np.any(np.asarray(kl.per_token_kl(nan, nan_ref, mask, estimator))[~mask])


def test_k3_stays_finite():
    logp, ref_logp = np.full((1, 1), -900.0, np.float32), np.zeros((1, 1), np.float32)
    assert np.isfinite(kl.per_token_kl(logp, ref_logp, np.ones((1, 1), bool), "k3"))


def test_door_and_dtypes():
    logp, ref_logp, mask = draw(3)
    low = jnp.asarray(logp, jnp.bfloat16)
    assert kl.per_token_kl(low, low, mask).dtype == jnp.float32
    with pytest.raises(ValueError, match="estimator must be one of k1, k2, k3, abs, max0"):
        kl.per_token_kl(logp, ref_logp, mask, "k4")
    with pytest.raises(TypeError, match="ref_logp_BxT"):
        kl.per_token_kl(logp, mask, mask)
    with pytest.raises(ValueError, match="ref_logp_BxT has shape"):
        kl.per_token_kl(logp, ref_logp[:, :1], mask)


@pytest.mark.parametrize("observed", [0.0, 3.0, 5.5, 6.0, 6.6, 7.2, 60.0, -2.0])
def test_adaptive_update_equals_the_formula(observed):
    args = (0.15, observed, 6.0, 512, 10_000)
    np.testing.assert_allclose(
        kl.adaptive_kl_update(*args), oracles.adaptive_kl_update(*args), rtol=1e-6
    )


def test_adaptive_update_laws():
    update = kl.adaptive_kl_update
    assert update(0.15, 6.0, 6.0, 512, 10_000) == jnp.float32(0.15)  # on target: unchanged
    assert update(0.15, 6.5, 6.0, 512, 10_000) > 0.15 > update(0.15, 5.5, 6.0, 512, 10_000)
    np.testing.assert_allclose(update(1.0, 1e9, 6.0, 10_000, 10_000), 1.2, rtol=1e-6)
    assert update(0.0, 60.0, 6.0, 512, 10_000) == 0.0
    jitted = jax.jit(update, static_argnums=(2, 3, 4))
    traced = jitted(jnp.float32(0.15), jnp.float32(9.0), 6, 8, 100)
    np.testing.assert_allclose(traced, 0.15 * (1 + 0.2 * 8 / 100), rtol=1e-6)
    assert traced.dtype == jnp.float32
    with jax.enable_x64(True):
        assert update(jnp.float64(0.1), 1.0, 6.0, 8, 100).dtype == jnp.float64
    with pytest.raises(ValueError, match="observed_kl must be a scalar"):
        update(0.15, np.ones(3), 6.0, 512, 10_000)
