import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instructax.losses.ppo_ptx import combine_gradients


def draw(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(rng.normal(size=(3, 2)), dtype),
        "layers": [jnp.asarray(rng.normal(size=2), dtype), {"bias": jnp.asarray(-0.0, dtype)}],
    }


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("gamma", [27.8, 1, 0.0, -0.5, np.float64(2.0), np.float32(3.0)])
def test_sum_norms_and_cosine(gamma):
    ppo, ptx = draw(0), draw(1)
    grads, metrics = combine_gradients(ppo, ptx, gamma)
    a, b = flat(ppo), flat(ptx)
    np.testing.assert_allclose(flat(grads), a + float(gamma) * b, rtol=1e-5)
    norm = np.linalg.norm
    np.testing.assert_allclose(metrics["ppo_grad_norm"], norm(a), rtol=1e-6)
    np.testing.assert_allclose(metrics["ptx_grad_norm"], norm(b), rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm(a + float(gamma) * b), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_cosine"], a @ b / norm(a) / norm(b), rtol=1e-5)
    assert all(m.dtype == jnp.float32 for m in metrics.values())


@pytest.mark.parametrize("junk", [1.0, np.nan, np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gamma_zero_is_ppo_bit_for_bit(junk, dtype):
    ppo = draw(2, dtype)
    ptx = jax.tree.map(lambda x: x * 0 + junk, ppo)
    for gamma in (0.0, 0, jnp.float32(0.0)):
        for run in (combine_gradients, jax.jit(combine_gradients)):
            grads, metrics = run(ppo, ptx, gamma)
            assert bits(grads) == bits(ppo)
            assert metrics["grad_norm"] == metrics["ppo_grad_norm"]
    static = jax.jit(lambda a, b: combine_gradients(a, b, 0.0)[0])(ppo, ptx)
    assert bits(static) == bits(ppo)
    assert jax.tree.map(jnp.result_type, static) == jax.tree.map(jnp.result_type, ppo)


def test_a_nan_counts_where_gamma_is_not_zero():
    ppo = draw(3)
    grads, _ = combine_gradients(ppo, jax.tree.map(lambda x: x * jnp.nan, ppo), 1e-9)
    assert np.all(np.isnan(flat(grads)))


def test_it_is_the_gradient_of_the_summed_loss():
    x = jnp.asarray([0.3, -1.2, 2.0])

    def ppo_loss(x):
        return jnp.sum(jnp.sin(x))

    def ptx_loss(x):
        return jnp.sum(x**2)

    combined, _ = combine_gradients(jax.grad(ppo_loss)(x), jax.grad(ptx_loss)(x), 27.8)
    whole = jax.grad(lambda x: ppo_loss(x) + 27.8 * ptx_loss(x))(x)
    np.testing.assert_allclose(combined, whole, rtol=1e-6)


def test_gamma_acts_through_one_clipped_step():
    # The two objectives pull along different axes. With a step of its own, clipped, each moves its
    # axis equally far whatever gamma is; summed before the one step, gamma sets the proportion.
    ppo, ptx = jnp.asarray([3.0, 0.0]), jnp.asarray([0.0, 2.0])
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(1.0))

    def proportion(gamma):
        grads, _ = combine_gradients(ppo, ptx, gamma)
        moved, _ = optimizer.update(grads, optimizer.init(ppo))
        return float(moved[0] / moved[1])

    np.testing.assert_allclose(proportion(1.0), 1.5, rtol=1e-5)
    np.testing.assert_allclose(proportion(27.8), 1.5 / 27.8, rtol=1e-5)


def test_zero_gradients_have_cosine_zero_and_tiny_or_huge_ones_a_true_one():
    zero = jax.tree.map(jnp.zeros_like, draw(4))
    assert combine_gradients(zero, draw(4), 1.0)[1]["grad_cosine"] == 0
    assert combine_gradients(draw(4), zero, 1.0)[1]["grad_cosine"] == 0
    for scale in (1e-12, 1e12):
        ppo = jax.tree.map(lambda x, s=scale: s * x, draw(4))
        for sign in (1.0, -1.0):
            ptx = jax.tree.map(lambda x, s=sign: s * x, ppo)
            np.testing.assert_allclose(
                combine_gradients(ppo, ptx, 1.0)[1]["grad_cosine"], sign, rtol=1e-5
            )


def test_a_cosine_stays_in_its_range_where_rounding_would_leave_it():
    ones = {"x": jnp.ones(3)}
    norm = np.sqrt(np.float32(3))
    assert np.float32(3) / norm / norm > 1
    assert combine_gradients(ones, ones, 1.0)[1]["grad_cosine"] == 1.0
    assert combine_gradients(ones, {"x": -jnp.ones(3)}, 1.0)[1]["grad_cosine"] == -1.0


def test_a_float64_gamma_gives_what_its_float32_rounding_gives():
    ppo, ptx = draw(6), draw(7)
    with jax.enable_x64(True):
        wide, narrow = (
            combine_gradients(ppo, ptx, gamma(27.8))[0] for gamma in (np.float64, np.float32)
        )
    assert bits(wide) == bits(narrow)


def test_the_door():
    ppo = draw(5)
    with pytest.raises(ValueError, match="ptx_grads"):
        combine_gradients(ppo, {"kernel": ppo["kernel"]}, 1.0)
    with pytest.raises(ValueError, match=r"ptx_grads\['kernel'\] has shape"):
        combine_gradients(ppo, {**ppo, "kernel": jnp.zeros((1, 2))}, 1.0)
    with pytest.raises(TypeError, match=r"ppo_grads\['kernel'\]"):
        combine_gradients({**ppo, "kernel": jnp.zeros((3, 2), jnp.int32)}, ppo, 1.0)
    with pytest.raises(TypeError, match="ptx_coef"):
        combine_gradients(ppo, ppo, None)
