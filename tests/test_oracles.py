"""The package in 64-bit mode against the oracles: values to 1e-10, gradients to finite differences.

In float64 nothing is left to tolerance: a constant that is off by 1e-8 shows. How far float32 and
bfloat16 are off is measured in docs/numerics.md.
"""

from __future__ import annotations

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle_model
import oracles
import pytest
import tiny
import traps

from instructax import batches, masking
from instructax.batches import LmBatch, Responses, padded_layout
from instructax.config import ModelConfig, OptimizerConfig, PpoConfig
from instructax.losses.ppo_ptx import combine_gradients
from instructax.models import functional as model
from instructax.rl.kl import ADAPTIVE_ERROR_LIMIT, adaptive_kl_update
from instructax.steps import ppo, rollout
from instructax.steps.optimizer import make_optimizer
from instructax.steps.state import PpoState, create, move_average

SHAPE = (4, 5)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_values_equal_the_oracles_in_float64(case):
    for seed in range(4):
        arguments = case.draw(np.random.default_rng(seed), SHAPE)
        with jax.enable_x64(True):
            out = case.run(*arguments)
            expected = case.oracle(*arguments)  # some ask the package which token it drew
        assert _names(out) == _names(expected)
        got, expected = case.leaves(out), case.leaves(expected)
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape and a.dtype.kind == b.dtype.kind
            if a.dtype != bool and np.issubdtype(a.dtype, np.floating):
                tolerance = {"rtol": case.tolerance, "atol": case.tolerance}
                np.testing.assert_allclose(a, b, **tolerance, err_msg=case.name)
                if case.tolerance == 1e-10:
                    assert a.dtype == np.float64
            else:
                np.testing.assert_array_equal(a, b)


def _names(tree):
    """The names of metrics, wherever there are some."""
    return [
        key.key
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
        for key in path
        if hasattr(key, "key")
    ]


DIFFERENTIABLE = [case for case in cases.CASES if case.wrt]


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_gradients_equal_finite_differences_of_the_oracles(case):
    """Of a fixed random projection of all outputs, so that every entry's gradient counts."""
    rng = np.random.default_rng(7)
    arguments = case.draw(rng, (3, 4))
    weights = [rng.normal(size=x.shape) for x in case.expected(*arguments)]

    def projected(outputs):
        return sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))

    for i in case.wrt:

        def of(x, function, i=i):
            changed = [*arguments[:i], x, *arguments[i + 1 :]]
            return projected(jax.tree.leaves(function(*changed)))

        with jax.enable_x64(True):
            grad = jax.grad(lambda x, of=of: of(x, case.run))(jnp.asarray(arguments[i]))
            assert grad.dtype == jnp.float64
        expected = oracles.central_difference(
            lambda x, of=of: of(x, lambda *a: [np.asarray(y) for y in case.expected(*a)]),
            arguments[i],
        )
        np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-7, err_msg=f"argument {i}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_float32_and_bfloat16_inputs_are_computed_in_float32(case, dtype):
    """The oracle reads the rounded numbers, so that the arithmetic's own error is left."""
    arguments = case.draw(np.random.default_rng(1), SHAPE)
    if dtype == jnp.bfloat16 and not case.wrt:
        return
    rounded = [jnp.asarray(a, dtype) if a.dtype.kind == "f" else a for a in arguments]
    exact = [np.asarray(a, np.float64) if a.dtype == dtype else a for a in rounded]
    for a, b in zip(case.outputs(*rounded), case.expected(*exact), strict=True):
        assert a.dtype.kind == b.dtype.kind
        if b.dtype.kind == "f":
            assert a.dtype == np.float32
            np.testing.assert_allclose(a, b, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_float32_stays_float32_in_64_bit_mode(case):
    """Coefficients and counts in float64 do not raise the precision of a float32 loss."""
    arguments = case.draw(np.random.default_rng(2), SHAPE)
    narrow = [a.astype(np.float32) if a.dtype.kind == "f" else a for a in arguments]
    with jax.enable_x64(True):
        got = case.outputs(*narrow)
    if case.name != "learning_rate":  # a function of the step alone
        assert all(x.dtype == np.float32 for x in got if x.dtype.kind == "f")


def test_norms_of_gradients_are_float32_whatever_comes_in():
    with jax.enable_x64(True):
        for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
            grads = {"x": jnp.full((4000,), 1.01, dtype), "y": jnp.full((), -0.5, dtype)}
            got, metrics = combine_gradients(grads, grads, 0.5)
            assert all(x.dtype == dtype for x in jax.tree.leaves(got))
            assert all(x.dtype == jnp.float32 for x in metrics.values())
            flat = np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in grads.values()])
            for name in ("ppo_grad_norm", "ptx_grad_norm"):
                np.testing.assert_allclose(metrics[name], np.linalg.norm(flat), rtol=1e-5)
    nothing, metrics = combine_gradients({}, {}, 1.0)
    assert nothing == {} and all(m == 0 and m.dtype == jnp.float32 for m in metrics.values())


