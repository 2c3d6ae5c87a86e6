"""Rollout scoring and the PPO-ptx update: what beta, gamma, the EMA and the minibatches do."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from instructax.batches import padded_layout, scored_slots
from instructax.config import OptimizerConfig, PpoConfig
from instructax.losses.ppo_ptx import combine_gradients
from instructax.models import functional as model
from instructax.rl.packing import packed_rows, padded_rows
from instructax.steps import ppo
from instructax.steps.optimizer import make_optimizer
from instructax.steps.ppo import (
    minibatch_order,
    policy_gradients,
    policy_objective,
    ppo_iteration,
    ppo_update,
    ptx_objective,
    value_from_reward,
    value_objective,
)
from instructax.steps.rollout import sample_responses, score_rollout
from instructax.steps.state import PpoState, apply_gradients, create

# Dropout in the config must stay without effect here (trap T7).
MODEL = dataclasses.replace(tiny.MODEL, dropout=0.3)
RATE = OptimizerConfig(learning_rate=1e-2, schedule="constant", eps=1e-4, max_grad_norm=None)
# A large epsilon: some gradients (key biases) are 0 but for rounding, which Adam would blow up.
CONFIG = PpoConfig(
    kl_coef=0.3,
    ptx_coef=2.0,
    batch_size=6,
    minibatch_size=3,
    temperature=0.7,
    missing_eos="none",
    ema_decay=0.9,
)
LENGTHS, WIDTH, RESPONSE = (6, 3, 1, 4, 2, 5), 6, 8
STOPS = (3, 4, 5, 6)
KEY, ORDER = jax.random.key(0), jax.random.key(7)
OPTIMIZER = make_optimizer(RATE, 10)
ORDER_UxM = np.asarray(minibatch_order(ORDER, len(LENGTHS), CONFIG))
PADDED = padded_rows(ORDER_UxM, WIDTH + RESPONSE)


@dataclasses.dataclass(frozen=True)
class World:
    policy: dict
    reference: dict
    value: dict
    reward: dict
    prompts: object
    responses: object
    ptx: object  # two batches, stacked


@pytest.fixture(scope="module")
def w() -> World:
    reference = tiny.params(0)
    noise = tiny.params(1)
    policy = jax.tree.map(lambda p, n: p + 0.1 * n, reference, noise)
    prompts = tiny.prompts(LENGTHS, WIDTH)
    sample = jax.jit(
        functools.partial(
            sample_responses, model_config=MODEL, response_length=RESPONSE,
            temperature=CONFIG.temperature, eos_id=tiny.EOS, pad_id=tiny.PAD, stop_ids=STOPS,
        )
    )  # fmt: skip
    responses = sample(policy, KEY, prompts)
    assert len(set(np.asarray(responses.mask_BxT).sum(1).tolist())) >= 3, "lengths must be mixed"
    ptx = jax.tree.map(lambda *x: np.stack(x), tiny.text(4, 9, seed=50), tiny.text(4, 9, seed=60))
    value, reward = tiny.params(2, "scalar"), tiny.params(3, "scalar")
    return World(policy, reference, value, reward, prompts, responses, ptx)


@functools.cache
def scorer(config: PpoConfig):
    return jax.jit(
        functools.partial(
            score_rollout, config=config, model_config=MODEL, reward_config=MODEL, eos_id=tiny.EOS
        )
    )


def scored(w: World, config: PpoConfig = CONFIG, *, kl_coef: float = 0.3, policy=None):
    return scorer(config)(
        w.policy if policy is None else policy, w.reference, w.value, w.reward, w.prompts,
        w.responses, jnp.float32(kl_coef), KEY,
    )  # fmt: skip


NETWORKS = {
    "model_config": MODEL,
    "reward_config": MODEL,
    "policy_optimizer": OPTIMIZER,
    "value_optimizer": OPTIMIZER,
}


@functools.cache
def iteration(config: PpoConfig):
    return jax.jit(functools.partial(ppo_iteration, config=config, **NETWORKS))


def start(w: World) -> PpoState:
    return PpoState(
        policy=create(w.policy, OPTIMIZER),
        value=create(w.value, OPTIMIZER),
        ema=w.policy,
        kl_coef=jnp.float32(0.3),
        iteration=jnp.int32(0),
    )


def iterated(w: World, *, ptx=None, kl: float = 1.0, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    ptx = w.ptx if ptx is None else ptx
    return iteration(config)(start(w), scored(w)[0], ptx, jnp.float32(kl), PADDED)


def norm(tree) -> float:
    return float(
        np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(tree)))
    )


def minus(a, b):
    return jax.tree.map(jnp.subtract, a, b)


# --- the rollout


@pytest.mark.laws
def test_the_first_ratio_is_one(w):
    """Traps T5, T6, T7, T16 and T20 at once: padded, mixed lengths, a temperature, dropout named."""
    _, metrics = iterated(w)
    assert float(metrics["val/first_ratio_deviation"]) <= 1e-5
    assert float(metrics["val/ratio_max_deviation"]) > 1e-3, "the second minibatch has moved"


@pytest.mark.laws
def test_the_gap_between_sampler_and_rescoring_is_rounding(w):
    assert 0 <= float(scored(w)[1]["val/sampler_gap_max"]) <= 1e-5


@pytest.mark.laws
def test_beta_acts_on_rewards_alone_and_linearly(w):
    """With lambda = discount = 1 returns are sums of rewards: affine in beta, slope minus the KL to come."""
    config = dataclasses.replace(CONFIG, gae_lambda=1.0, whiten_advantages=False)
    at = {b: scored(w, config, kl_coef=b) for b in (0.0, 0.5, 2.0)}
    zero, half, two = (np.asarray(at[b][0].return_BxL) for b in at)
    np.testing.assert_allclose(half, zero + (two - zero) / 4, atol=2e-5)
    assert np.abs(two - zero).max() > 0.1
    for b in (0.5, 2.0):
        for name in ("mask_BxL", "old_logp_BxL", "old_value_BxL"):
            np.testing.assert_array_equal(getattr(at[b][0], name), getattr(at[0.0][0], name))
        np.testing.assert_array_equal(at[b][2]["score"], at[0.0][2]["score"])

    mask = np.asarray(at[0.0][0].mask_BxL)
    first = mask.argmax(axis=1)[:, None]
    of_episode = np.take_along_axis(zero - two, first, 1)[:, 0] / 2
    np.testing.assert_allclose(of_episode, at[0.0][2]["kl"], atol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(zero, first, 1)[:, 0], at[0.0][2]["score"], atol=1e-5
    )
    metrics = at[2.0][1]
    assert float(metrics["objective/kl"]) == pytest.approx(np.mean(of_episode), abs=1e-5)
    assert float(metrics["objective/non_score_reward"]) == pytest.approx(
        -2 * np.mean(of_episode), abs=1e-4
    )


@pytest.mark.laws
def test_a_policy_that_is_the_reference_has_no_kl(w):
    config = dataclasses.replace(CONFIG, gae_lambda=1.0, whiten_advantages=False)
    rollout, _, per_episode = scored(w, config, kl_coef=0.0, policy=w.reference)
    np.testing.assert_allclose(per_episode["kl"], 0.0, atol=2e-6)
    strict, _, _ = scored(w, config, kl_coef=5.0, policy=w.reference)
    np.testing.assert_allclose(strict.return_BxL, rollout.return_BxL, atol=2e-5)


def test_shuffled_scores_are_a_permutation(w):
    config = dataclasses.replace(CONFIG, score_control="shuffled")
    plain, shuffled = scored(w)[2]["score"], scored(w, config)[2]["score"]
    assert np.any(plain != shuffled)
    np.testing.assert_array_equal(np.sort(plain), np.sort(shuffled))


def test_the_reward_model_reads_eos_where_a_stop_token_ended_the_response(w):
    """Its training responses end by EOS; one cut by length ends as it is."""
    _, _, per_episode = scored(w)
    token = np.concatenate([w.prompts.token_BxP, w.responses.token_BxT], axis=1)
    mask = np.concatenate([w.prompts.mask_BxP, w.responses.mask_BxT], axis=1)
    stop = np.asarray(w.responses.stop_B)
    assert 2 in stop
    last = np.asarray(WIDTH + np.asarray(w.responses.mask_BxT).sum(1) - 1)
    assert all(token[b, last[b]] in STOPS for b in range(len(LENGTHS)) if stop[b] == 2)
    token[np.arange(len(LENGTHS)), last] = np.where(stop == 2, tiny.EOS, token[np.arange(6), last])
    value = jax.jit(lambda p, t, m: model.scalars(p, MODEL, padded_layout(t, m)))(
        w.reward, token, mask
    )
    expected = np.asarray(value)[np.arange(len(LENGTHS)), last]
    np.testing.assert_allclose(per_episode["score"], expected, atol=1e-5)


def packed(w: World, order_UxM, share: int = 1) -> np.ndarray:
    prompt_B = np.asarray(w.prompts.mask_BxP).sum(1)
    length_B = prompt_B + np.asarray(w.responses.mask_BxT).sum(1)
    return packed_rows(order_UxM, WIDTH - prompt_B, length_B, WIDTH + RESPONSE, share=share)


@pytest.mark.laws
@pytest.mark.parametrize("share", [1, 2])
def test_packed_rows_score_like_padded_ones(w, share):
    source_RxL = packed(w, np.arange(len(LENGTHS))[None], share)[0]
    assert len(source_RxL) < len(LENGTHS), "something must share a row"
    kept = scored(w)
    tight = scorer(CONFIG)(
        w.policy, w.reference, w.value, w.reward, w.prompts, w.responses, jnp.float32(0.3), KEY,
        source_RxL,
    )  # fmt: skip
    for got, want in zip(tight, kept, strict=True):
        tiny.assert_close(got, want, atol=1e-5)
    assert float(tight[1]["val/sampler_gap_max"]) < 1e-5


def test_the_value_network_starts_as_the_reward_model_scaled_like_the_rewards(w):
    """Trap T4; in the control it starts from 0, or GAE would hand on what the scores no longer say."""
    layout = scored(w)[0].layout
    scalars = jax.jit(lambda params: model.scalars(params, MODEL, layout))
    reward = np.asarray(scalars(w.reward))
    assert reward.std() > 0.1
    started = scalars(value_from_reward(w.reward, CONFIG, 2.5, -0.75))
    expected = np.where(layout.segment_BxL > 0, 2.5 * reward - 0.75, 0.0)
    np.testing.assert_allclose(started, expected, atol=1e-5)
    control = dataclasses.replace(CONFIG, score_control="shuffled")
    np.testing.assert_array_equal(scalars(value_from_reward(w.reward, control, 2.5, -0.75)), 0.0)


# --- the update


@pytest.mark.laws
@pytest.mark.parametrize("share", [1, 2])
def test_packed_rows_update_like_padded_ones(w, share):
    order_UxM = np.array([[2, 1, 0], [4, 2, 0]])  # in both a short one has room behind another
    source_UxRxL = packed(w, order_UxM, share)
    assert source_UxRxL.shape[1] < CONFIG.minibatch_size
    step, rollout = iteration(CONFIG), scored(w)[0]
    state, metrics = step(start(w), rollout, w.ptx, jnp.float32(1.0), source_UxRxL)
    plain = padded_rows(order_UxM, WIDTH + RESPONSE)
    expected, padded = step(start(w), rollout, w.ptx, jnp.float32(1.0), plain)
    tiny.assert_close(state.policy.params, expected.policy.params, atol=2e-5)
    tiny.assert_close(state.value.params, expected.value.params, atol=2e-5)
    tiny.assert_close(metrics, padded, rtol=1e-4, atol=1e-5)


def responses_in(source_UxRxL) -> np.ndarray:
    """scored_rows, whose M is half of L, of responses that may be longer than their prompts."""
    is_response = (source_UxRxL >= 0) & (source_UxRxL % (WIDTH + RESPONSE) >= WIDTH)
    scored_NxM = scored_slots(is_response.reshape(-1, is_response.shape[2]))
    return scored_NxM.reshape(*is_response.shape[:2], -1)


@pytest.mark.laws
def test_logits_of_responses_alone_change_nothing(w):
    """Scores and updates, on packed rows and on padded ones; and a slot left out is missed."""
    order_UxM = np.array([[2, 1, 0], [4, 2, 0]])
    for source_UxRxL in (packed(w, order_UxM), padded_rows(order_UxM, WIDTH + RESPONSE)):
        scored_UxRxM = responses_in(source_UxRxL)
        assert scored_UxRxM.shape[2] < WIDTH + RESPONSE
        step, rollout = iteration(CONFIG), scored(w)[0]
        arguments = rollout, w.ptx, jnp.float32(1.0), source_UxRxL
        state, metrics = step(start(w), *arguments, scored_UxRxM)
        expected, whole = step(start(w), *arguments)
        tiny.assert_close(state.policy.params, expected.policy.params, atol=2e-5)
        tiny.assert_close(metrics, whole, rtol=1e-4, atol=1e-5)
    missed = np.where(scored_UxRxM == scored_UxRxM[0, 0, 0], -1, scored_UxRxM)
    other = step(start(w), *arguments, missed)[1]
    assert abs(float(other["ppo/policy/approxkl"] - whole["ppo/policy/approxkl"])) > 1e-4

    source_RxL = packed(w, np.arange(len(LENGTHS))[None])
    scored_RxM = responses_in(source_RxL)[0]
    tight = scorer(CONFIG)(
        w.policy, w.reference, w.value, w.reward, w.prompts, w.responses, jnp.float32(0.3), KEY,
        source_RxL[0], scored_RxM,
    )  # fmt: skip
    for got, want in zip(tight, scored(w), strict=True):
        tiny.assert_close(got, want, atol=1e-5)


@pytest.mark.laws
def test_gamma_zero_is_plain_ppo_bit_for_bit(w):
    """Parameters and optimizer state: whatever the text, measured or not, and written without it."""
    measured, metrics = iterated(w, ptx_coef=0.0)
    skipped, fewer = iterated(w, ptx_coef=0.0, ptx_at_zero="skip")
    other, _ = iterated(w, ptx_coef=0.0, ptx=jax.tree.map(lambda x: x[::-1], w.ptx))
    tiny.assert_equal(measured, skipped)
    tiny.assert_equal(measured, other)
    assert set(metrics) - set(fewer) == {"ptx/nll"}
    assert norm(minus(measured.policy.params, iterated(w)[0].policy.params)) > 1e-3

    surrogate, squared_error = policy_objective(MODEL, CONFIG), value_objective(MODEL, CONFIG)

    @jax.jit
    def plain(state, rollout):
        def one(networks, index_M):
            minibatch = tiny.rows_of(rollout, index_M)
            policy, value = networks
            grads = jax.grad(surrogate, has_aux=True)(policy.params, minibatch)[0]
            policy = apply_gradients(policy, grads, OPTIMIZER)
            grads = jax.grad(squared_error, has_aux=True)(value.params, minibatch)[0]
            return (policy, apply_gradients(value, grads, OPTIMIZER)), None

        return jax.lax.scan(one, (state.policy, state.value), ORDER_UxM)[0]

    policy, value = plain(start(w), scored(w)[0])
    tiny.assert_equal(policy, measured.policy)
    tiny.assert_equal(value, measured.value)


@pytest.fixture(scope="module")
def gradients(w):
    """(PPO's gradient, the pretraining gradient, of(rl_coef, gamma)) on the first minibatch."""
    minibatch = tiny.rows_of(scored(w)[0], [4, 1, 3])
    text = tiny.rows_of(w.ptx, 0)

    def of(**changes):
        config = dataclasses.replace(CONFIG, **changes)
        return jax.jit(lambda p: policy_gradients(p, MODEL, config, minibatch, text))(w.policy)

    text_alone = jax.jit(jax.grad(lambda p: ptx_objective(MODEL, CONFIG)(p, text)[0]))(w.policy)
    return of(ptx_coef=0.0)[0], text_alone, of


def test_the_gradient_is_the_sum_of_both(gradients):
    ppo, ptx, of = gradients
    grads, metrics = of(ptx_coef=27.8)
    tiny.assert_close(
        grads, jax.tree.map(lambda a, b: a + 27.8 * b, ppo, ptx), rtol=1e-4, atol=1e-5
    )
    assert float(metrics["grad_norm/ppo"]) == pytest.approx(norm(ppo), rel=1e-4)
    assert float(metrics["grad_norm/ptx"]) == pytest.approx(norm(ptx), rel=1e-4)
    assert -1 < float(metrics["grad/cosine"]) < 1


@pytest.mark.laws
def test_without_rl_the_gradient_is_gamma_times_the_texts(gradients):
    _, ptx, of = gradients
    grads, _ = of(rl_coef=0.0, ptx_coef=3.0)
    tiny.assert_close(grads, jax.tree.map(lambda g: 3.0 * g, ptx), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def uneven(w):
    """A minibatch of 8, 0, 1 and 3 response tokens, and text of 8, 1, 0 and 4."""
    rollout = tiny.rows_of(scored(w)[0], [0, 1, 3, 5])
    nth_BxL = np.cumsum(rollout.mask_BxL, axis=1)
    keep_BxL = nth_BxL <= np.array([RESPONSE, 0, 1, 3])[:, None]
    text = tiny.rows_of(w.ptx, 0)
    weight_BxL = text.weight_BxL * (np.arange(9) <= np.array([8, 1, 0, 4])[:, None])
    return (
        dataclasses.replace(rollout, mask_BxL=rollout.mask_BxL & keep_BxL),
        dataclasses.replace(text, weight_BxL=weight_BxL),
    )


def update(**changes):
    config = dataclasses.replace(CONFIG, minibatch_size=4, **changes)
    return jax.jit(functools.partial(ppo_update, config=config, **NETWORKS))


as_written = functools.cache(update)


def updated(w, uneven, compiled):
    # Not where the rollout was: every ratio would be 1.
    state = start(w)
    moved = jax.tree.map(lambda p: 1.1 * p, (state.policy, state.value))
    state = dataclasses.replace(state, policy=moved[0], value=moved[1])
    state, metrics = compiled(state, *uneven)
    return (state.policy.params, state.value.params), metrics


@pytest.mark.laws
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="both"),
        pytest.param({"ptx_loss": "sum"}, id="sum", marks=pytest.mark.slow),
        pytest.param({"ptx_coef": 0.0}, id="gamma 0", marks=pytest.mark.slow),
        pytest.param({"rl_coef": 0.0}, id="no rl", marks=pytest.mark.slow),
    ],
)
def test_microbatches_take_the_update_of_the_full_minibatch(w, uneven, changes):
    params, metrics = updated(w, uneven, as_written(**changes))
    for n in (2,) if changes else (2, 4):
        got, of_parts = updated(w, uneven, as_written(grad_accumulation=n, **changes))
        tiny.assert_close(got, params, rtol=1e-5, atol=1e-5)
        tiny.assert_close(of_parts, metrics, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "policy_objective",
        pytest.param("value_objective", marks=pytest.mark.slow),
        pytest.param("ptx_objective", marks=pytest.mark.slow),
    ],
)
def test_a_mean_of_the_microbatches_means_is_another_update(w, uneven, name, monkeypatch):
    whole = updated(w, uneven, as_written())[0]
    right = getattr(ppo, name)
    monkeypatch.setattr(ppo, name, lambda *a: tiny.mean_of_means(right(*a), 4))
    wrong, _ = updated(w, uneven, update(grad_accumulation=4))
    with pytest.raises(AssertionError):
        tiny.assert_close(wrong, whole, rtol=1e-3, atol=1e-3)


