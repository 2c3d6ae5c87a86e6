from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax import masking

SEEDS = st.integers(0, 2**31)


def draw(seed, shape=(3, 5)) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape).astype(np.float32)
    return x, rng.random(shape) < rng.random()


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_reductions_equal_loops(seed):
    x, mask = draw(seed)
    np.testing.assert_allclose(
        masking.masked_mean(x, mask), oracles.masked_mean(x, mask), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        masking.masked_var(x, mask), oracles.masked_var(x, mask), rtol=1e-5, atol=1e-6
    )
    for shift_mean in (True, False):
        np.testing.assert_allclose(
            masking.whiten(x, mask, shift_mean),
            oracles.whiten(x, mask, shift_mean),
            rtol=1e-4,
            atol=1e-4,
        )


def test_normalizer_makes_shards_add_up():
    x, mask = draw(1)
    n = mask.sum()
    parts = [masking.masked_mean(x[i : i + 1], mask[i : i + 1], n) for i in range(3)]
    np.testing.assert_allclose(sum(parts), masking.masked_mean(x, mask), rtol=1e-6)
    assert masking.masked_mean(x, np.zeros_like(mask), 0) == 0


def test_any_rank_and_empty_masks_give_zero():
    for shape in [(), (4,), (2, 3, 2), (0,), (2, 0)]:
        x, mask = np.ones(shape, np.float32), np.zeros(shape, bool)
        assert masking.masked_mean(x, mask) == 0
        assert masking.masked_var(x, mask) == 0
        assert not np.any(masking.whiten(x, mask, False))


def test_whiten_golden():
    # mean 2, biased variance 2/3 over (1, 2, 3); the 9 is padding.
    x = np.array([[1.0, 2.0], [3.0, 9.0]], np.float32)
    mask = np.array([[True, True], [True, False]])
    np.testing.assert_allclose(
        masking.whiten(x, mask, True), [[-1.2247449, 0.0], [1.2247449, 0.0]], rtol=1e-6
    )
    np.testing.assert_allclose(
        masking.whiten(x, mask, False), [[0.7752551, 2.0], [3.2247449, 0.0]], rtol=1e-6
    )


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e38])
def test_what_lies_outside_the_mask_is_inert(junk):
    x, mask = draw(2)
    dirty = np.where(mask, x, np.float32(junk))

    def functions(x):
        return (
            masking.masked_sum(x, mask)
            + masking.masked_mean(x, mask)
            + masking.masked_var(x, mask)
            + jnp.sum(masking.whiten(x, mask, False) ** 3)
        )

    clean_value, clean_grad = jax.value_and_grad(functions)(jnp.asarray(x))
    value, grad = jax.value_and_grad(functions)(jnp.asarray(dirty))
    assert value == clean_value
    np.testing.assert_array_equal(grad, clean_grad)
    assert not np.any(np.asarray(grad)[~mask])


def test_a_nan_inside_the_mask_is_not_hidden():
    x, mask = np.array([np.nan, 1.0], np.float32), np.array([True, True])
    assert np.isnan(masking.masked_mean(x, mask))
    assert np.all(np.isnan(masking.whiten(x, mask, True)))


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, mask = np.ones((2, 2)), np.ones((2, 2), bool)
        for out in (masking.masked_mean(x, mask, np.int64(4)), masking.whiten(x, mask, True)):
            assert out.dtype == jnp.float64
    assert masking.whiten(jnp.ones((2, 2), jnp.bfloat16), mask, True).dtype == jnp.float32


def test_last_token_index():
    mask = np.array(
        [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool
    )
    index = masking.last_token_index(mask)
    assert index.dtype == jnp.int32
    assert index.tolist() == [1, 2, 3, 0, 0, 3] == oracles.last_token_index(mask)
    assert masking.last_token_index(np.zeros((2, 0), bool)).tolist() == [0, 0]
    with jax.enable_x64(True):
        assert masking.last_token_index(mask).dtype == jnp.int32


def test_the_door():
    x, mask = draw(3)
    with pytest.raises(TypeError, match="mask must be bool"):
        masking.masked_mean(x, mask.astype(np.int32))
    with pytest.raises(TypeError, match="x must be floating"):
        masking.whiten(np.ones((3, 5), np.int32), mask, True)
    with pytest.raises(ValueError, match="mask has shape"):
        masking.masked_mean(x, mask[:1])
    with pytest.raises(ValueError, match="mask_BxT must have rank 2"):
        masking.last_token_index(mask[0])


def test_zero_denominator_has_zero_gradient():
    assert jax.grad(masking.ratio_or_zero, argnums=(0, 1))(1.0, 0.0) == (0.0, 0.0)