def test_the_controllers_precision_is_that_of_beta():
    with jax.enable_x64(True):
        for beta in (0.1, np.float32(0.1), jnp.float32(0.1)):
            got = adaptive_kl_update(beta, *map(np.float64, (1, 6, 8, 100)))
            assert got.dtype == jnp.float32
        assert adaptive_kl_update(np.float64(0.1), 1, 6, 8, 100).dtype == jnp.float64


def test_constants_are_those_of_the_papers():
    assert masking.LOG_RATIO_LIMIT == 20.0 and masking.WHITEN_EPSILON == 1e-8
    assert ADAPTIVE_ERROR_LIMIT == 0.2


def test_padded_layout_equals_a_walk_along_each_row():
    rng = np.random.default_rng(0)
    token, mask = rng.integers(0, 9, (6, 8)).astype(np.int32), rng.random((6, 8)) < 0.6
    layout = batches.padded_layout(token, mask)
    got = layout.token_BxL, layout.position_BxL, layout.segment_BxL, layout.prefix_BxL
    np.testing.assert_array_equal(got, oracles.padded_layout(token, mask))


# --- the transformer, scoring and a whole update

NETWORK = ModelConfig(
    num_layers=2, d_model=4, num_heads=2, d_ff=6, vocab_size=7, vocab_multiple=4,
    context_length=9, remat="none",
)  # fmt: skip