@pytest.mark.laws
def test_gamma_zero_is_plain_ppo_bit_for_bit_in_microbatches(w, uneven):
    plain = {"ptx_coef": 0.0, "grad_accumulation": 2}
    params, metrics = updated(w, uneven, as_written(**plain))
    skipped, fewer = updated(w, uneven, as_written(ptx_at_zero="skip", **plain))
    tiny.assert_equal(params, skipped)
    assert set(metrics) - set(fewer) == {"ptx/nll"}


def test_gamma_rules_the_step_because_there_is_one(w, gradients):
    """Trap T17: what PPO's gradient adds to the step falls with gamma; with two steps it would not."""
    ppo, ptx, _ = gradients
    zeros = jax.tree.map(jnp.zeros_like, ppo)

    @jax.jit
    def share(gamma):
        def moved(*gradients):
            state = create(w.policy, OPTIMIZER)
            for grads in gradients:
                state = apply_gradients(state, grads, OPTIMIZER)
            return state.params

        def difference(a, b):
            return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(minus(a, b))))

        alone = difference(moved(ppo), w.policy)
        text, both = (combine_gradients(g, ptx, gamma)[0] for g in (zeros, ppo))
        summed = difference(moved(both), moved(text)) / alone
        # Two optimizer steps, each normalised by Adam from a fresh state: gamma cancels out.
        apart = difference(
            apply_gradients(create(moved(ppo), OPTIMIZER), text, OPTIMIZER).params, moved(text)
        )
        return summed, apart / alone

    summed, apart = zip(*(map(float, share(g)) for g in (0.0, 1.0, 5.0, 27.8, 100.0)), strict=True)
    assert summed[0] == pytest.approx(1.0, abs=1e-5)
    assert all(a > b for a, b in itertools.pairwise(summed)), summed
    assert summed[-1] < 0.25
    assert min(apart) > 0.99, apart


