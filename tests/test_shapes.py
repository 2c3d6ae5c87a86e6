import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax import shapes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_floating_inputs_become_float32(dtype):
    assert shapes.float_array("x", np.ones((2,), dtype)).dtype == jnp.float32


def test_float64_stays_where_jax_has_it():
    with jax.enable_x64(True):
        assert shapes.float_array("x", np.ones((2,))).dtype == jnp.float64
    assert shapes.float_array("x", np.ones((2,))).dtype == jnp.float32


@pytest.mark.parametrize("value", [np.ones((2,), np.int32), np.ones((2,), bool), 1, 0.5, [0.5]])
def test_what_is_no_floating_array_is_refused_by_name(value):
    with pytest.raises(TypeError, match="score_B"):
        shapes.float_array("score_B", value)


def test_masks_are_bool_and_ranks_integers():
    for value in (np.ones((2,), np.int32), np.ones((2,), np.float32)):
        with pytest.raises(TypeError, match="mask_B must be bool"):
            shapes.bool_array("mask_B", value)
    for dtype in (np.float32, bool):
        with pytest.raises(TypeError, match="rank_B must be integer"):
            shapes.int_array("rank_B", np.ones((2,), dtype))
    assert shapes.int_array("rank_B", np.full((1,), 2**40)).item() == 2**40


def test_rank_and_shape_are_checked_by_name():
    with pytest.raises(ValueError, match=r"logp_BxT must have rank 2, got shape \(3,\)"):
        shapes.float_array("logp_BxT", np.ones((3,), np.float32), 2)
    with pytest.raises(ValueError, match=r"b has shape \(3,\), but a has shape \(2,\)"):
        shapes.same_shape(a=np.ones(2), b=np.ones(3))


def test_scalars():
    assert shapes.scalar("c", 0, jnp.float32) == 0.0
    assert shapes.scalar("c", jnp.int32(3), jnp.float32).dtype == jnp.float32
    with jax.enable_x64(True):
        assert shapes.scalar("c", np.float64(0.2), jnp.float32).dtype == jnp.float32
    for wrong in (True, "0.2", None, np.array(True), [0.2]):
        with pytest.raises(TypeError, match="kl_coef must be a real number"):
            shapes.scalar("kl_coef", wrong, jnp.float32)
    with pytest.raises(ValueError, match="kl_coef must be a scalar"):
        shapes.scalar("kl_coef", np.ones(1), jnp.float32)


def test_only_typed_keys_are_keys():
    assert shapes.key_array("key", jax.random.key(0), 0).shape == ()
    with pytest.raises(TypeError, match="key must be a typed random key"):
        shapes.key_array("key", jax.random.PRNGKey(0), 1)
