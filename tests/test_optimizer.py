"""Schedule, both placements of Adam's epsilon, decay mask, clip: each against its equation in float64."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest

from instructax.config import OptimizerConfig
from instructax.steps.optimizer import learning_rate, make_optimizer
from instructax.steps.state import apply_gradients, create


def test_cosine_goes_from_the_peak_to_a_tenth():
    rate = learning_rate(OptimizerConfig(learning_rate=2.0), 100)
    assert float(rate(0)) == 2.0
    assert float(rate(100)) == pytest.approx(0.2)
    assert float(rate(50)) == pytest.approx(1.1)
    assert float(rate(25)) == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert float(rate(1000)) == pytest.approx(0.2)


def test_linear_and_constant():
    linear = learning_rate(OptimizerConfig(learning_rate=1.0, schedule="linear"), 10)
    assert [float(linear(s)) for s in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])
    constant = learning_rate(OptimizerConfig(learning_rate=3.0, schedule="constant"), 10)
    assert [float(constant(s)) for s in (0, 9, 99)] == [3.0, 3.0, 3.0]


def test_warm_up_rises_from_a_tenth_and_the_schedule_begins_behind_it():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, warmup_from=0.1)
    rate = learning_rate(config, 110)
    assert [float(rate(s)) for s in (0, 5, 10, 60, 110)] == pytest.approx([0.1, 0.55, 1, 0.55, 0.1])
    from_zero = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=4), 8)
    assert float(from_zero(0)) == 0.0


@pytest.mark.parametrize("inside", [False, True])
def test_adam_keeps_epsilon_where_the_config_says(inside):
    """Trap T18: TensorFlow 1's epsilon joins the uncorrected root; at 1e-5 and small gradients it shows."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", eps=1e-5, eps_inside_correction=inside,
        max_grad_norm=None,
    )  # fmt: skip
    grads = 1e-5 * np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    optimizer = make_optimizer(config, 6)
    state = create({"x": jnp.ones(5)}, optimizer)
    for g in grads:
        state = apply_gradients(state, {"x": jnp.asarray(g)}, optimizer)

    def oracle(inside):
        return oracles.adam(np.ones(5), grads, 0.1, config.b1, config.b2, 1e-5, inside)

    expected = oracle(inside)
    np.testing.assert_allclose(state.params["x"], expected, atol=1e-6)
    assert np.abs(oracle(not inside) - expected).max() > 1e-2
    assert int(state.step) == 6


def test_decay_takes_matrices_and_embeddings_and_leaves_norms_and_biases():
    config = OptimizerConfig(
        learning_rate=0.5, schedule="constant", weight_decay=0.1, max_grad_norm=None
    )
    params = {
        "embed": {"token": jnp.ones(2), "position": jnp.ones(2)},
        "block": {"kernel": jnp.ones(2), "bias": jnp.ones(2), "scale": jnp.ones(2)},
    }
    optimizer = make_optimizer(config, 1)
    zeros = optax.tree_utils.tree_zeros_like(params)
    after = apply_gradients(create(params, optimizer), zeros, optimizer).params
    decayed = {"embed/token", "embed/position", "block/kernel"}
    for group, leaves in after.items():
        for name, leaf in leaves.items():
            expected = 0.95 if f"{group}/{name}" in decayed else 1.0
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=name)


def test_clip_bounds_the_global_norm_before_adam():
    grads = {"a": jnp.asarray([30.0, 0.0]), "b": jnp.asarray([40.0])}
    params = optax.tree_utils.tree_zeros_like(grads)

    def first_moment(limit):
        optimizer = make_optimizer(OptimizerConfig(max_grad_norm=limit), 1)
        state = apply_gradients(create(params, optimizer), grads, optimizer)
        mu = optax.tree_utils.tree_get(state.opt_state, "mu")
        return float(optax.tree_utils.tree_norm(mu)) / (1 - 0.9)

    assert first_moment(1.0) == pytest.approx(1.0, rel=1e-5)
    assert first_moment(100.0) == pytest.approx(50.0, rel=1e-5)
    assert first_moment(None) == pytest.approx(50.0, rel=1e-5)