def test_a_scan_over_two_minibatches_is_two_updates_and_the_ema_follows_its_cadence(w):
    assert sorted(ORDER_UxM.ravel()) == list(range(len(LENGTHS)))
    update = jax.jit(functools.partial(ppo_update, config=CONFIG, **NETWORKS))
    rollout, state = scored(w)[0], start(w)
    passed = []
    for u, index_M in enumerate(ORDER_UxM):
        state, _ = update(state, tiny.rows_of(rollout, index_M), tiny.rows_of(w.ptx, u))
        passed.append(state.policy.params)

    by_iteration, _ = iterated(w)
    by_update, _ = iterated(w, ema_every="update")
    for scanned in (by_iteration, by_update):
        tiny.assert_close(scanned.policy.params, state.policy.params, atol=2e-5)
        tiny.assert_close(scanned.value.params, state.value.params, atol=2e-5)
        assert int(scanned.policy.step) == 2 and int(scanned.iteration) == 1
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(scanned.ema))

    def averaged(networks):
        ema = w.policy
        for params in networks:
            ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, ema, params)
        return ema

    tiny.assert_close(by_iteration.ema, averaged(passed[-1:]), atol=1e-5)
    tiny.assert_close(by_update.ema, averaged(passed), atol=1e-5)
    assert norm(minus(by_iteration.ema, by_update.ema)) > 1e-3


def test_every_inner_epoch_sees_every_episode_in_another_order():
    config = dataclasses.replace(CONFIG, inner_epochs=3)
    order = np.asarray(minibatch_order(ORDER, 6, config)).reshape(3, 6)
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(6), (3, 1)))
    assert len({tuple(row) for row in order}) == 3


def test_the_adaptive_controller_moves_beta_by_the_summed_kl(w):
    """Trap T9: 12 nats a sequence against a target of 6 is 20% over the horizon; 3 moves the other way."""
    adaptive = {"kl_controller": "adaptive", "kl_target": 6.0, "kl_horizon": 60}
    for kl, error in ((12.0, 0.2), (6.6, 0.1), (3.0, -0.2)):
        state, _ = iterated(w, kl=kl, **adaptive)
        assert float(state.kl_coef) == pytest.approx(0.3 * (1 + error * 6 / 60), rel=1e-5)
    assert float(iterated(w, kl=12.0)[0].kl_coef) == np.float32(0.3)
