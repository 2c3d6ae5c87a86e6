"""Traps T6 to T14: temperature, dropout, KL, rewards, whitening and advantages. See docs/traps.md."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny
from traps import (
    ANY_MODEL,
    CUT,
    EOS,
    LAST_B,
    PAD,
    PLAIN,
    POLICY,
    REFERENCE,
    REWARD,
    STOP_B,
    VALUE,
    MASK_BxL,
    TOKEN_BxL,
    on_bigram,
    prompts_and_responses,
    rejects,
    reward_model_scores,
    rewards_of,
    scored,
)

from instructax import masking
from instructax.batches import Responses, Rollout
from instructax.config import ModelConfig, PpoConfig
from instructax.models import functional as model
from instructax.rl import generate
from instructax.rl.gae import generalized_advantage
from instructax.rl.kl import adaptive_kl_update, per_token_kl
from instructax.rl.rewards import apply_missing_eos, shaped_reward
from instructax.steps import ppo, rollout

pytestmark = pytest.mark.traps


# --- T6, T7


def test_t06_one_temperature_in_rollout_reference_and_update():
    temperature = 0.6
    config = dataclasses.replace(PLAIN, temperature=temperature)
    prompts, _ = prompts_and_responses()
    policy = POLICY()

    def check(change):
        with on_bigram() as patch:
            options = change(patch) or {}
            responses = rollout.sample_responses(
                policy, jax.random.key(0), prompts, model_config=ModelConfig(vocab_size=bigram.VOCAB),
                response_length=6, temperature=temperature, eos_id=EOS, pad_id=PAD, **options,
            )  # fmt: skip
            episodes, metrics, per_episode = rollout.score_rollout(
                policy, policy, VALUE(), REWARD(), prompts, responses, jnp.float32(0.0),
                jax.random.key(0), config=config, model_config=ANY_MODEL, reward_config=ANY_MODEL,
                eos_id=EOS,
            )  # fmt: skip
            _, update = ppo.policy_objective(ANY_MODEL, config)(policy, episodes)
        assert float(metrics["val/sampler_gap_max"]) <= 1e-5
        np.testing.assert_allclose(per_episode["kl"], 0.0, atol=1e-5)
        assert float(update["ratio_max_deviation"]) <= 1e-5
        mask = np.asarray(episodes.mask_BxL)
        token, old_logp = np.asarray(episodes.layout.token_BxL), np.asarray(episodes.old_logp_BxL)
        for b, t in np.argwhere(mask):
            p = oracles.next_token_distribution(policy["table"][token[b, t - 1]], temperature)
            assert abs(np.log(p[token[b, t]]) - old_logp[b, t]) < 1e-5

    def with_model(patch, step, **functions):
        names = (
            "token_statistics",
            "token_logprobs",
            "scalars",
            "rollout_copy",
            "prefill",
            "decode",
        )
        changed = {name: getattr(bigram, name) for name in names} | functions
        patch.setattr(step, "model", types.SimpleNamespace(**changed))

    def cold(function, temperature):
        def call(*args, **options):
            return function(*args, **{**options, "temperature": temperature})

        return call

    def as_written(patch):
        pass

    def reference_at_one(patch):
        with_model(patch, rollout, token_logprobs=cold(bigram.token_logprobs, 1.0))

    def update_at_one(patch):
        with_model(patch, ppo, token_statistics=cold(bigram.token_statistics, 1.0))

    def rescoring_and_update_at_one(patch):
        for step in (rollout, ppo):
            with_model(
                patch,
                step,
                token_statistics=cold(bigram.token_statistics, 1.0),
                token_logprobs=cold(bigram.token_logprobs, 1.0),
            )

    def multiplied_everywhere(patch):
        inverse = 1 / temperature
        for step in (rollout, ppo):
            with_model(
                patch,
                step,
                token_statistics=cold(bigram.token_statistics, inverse),
                token_logprobs=cold(bigram.token_logprobs, inverse),
            )
        draw = generate.sample_tokens
        patch.setattr(generate, "sample_tokens", lambda k, x, t, **o: draw(k, x, inverse, **o))

    def top_k_in_the_rollout_alone(patch):
        return {"top_k": 3}

    rejects(
        check,
        as_written,
        reference_at_one,
        update_at_one,
        rescoring_and_update_at_one,
        multiplied_everywhere,
        top_k_in_the_rollout_alone,
    )


RATIO_MODEL = dataclasses.replace(tiny.MODEL, dropout=0.4)


@functools.cache
def ratio_world():
    """A padded, mixed-length minibatch on the transformer; old log-probabilities are left open."""
    lengths = (6, 3, 1, 4)
    prompts = tiny.prompts(lengths, 6, seed=3)
    mask = np.arange(5)[None] < np.array([5, 2, 4, 1])[:, None]
    responses = Responses(
        np.where(mask, tiny.tokens(4, 5, seed=8), 0), mask, np.zeros((4, 5), np.float32),
        np.ones(4, np.int32),
    )  # fmt: skip
    layout, mask_BxL = rollout.episode_layout(prompts, responses)
    update = jax.jit(
        lambda params, minibatch: ppo.policy_objective(RATIO_MODEL, RATIO_CONFIG)(
            params, minibatch
        )[1]
    )
    return tiny.params(), layout, mask_BxL, update


RATIO_CONFIG = PpoConfig(temperature=0.7)


def first_ratio_deviation(old_logp_BxL) -> float:
    params, layout, mask_BxL, update = ratio_world()
    zeros = jnp.zeros(mask_BxL.shape)
    minibatch = Rollout(layout, mask_BxL, old_logp_BxL, zeros, zeros + 1.0, zeros)
    return float(update(params, minibatch)["ratio_max_deviation"])


@functools.cache
def frozen_logprobs():
    def logp(params, layout, config, temperature, dropout_key=None):
        return model.token_logprobs(
            params, config, layout, temperature=temperature, dropout_key=dropout_key
        )

    return jax.jit(logp, static_argnums=(2, 3))


def test_t07_dropout_is_off_in_rollout_and_update():
    params, layout, _, _ = ratio_world()
    without = frozen_logprobs()(params, layout, RATIO_MODEL, 0.7)

    def check(old_and_new):
        old, new = old_and_new()
        minibatch_mask = ratio_world()[2]
        ratio = np.exp(np.asarray(new - old))[np.asarray(minibatch_mask)]
        assert np.abs(ratio - 1).max() <= 1e-5

    def as_written():
        # The update's own log-probabilities are old ones up to the deviation that it reports.
        assert first_ratio_deviation(without) <= 1e-5
        return without, without

    def dropped(seed):
        return frozen_logprobs()(params, layout, RATIO_MODEL, 0.7, jax.random.key(seed))

    def dropout_in_the_rollout():
        return dropped(0), without

    def dropout_in_the_update():
        return without, dropped(0)

    def dropout_in_both_with_keys_of_their_own():
        return dropped(0), dropped(1)

    rejects(
        check,
        as_written,
        dropout_in_the_rollout,
        dropout_in_the_update,
        dropout_in_both_with_keys_of_their_own,
    )


def test_t05_t06_t07_t16_t20_first_ratio_is_one():
    """The one test for five traps: padded, mixed-length, at a temperature, in float32."""
    params, layout, mask_BxL, _ = ratio_world()

    def check(old_logp):
        assert first_ratio_deviation(old_logp()) <= 1e-5

    def right():
        return frozen_logprobs()(params, layout, RATIO_MODEL, 0.7)

    def scored_at_temperature_one():
        return frozen_logprobs()(params, layout, RATIO_MODEL, 1.0)

    def scored_with_dropout():
        return frozen_logprobs()(params, layout, RATIO_MODEL, 0.7, jax.random.key(0))

    def scored_with_positions_of_slots():
        slots = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), mask_BxL.shape)
        shifted = dataclasses.replace(layout, position_BxL=slots)
        return frozen_logprobs()(params, shifted, RATIO_MODEL, 0.7)

    def scored_in_bfloat16():
        config = dataclasses.replace(RATIO_MODEL, compute_dtype="bfloat16")
        return frozen_logprobs()(params, layout, config, 0.7)

    def scored_by_parameters_one_update_old():
        moved = jax.tree.map(lambda p: p * 1.01, params)
        return frozen_logprobs()(moved, layout, RATIO_MODEL, 0.7)

    def log_probability_of_the_token_after():
        return jnp.pad(right()[:, 1:], ((0, 0), (0, 1)))

    rejects(
        check,
        right,
        scored_at_temperature_one,
        scored_with_dropout,
        scored_with_positions_of_slots,
        scored_in_bfloat16,
        scored_by_parameters_one_update_old,
        log_probability_of_the_token_after,
    )


# --- T8, T9


def test_t08_penalty_is_signed_k1_and_the_log_is_its_sum_over_a_sequence():
    prompts, responses = prompts_and_responses()
    layout, _ = rollout.episode_layout(prompts, responses)
    policy, reference = (
        np.asarray(bigram.token_logprobs(params(), None, layout), np.float64)
        for params in (POLICY, REFERENCE)
    )
    log_ratio_BxL = np.where(MASK_BxL, policy - reference, 0.0)
    assert log_ratio_BxL.min() < -0.1 and log_ratio_BxL.max() > 0.1

    def check(estimate):
        free, _, _ = scored(per_token_kl=estimate)
        paid, metrics, _ = scored(kl_coef=0.5, per_token_kl=estimate)
        difference = rewards_of(paid.return_BxL) - rewards_of(free.return_BxL)
        np.testing.assert_allclose(difference, -0.5 * log_ratio_BxL, atol=2e-6)
        assert metrics["objective/kl"] == pytest.approx(log_ratio_BxL.sum(1).mean(), abs=1e-5)

    def absolute(logp, ref_logp, mask, estimator):
        return per_token_kl(logp, ref_logp, mask, "abs")

    def never_negative(logp, ref_logp, mask, estimator):
        return per_token_kl(logp, ref_logp, mask, "max0")

    def k3(logp, ref_logp, mask, estimator):
        return per_token_kl(logp, ref_logp, mask, "k3")

    def reference_over_policy(logp, ref_logp, mask, estimator):
        return per_token_kl(ref_logp, logp, mask)

    def mean_over_the_sequence(logp, ref_logp, mask, estimator):
        return per_token_kl(logp, ref_logp, mask) / mask.sum(axis=1, keepdims=True)

    def padding_is_charged(logp, ref_logp, mask, estimator):
        return jnp.where(mask, logp - ref_logp, 0.1)

    rejects(
        check,
        per_token_kl,
        absolute,
        never_negative,
        k3,
        reference_over_policy,
        mean_over_the_sequence,
        padding_is_charged,
    )


def test_t09_adaptive_controller_reads_the_sum_over_a_sequence():
    # 0.75 nats a token, 8 tokens a sequence: exactly the target of 6 nats. And 12 nats: 20% more.
    mask = np.arange(10)[None] < np.array([[6], [8], [10]])
    reference = np.zeros(mask.shape, np.float32)

    def check(update):
        for nats, factor in ((0.75, 1.0), (1.5, 1.2), (0.775, 1 + 0.2 / 6), (0.1, 0.8)):
            logp = np.where(mask, np.float32(nats), 9.0).astype(np.float32)
            beta = update(0.1, per_token_kl(logp, reference, mask), mask, 6.0, 512, 512)
            np.testing.assert_allclose(beta, 0.1 * factor, rtol=1e-5)

    def right(beta, kl_BxT, mask_BxT, target, n_episodes, horizon):
        observed = kl_BxT.sum(axis=1).mean()
        return adaptive_kl_update(beta, observed, target, n_episodes, horizon)

    def mean_per_token(beta, kl_BxT, mask_BxT, *rest):
        return adaptive_kl_update(beta, masking.masked_mean(kl_BxT, mask_BxT), *rest)

    def sum_over_the_batch(beta, kl_BxT, mask_BxT, *rest):
        return adaptive_kl_update(beta, kl_BxT.sum(), *rest)

    def error_without_a_limit(beta, kl_BxT, mask_BxT, target, n_episodes, horizon):
        error = kl_BxT.sum(axis=1).mean() / target - 1
        return beta * (1 + error * n_episodes / horizon)

    def falls_where_the_kl_is_too_large(beta, kl_BxT, mask_BxT, target, n_episodes, horizon):
        observed = 2 * target - kl_BxT.sum(axis=1).mean()
        return adaptive_kl_update(beta, observed, target, n_episodes, horizon)

    rejects(
        check,
        right,
        mean_per_token,
        sum_over_the_batch,
        error_without_a_limit,
        falls_where_the_kl_is_too_large,
    )


# --- T10, T11, T12


def test_t10_score_lands_once_on_last_real_token():
    expected = np.zeros(MASK_BxL.shape)
    expected[np.arange(4), LAST_B] = reward_model_scores()

    def check(place):
        got, _, _ = scored(shaped_reward=place)
        np.testing.assert_allclose(rewards_of(got.return_BxL), expected, atol=2e-6)

    def placed(score_B, kl_BxT, mask_BxT, kl_coef, where_BxT):
        return jnp.where(where_BxT, score_B[:, None], 0.0) - kl_coef * kl_BxT * mask_BxT

    def slots(mask_BxT):
        return jnp.arange(mask_BxT.shape[1])[None]

    def at_the_end_of_the_buffer(score_B, kl_BxT, mask_BxT, kl_coef):
        last = slots(mask_BxT) == mask_BxT.shape[1] - 1
        return placed(score_B, kl_BxT, mask_BxT, kl_coef, last)

    def on_every_token(score_B, kl_BxT, mask_BxT, kl_coef):
        return placed(score_B, kl_BxT, mask_BxT, kl_coef, mask_BxT)

    def at_the_number_of_tokens(score_B, kl_BxT, mask_BxT, kl_coef):
        n = mask_BxT.sum(axis=1, keepdims=True) - 1
        return placed(score_B, kl_BxT, mask_BxT, kl_coef, slots(mask_BxT) == n)

    def on_the_first_pad(score_B, kl_BxT, mask_BxT, kl_coef):
        last = masking.last_token_index(mask_BxT)[:, None]
        return placed(score_B, kl_BxT, mask_BxT, kl_coef, slots(mask_BxT) == last + 1)

    def one_token_early(score_B, kl_BxT, mask_BxT, kl_coef):
        last = masking.last_token_index(mask_BxT)[:, None]
        return placed(score_B, kl_BxT, mask_BxT, kl_coef, slots(mask_BxT) == last - 1)

    def twice(score_B, kl_BxT, mask_BxT, kl_coef):
        return 2 * shaped_reward(score_B, kl_BxT, mask_BxT, kl_coef)

    rejects(
        check,
        shaped_reward,
        at_the_end_of_the_buffer,
        on_every_token,
        at_the_number_of_tokens,
        on_the_first_pad,
        one_token_early,
        twice,
    )


def test_t11_only_a_response_cut_by_length_loses_its_score():
    raw = reward_model_scores()
    cut = STOP_B == CUT
    assert cut.sum() == 1

    def check(apply):
        for rule, value, expected in (
            ("replace", None, -1.0),
            ("replace", 0.0, 0.0),
            ("subtract", None, raw[cut] - 1),
            ("none", None, raw[cut]),
        ):
            config = dataclasses.replace(PLAIN, missing_eos=rule, missing_eos_value=value)
            score = scored(config, apply_missing_eos=apply)[2]["score"]
            np.testing.assert_allclose(score[cut], expected, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(score[~cut], raw[~cut], rtol=1e-6)

    def with_finished(finished_B):
        def apply(score_B, _, rule, value):
            return apply_missing_eos(score_B, jnp.asarray(finished_B), rule, value)

        return apply

    def value_is_added(score_B, finished_B, rule, value):
        return jnp.where(finished_B, score_B, score_B + value)

    def the_finished_lose_it(score_B, finished_B, rule, value):
        return apply_missing_eos(score_B, ~finished_B, rule, value)

    def a_stop_token_is_no_end(*args):
        return with_finished(TOKEN_BxL[np.arange(4), LAST_B] == EOS)(*args)

    def an_end_token_anywhere_in_the_row(*args):
        return with_finished((TOKEN_BxL == EOS).any(axis=1))(*args)

    def zero_means_the_default(score_B, finished_B, rule, value):
        return apply_missing_eos(score_B, finished_B, rule, value or -1.0)

    rejects(
        check,
        apply_missing_eos,
        value_is_added,
        the_finished_lose_it,
        a_stop_token_is_no_end,
        an_end_token_anywhere_in_the_row,
        zero_means_the_default,
    )


def test_t12_scores_keep_their_fractions():
    token = np.array([[5, 6, 7], [8, 9, 4]], np.int32)
    mask, kl = np.ones((2, 3), bool), np.zeros((2, 3), np.float32)
    score = np.array([0.7, -1.9], np.float32)

    def check(place):
        reward = np.asarray(place(score, kl, mask, 0.1))
        np.testing.assert_array_equal(reward[:, -1], score)
        try:
            place(np.array([1, -2], np.int32), kl, mask, 0.1)
        except TypeError as error:
            assert "score_B must be floating" in str(error)
        else:
            raise AssertionError("integer scores went through the door")

    def buffer_like_the_tokens(score_B, kl_BxT, mask_BxT, kl_coef):
        return jnp.zeros_like(token).at[:, -1].add(score_B.astype(jnp.int32))

    def cast_to_the_compute_dtype(score_B, kl_BxT, mask_BxT, kl_coef):
        low = jnp.asarray(score_B, jnp.bfloat16).astype(jnp.float32)
        return shaped_reward(low, kl_BxT, mask_BxT, kl_coef)

    def integers_become_floats(score_B, kl_BxT, mask_BxT, kl_coef):
        return shaped_reward(np.asarray(score_B, np.float32), kl_BxT, mask_BxT, kl_coef)

    rejects(
        check,
        shaped_reward,
        buffer_like_the_tokens,
        cast_to_the_compute_dtype,
        integers_become_floats,
    )


# --- T13, T14


def test_t13_whitening_is_over_all_real_tokens_with_the_biased_variance():
    config = dataclasses.replace(PLAIN, whiten_advantages=True, whiten_rewards=True)
    small = np.array([[1.0, 1.0001, 7.0], [1.0003, 9.0, 9.0]], np.float32)
    small_mask = np.array([[True, True, False], [True, False, False]])

    def check(whiten):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(masking, "whiten", whiten)
            got = scored(config, kl_coef=0.1)[0]
        plain = scored(PLAIN, kl_coef=0.1)[0]
        reward = oracles.whiten(rewards_of(plain.return_BxL), MASK_BxL, shift_mean=False)
        advantage, returns = oracles.generalized_advantage(
            reward, plain.old_value_BxL, MASK_BxL, 1.0, 1.0
        )
        np.testing.assert_allclose(got.return_BxL, returns, atol=1e-5)
        expected = oracles.whiten(advantage, MASK_BxL, shift_mean=True)
        np.testing.assert_allclose(got.advantage_BxL, expected, atol=1e-5)
        # A variance of the size of the epsilon tells where the epsilon stands.
        expected = oracles.whiten(small, small_mask, shift_mean=True)
        np.testing.assert_allclose(whiten(small, small_mask, True), expected, rtol=2e-3)

    def by_hand(x, mask, shift_mean, *, axis=None, freed=0, scale=None):
        x = jnp.where(mask, x, 0.0)
        n = jnp.sum(mask, axis=axis, keepdims=True)
        mean = jnp.sum(x, axis=axis, keepdims=True) / n
        var = jnp.sum(jnp.where(mask, x - mean, 0.0) ** 2, axis=axis, keepdims=True) / (n - freed)
        out = (x - mean) * jax.lax.rsqrt(var + 1e-8) if scale is None else scale(x - mean, var)
        return jnp.where(mask, out if shift_mean else out + mean, 0.0)

    check(by_hand)

    def variance_over_n_minus_one(x, mask, shift_mean=True):
        return by_hand(x, mask, shift_mean, freed=1)

    def padding_counts(x, mask, shift_mean=True):
        return jnp.where(mask, by_hand(x, jnp.ones_like(mask), shift_mean), 0.0)

    def each_row_alone(x, mask, shift_mean=True):
        return by_hand(x, mask, shift_mean, axis=1)

    def rewards_lose_their_mean(x, mask, shift_mean=True):
        return by_hand(x, mask, True)

    def advantages_keep_their_mean(x, mask, shift_mean=True):
        return by_hand(x, mask, False)

    def epsilon_outside_the_root(x, mask, shift_mean=True):
        return by_hand(x, mask, shift_mean, scale=lambda d, var: d / (jnp.sqrt(var) + 1e-8))

    rejects(
        check,
        masking.whiten,
        variance_over_n_minus_one,
        padding_counts,
        each_row_alone,
        rewards_lose_their_mean,
        advantages_keep_their_mean,
        epsilon_outside_the_root,
    )


def test_t14_value_past_the_end_of_a_sequence_is_zero_and_returns_are_unwhitened():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 4, 6)).astype(np.float32)
    mask = np.array(
        [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]], bool
    )

    def check(gae):
        got = gae(reward, value, mask, 0.9, 0.95)
        expected = oracles.generalized_advantage(reward, value, mask, 0.9, 0.95)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(np.asarray(a)[mask], b[mask], rtol=1e-4, atol=1e-5)

    def recursion(next_value, carried):
        """A_t from the buffer's last slot down; both functions see (masked x, b, t)."""
        advantage = np.zeros(reward.shape)
        for b, t in itertools.product(range(4), range(5, -1, -1)):
            if not mask[b, t]:
                continue
            delta = reward[b, t] + 0.9 * next_value(b, t) - value[b, t]
            advantage[b, t] = delta + 0.9 * 0.95 * carried(advantage, b, t)
        return advantage, advantage + value

    def real(b, t):
        return t + 1 < 6 and mask[b, t + 1]

    def following(advantage, b, t):
        return advantage[b, t + 1] if real(b, t) else 0.0

    def by_hand(*_):
        return recursion(lambda b, t: value[b, t + 1] if real(b, t) else 0.0, following)

    check(by_hand)

    def value_of_the_padding_behind(*_):
        return recursion(lambda b, t: value[b, t + 1] if t + 1 < 6 else 0.0, following)

    def last_value_again_past_the_end(*_):
        return recursion(lambda b, t: value[b, t + 1] if real(b, t) else value[b, t], following)

    def mask_ignored(*_):
        return generalized_advantage(reward, value, np.ones_like(mask), 0.9, 0.95)

    def returns_from_whitened_advantages(*args):
        advantage, _ = generalized_advantage(*args)
        return advantage, masking.whiten(advantage, mask) + value

    def value_read_after_the_token(*_):
        return generalized_advantage(reward, np.roll(value, -1, axis=1), mask, 0.9, 0.95)

    rejects(
        check,
        generalized_advantage,
        value_of_the_padding_behind,
        last_value_again_past_the_end,
        mask_ignored,
        returns_from_whitened_advantages,
        value_read_after_the_token,
    )