def network(seed: int, head: str):
    """Parameters in NumPy, none at a neutral value; the oracles read them as float64."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), NETWORK, head))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return (centre + 0.5 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def wide(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def as_tuple(layout):
    names = ("token_BxL", "position_BxL", "segment_BxL", "prefix_BxL")
    return tuple(np.asarray(getattr(layout, name)) for name in names)


def shared_prompt_layout() -> batches.Layout:
    """Two prompts in a row, three responses, padding between, and a left-padded row."""
    segment = np.array([[1, 1, 1, 2, 2, 3, 0, 4, 4, 5], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    prefix = np.array([[0, 0, 0, 1, 1, 1, 0, 0, 0, 4], [0] * 10], np.int32)
    position = np.array([[0, 1, 2, 3, 4, 3, 0, 0, 1, 2], [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]], np.int32)
    return batches.Layout(tiny.tokens(2, 10, seed=1) % 7, position, segment, prefix)


def test_the_transformer_equals_the_oracles_slot_by_slot():
    layout, lm, scalar = shared_prompt_layout(), network(0, "lm"), network(1, "scalar")

    @jax.jit
    def run(lm, scalar, layout):
        statistics = model.token_statistics(lm, NETWORK, layout, temperature=0.7)
        logp = model.token_logprobs(lm, NETWORK, layout, temperature=0.7)
        return logp, statistics, model.scalars(scalar, NETWORK, layout)

    logp, statistics, value = run(lm, scalar, layout)
    expected = oracle_model.token_statistics(wide(lm), as_tuple(layout), 7, 0.7)
    np.testing.assert_allclose(statistics["logp"], expected[0], atol=5e-6)
    np.testing.assert_allclose(logp, expected[0], atol=5e-6)
    np.testing.assert_allclose(statistics["entropy"], expected[1], atol=5e-6)
    expected = oracle_model.scalars(wide(scalar), as_tuple(layout))
    np.testing.assert_allclose(value, expected, atol=5e-6)


SETTINGS = {
    "vocab_size": 7, "temperature": 0.7, "kl_coef": 0.3, "discount": 0.9, "gae_lambda": 0.8,
    "clip_range": 0.2, "value_clip_range": 0.3, "ptx_coef": 2.0, "max_grad_norm": 1.0,
    "rate": 0.05, "eps": 1e-2,
}  # fmt: skip
PPO = PpoConfig(
    temperature=0.7, discount=0.9, gae_lambda=0.8, clip_range=0.2, value_clip_range=0.3,
    ptx_coef=2.0, ema_decay=0.9, ema_every="update",
)  # fmt: skip
# A large epsilon: Adam would turn the rounding of gradients that are 0 into whole steps.
ADAM = OptimizerConfig(learning_rate=0.05, schedule="constant", eps=1e-2, max_grad_norm=1.0)


def test_one_ppo_ptx_update_of_a_two_layer_model_equals_the_oracles():
    """Scores, KL, rewards, advantages, both losses, clipping, Adam and the average, from tokens on."""
    prompts = tiny.prompts((3, 1), 3)
    prompts = dataclasses.replace(prompts, token_BxP=prompts.token_BxP % 7)
    mask_BxT = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool)
    responses = Responses(
        np.where(mask_BxT, tiny.tokens(2, 4, seed=6) % 7, 0).astype(np.int32), mask_BxT,
        np.zeros((2, 4), np.float32), np.array([1, 0], np.int32),
    )  # fmt: skip
    reference, text_token = network(3, "lm"), tiny.tokens(2, 6, seed=5) % 7
    text_mask = np.array([[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]], bool)
    text_layout = padded_layout(text_token, np.array([[1] * 6, [1] * 4 + [0] * 2], bool))
    value, reward = network(4, "scalar"), network(5, "scalar")

    def near(params, seed):
        other = network(seed, "lm" if "value_head" not in params else "scalar")
        return jax.tree.map(lambda a, b: (a + 0.15 * b).astype(np.float32), params, other)

    policy = near(reference, 6)
    score = functools.partial(
        rollout.score_rollout, config=PPO, model_config=NETWORK, reward_config=NETWORK, eos_id=2
    )
    episodes, metrics, per_episode = jax.jit(score)(
        policy, reference, value, reward, prompts, responses, jnp.float32(0.3), jax.random.key(0)
    )
    layout, mask = as_tuple(episodes.layout), np.asarray(episodes.mask_BxL)
    frozen = oracle_model.rollout(
        *(wide(p) for p in (policy, reference, value, reward)), layout, mask, [5, 6],
        [True, False], SETTINGS,
    )  # fmt: skip
    names = ("old_logp_BxL", "old_value_BxL", "advantage_BxL", "return_BxL")
    for name, expected in zip(names, frozen, strict=False):
        np.testing.assert_allclose(getattr(episodes, name), expected, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(per_episode["score"], frozen[4], atol=5e-6)
    np.testing.assert_allclose(per_episode["kl"], frozen[5], atol=1e-5)
    assert float(metrics["objective/kl"]) == pytest.approx(np.mean(frozen[5]), abs=1e-5)

    # Both networks have moved since the rollout, so that both clips act.
    policy, value = near(policy, 7), near(value, 8)
    optimizer = make_optimizer(ADAM, 10)
    state = PpoState(
        create(policy, optimizer), create(value, optimizer), reference, jnp.float32(0.3),
        jnp.int32(0),
    )  # fmt: skip
    update = functools.partial(
        ppo.ppo_update, config=PPO, model_config=NETWORK, reward_config=NETWORK,
        policy_optimizer=optimizer, value_optimizer=optimizer,
    )  # fmt: skip
    text = LmBatch(text_layout, text_mask.astype(np.float32))
    after, metrics = jax.jit(update)(state, episodes, text)
    expected_policy, expected_value, expected = oracle_model.ppo_ptx_update(
        wide(policy), wide(value), frozen, layout, mask, as_tuple(text_layout), text_mask, SETTINGS
    )
    assert 0 < expected["ppo/policy/clipfrac"] < 1 and 0 < expected["ppo/val/clipfrac"] < 1
    for name, number in expected.items():
        assert float(metrics[name]) == pytest.approx(number, rel=1e-4, abs=1e-5), name
    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    jax.tree.map(close, after.policy.params, expected_policy)
    jax.tree.map(close, after.value.params, expected_value)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after.policy.params, policy)
    assert moved["blocks"]["attn"]["k"].pop("bias") < 1e-5  # it cancels in every softmax
    assert min(jax.tree.leaves(moved)) > 1e-4, "every other array of the policy has moved"
    average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, wide(reference), expected_policy)
    jax.tree.map(close, after.ema, average)


def test_scoring_on_the_bigram_model_equals_the_oracles():
    """Stop tokens, cut responses and left padding, with every option of the reward at once."""
    config = PpoConfig(
        temperature=0.6, discount=0.9, gae_lambda=0.7, whiten_rewards=True, kl_estimator="k3",
        missing_eos="subtract", missing_eos_value=0.4,
    )  # fmt: skip
    got, metrics, per_episode = traps.scored(config, kl_coef=0.5)
    finished = traps.STOP_B != traps.CUT
    score = oracles.apply_missing_eos(traps.reward_model_scores(), finished, "subtract", 0.4)
    np.testing.assert_allclose(per_episode["score"], score, rtol=1e-6)
    mask, token = traps.MASK_BxL, traps.TOKEN_BxL
    logp, ref_logp, value = np.zeros((3, *mask.shape))
    for b, t in np.argwhere(mask):
        before = token[b, t - 1]
        for params, into in ((traps.POLICY(), logp), (traps.REFERENCE(), ref_logp)):
            p = oracles.next_token_distribution(params["table"][before], 0.6)
            into[b, t] = np.log(p[token[b, t]])
        value[b, t] = traps.VALUE()["value"][before]
    kl = oracles.per_token_kl(logp, ref_logp, mask, "k3")
    reward = oracles.shaped_reward(score, kl, mask, 0.5)
    whitened = oracles.whiten(reward, mask, shift_mean=False)
    advantage, returns = oracles.generalized_advantage(whitened, value, mask, 0.9, 0.7)
    np.testing.assert_allclose(got.return_BxL, returns, atol=1e-5)
    np.testing.assert_allclose(
        got.advantage_BxL, oracles.whiten(advantage, mask, shift_mean=True), atol=1e-5
    )
    k1 = np.where(mask, logp - ref_logp, 0.0).sum(1)
    for name, number in {
        "objective/kl": k1.mean(),
        "objective/score": np.mean(score),
        "objective/score_total": reward.sum(1).mean(),
        "objective/non_score_reward": (reward.sum(1) - score).mean(),
        "objective/kl_coef": 0.5,
        "val/num_eos_tokens": 3,
        "response_length/mean": mask.sum(1).mean(),
        "response_length/clip_ratio": 0.25,
    }.items():
        assert float(metrics[name]) == pytest.approx(number, abs=1e-5), name


def test_the_average_after_many_steps_is_the_weighted_sum_of_all():
    values = np.random.default_rng(0).normal(size=30)
    ema = {"x": jnp.zeros(())}
    for value in values:
        ema = move_average(ema, {"x": jnp.float32(value)}, 0.9)
    weights = 0.1 * 0.9 ** np.arange(29, -1, -1)
    np.testing.assert_allclose(ema["x"], weights @ values, atol=1e-6)
