from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.losses import language


def draw(seed, shape=(3, 4)) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    logp = -rng.exponential(size=shape).astype(np.float32)
    return logp, rng.random(shape) < 0.7, rng.random(shape).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_equals_a_loop(seed):
    logp, mask, weight = draw(seed)
    loss, metrics = language.masked_nll(logp, mask)
    np.testing.assert_allclose(loss, oracles.masked_nll(logp, mask), rtol=1e-5)
    assert metrics["tokens"] == mask.sum()
    loss, metrics = language.masked_nll(logp, mask, weight_BxT=weight)
    np.testing.assert_allclose(loss, oracles.masked_nll(logp, mask, weight), rtol=1e-5)
    np.testing.assert_allclose(metrics["nll"], oracles.masked_nll(logp, mask), rtol=1e-5)


def test_golden_mean_over_tokens_and_sum_over_sequences():
    logp = np.array([[-1.0, -2.0], [-6.0, -5.0]], np.float32)
    mask = np.array([[True, True], [True, False]])
    assert language.masked_nll(logp, mask)[0] == 3.0
    loss, metrics = language.masked_nll(logp, mask, normalizer=2)
    assert loss == 4.5
    assert metrics["nll"] == 3.0 and metrics["loss"] == 4.5


def test_microbatches_add_up_in_loss_and_gradient():
    logp, mask, weight = draw(0)
    n = float((weight * mask).sum())

    def loss(x, rows, normalizer):
        return language.masked_nll(x[rows], mask[rows], normalizer, weight_BxT=weight[rows])[0]

    whole = jax.value_and_grad(loss)(jnp.asarray(logp), slice(0, 3), None)
    parts = [jax.value_and_grad(loss)(jnp.asarray(logp), slice(i, i + 1), n) for i in range(3)]
    np.testing.assert_allclose(sum(p[0] for p in parts), whole[0], rtol=1e-6)
    np.testing.assert_allclose(sum(p[1] for p in parts), whole[1], rtol=1e-6)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_outside_the_mask_or_at_weight_zero_nothing_counts(junk):
    logp, mask, weight = draw(4)
    weight[0] = 0.0
    real = mask & (weight != 0)

    def loss(x, weight):
        return language.masked_nll(x, mask, weight_BxT=weight)[0]

    clean = jax.value_and_grad(loss)(jnp.asarray(logp), jnp.asarray(weight))
    dirty = jax.value_and_grad(loss)(
        jnp.asarray(np.where(real, logp, junk)), jnp.asarray(np.where(mask, weight, junk))
    )
    assert clean[0] == dirty[0]
    np.testing.assert_array_equal(clean[1], dirty[1])
    unweighted = jax.grad(lambda x: language.masked_nll(x, mask)[0])
    assert np.all(np.isfinite(unweighted(jnp.asarray(np.where(mask, logp, junk)))))


def test_gradient_is_minus_one_over_n():
    logp, mask, _ = draw(5)
    grad = jax.grad(lambda x: language.masked_nll(x, mask)[0])(jnp.asarray(logp))
    np.testing.assert_allclose(grad, -1.0 * mask / mask.sum(), rtol=1e-6)


def test_empty_and_dtypes_and_door():
    logp, mask, _ = draw(6)
    assert language.masked_nll(logp, np.zeros_like(mask))[0] == 0
    loss, metrics = language.masked_nll(jnp.asarray(logp, jnp.bfloat16), mask)
    assert loss.dtype == metrics["nll"].dtype == metrics["tokens"].dtype == jnp.float32
    with jax.enable_x64(True):
        assert language.masked_nll(logp.astype(np.float64), mask)[0].dtype == jnp.float64
    with pytest.raises(TypeError, match="logp_BxT"):
        language.masked_nll(np.zeros((3, 4), np.int32), mask)
    with pytest.raises(TypeError, match="mask_BxT"):
        language.masked_nll(logp, mask.astype(np.float32))
    with pytest.raises(ValueError, match="weight_BxT"):
        language.masked_nll(logp, mask, weight_BxT=logp[:1])
