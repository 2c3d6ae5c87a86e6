"""Traps T15 to T20 and two more: losses, stale values, gamma, epsilon, seeds, precision. See docs/traps.md."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import tiny
from traps import (
    ANY_MODEL,
    LAST_B,
    PAD,
    PLAIN,
    POLICY,
    VALUE,
    MASK_BxL,
    on_bigram,
    rejects,
    reward_model_scores,
    rewards_of,
    scored,
)

from instructax import logprobs, masking
from instructax.batches import PromptBatch, padded_layout
from instructax.config import ModelConfig, OptimizerConfig, PpoConfig
from instructax.data.pipeline import SingleUnits, derive_seed
from instructax.losses.ppo_ptx import combine_gradients
from instructax.losses.surrogate import clipped_policy_loss
from instructax.losses.value import clipped_value_loss
from instructax.rl import generate
from instructax.rl.gae import generalized_advantage
from instructax.rl.rewards import shaped_reward
from instructax.rl.sampling import episode_keys
from instructax.steps import ppo, rollout
from instructax.steps.optimizer import make_optimizer
from instructax.steps.state import PpoState, apply_gradients, create, move_average

pytestmark = pytest.mark.traps


# --- T15, T16


def losses_world():
    rng = np.random.default_rng(3)
    old = rng.normal(size=(6, 8)).astype(np.float32)
    new = old + 0.5 * rng.normal(size=old.shape).astype(np.float32)
    third = rng.normal(size=old.shape).astype(np.float32)
    return new, old, third, rng.random(old.shape) < 0.6


def same_metrics(got, expected, names):
    for name in names:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_t15_policy_loss_is_the_pessimistic_clipped_one_with_masked_diagnostics():
    logp, old_logp, advantage, mask = losses_world()
    expected = oracles.clipped_policy_loss(logp, old_logp, advantage, mask, 0.2)

    def check(metrics_of):
        got = metrics_of(logp, old_logp, advantage, mask, 0.2)
        same_metrics(got, expected, ("loss", "approxkl", "clipfrac", "ratio", "ratio_var"))

    def right(*args):
        return clipped_policy_loss(*args)[1]

    def changed(**values):
        return expected | {name: np.mean(value) for name, value in values.items()}

    d = (logp - old_logp)[mask]
    rho, a = np.exp(d), advantage[mask]
    near = np.clip(rho, 0.8, 1.2)

    def the_better_of_both(*_):
        return changed(loss=np.minimum(-a * rho, -a * near))

    def clipped_ratio_alone(*_):
        return changed(loss=-a * near)

    def unclipped(*_):
        return changed(loss=-a * rho)

    def clipped_above_alone(*_):
        return changed(loss=np.maximum(-a * rho, -a * np.minimum(rho, 1.2)))

    def sign_turned(*_):
        return changed(loss=np.maximum(a * rho, a * near))

    def mean_over_the_buffer(*_):
        return changed(loss=np.maximum(-a * rho, -a * near).sum() / mask.size)

    def diagnostics_over_padding(*_):
        return right(logp, old_logp, advantage, np.ones_like(mask), 0.2) | {
            "loss": expected["loss"]
        }

    def approxkl_is_the_mean_difference(*_):
        return changed(approxkl=-d)

    def clipfrac_counts_ratios_outside(*_):
        return changed(clipfrac=np.abs(rho - 1) > 0.2)

    rejects(
        check,
        right,
        the_better_of_both,
        clipped_ratio_alone,
        unclipped,
        clipped_above_alone,
        sign_turned,
        mean_over_the_buffer,
        diagnostics_over_padding,
        approxkl_is_the_mean_difference,
        clipfrac_counts_ratios_outside,
    )


def test_t15_value_loss_is_half_the_larger_error_with_masked_diagnostics():
    value, old_value, returns, mask = losses_world()
    expected = oracles.clipped_value_loss(value, old_value, returns, mask, 0.2)

    def check(metrics_of):
        got = metrics_of(value, old_value, returns, mask, 0.2)
        same_metrics(got, expected, expected)

    def right(*args):
        return clipped_value_loss(*args)[1]

    v, old, r = value[mask], old_value[mask], returns[mask]
    near = np.clip(v, old - 0.2, old + 0.2)
    free, clipped = (v - r) ** 2, (near - r) ** 2

    def changed(**values):
        return expected | {name: np.mean(value) for name, value in values.items()}

    def the_smaller_error(*_):
        return changed(loss=0.5 * np.minimum(free, clipped))

    def without_the_half(*_):
        return changed(loss=np.maximum(free, clipped))

    def clipped_error_alone(*_):
        return changed(loss=0.5 * clipped)

    def clipped_about_the_return(*_):
        other = (np.clip(v, r - 0.2, r + 0.2) - r) ** 2
        return changed(loss=0.5 * np.maximum(free, other))

    def mean_over_the_buffer(*_):
        return changed(loss=0.5 * np.maximum(free, clipped).sum() / mask.size)

    def var_explained_over_padding(*_):
        whole = right(value, old_value, returns, np.ones_like(mask), 0.2)
        return changed(var_explained=whole["var_explained"])

    def var_explained_of_the_residual(*_):
        return changed(var_explained=1 - np.var(r - v) / np.var(r))

    def var_explained_by_n_minus_one(*_):
        return changed(var_explained=1 - free.mean() / np.var(r, ddof=1))

    rejects(
        check,
        right,
        the_smaller_error,
        without_the_half,
        clipped_error_alone,
        clipped_about_the_return,
        mean_over_the_buffer,
        var_explained_over_padding,
        var_explained_of_the_residual,
        var_explained_by_n_minus_one,
    )


FAST = OptimizerConfig(learning_rate=0.3, schedule="constant", max_grad_norm=None)
NO_TEXT = dataclasses.replace(PLAIN, whiten_advantages=True, ptx_at_zero="skip")


@functools.cache
def bigram_update(config: PpoConfig):
    """One jitted ``ppo_update`` on the bigram model with optimizers that move far."""
    optimizer = make_optimizer(FAST, 10)

    def update(policy, value, episodes, text):
        state = PpoState(policy, value, policy.params, jnp.float32(0.1), jnp.int32(0))
        return ppo.ppo_update(
            state, episodes, text, config=config, model_config=ANY_MODEL,
            reward_config=ANY_MODEL, policy_optimizer=optimizer, value_optimizer=optimizer,
        )  # fmt: skip

    jitted = jax.jit(update)

    def run(state, episodes, text=None):
        with on_bigram():
            return jitted(state.policy, state.value, episodes, text)

    def start(policy, value):
        return PpoState(
            create(policy, optimizer), create(value, optimizer), policy, jnp.float32(0.1),
            jnp.int32(0),
        )  # fmt: skip

    return run, start


def test_t16_old_logprobs_values_and_advantages_stay_those_of_the_rollout():
    """Two epochs over the same episodes: the second one's figures are about the rollout's numbers."""
    frozen = scored(NO_TEXT)[0]
    update, start = bigram_update(NO_TEXT)

    def logp(state):
        return np.asarray(bigram.token_logprobs(state.policy.params, None, frozen.layout))

    def value(state):
        with on_bigram():
            return np.asarray(rollout.values_before(state.value.params, ANY_MODEL, frozen.layout))

    def check(episodes_of):
        state = start(POLICY(), VALUE())
        state, _ = update(state, episodes_of(frozen, state))
        _, metrics = update(state, episodes_of(frozen, state))
        expected = oracles.clipped_policy_loss(
            logp(state), frozen.old_logp_BxL, frozen.advantage_BxL, MASK_BxL, 0.2
        )
        assert expected["clipfrac"] > 0.2 and expected["ratio_max_deviation"] > 0.2
        for name, short in (("ppo/loss/policy", "loss"), ("ppo/policy/approxkl", "approxkl"),
                            ("ppo/policy/clipfrac", "clipfrac"), ("val/ratio", "ratio")):  # fmt: skip
            np.testing.assert_allclose(metrics[name], expected[short], rtol=1e-4, err_msg=name)
        expected = oracles.clipped_value_loss(
            value(state), frozen.old_value_BxL, frozen.return_BxL, MASK_BxL, 0.2
        )
        assert expected["clipfrac"] > 0.1
        for name, short in (("ppo/loss/value", "loss"), ("ppo/val/clipfrac", "clipfrac"),
                            ("ppo/returns/mean", "returns_mean")):  # fmt: skip
            np.testing.assert_allclose(metrics[name], expected[short], rtol=1e-4, err_msg=name)

    def as_frozen(episodes, state):
        return episodes

    def old_logp_recomputed(episodes, state):
        return dataclasses.replace(episodes, old_logp_BxL=logp(state))

    def old_values_recomputed(episodes, state):
        return dataclasses.replace(episodes, old_value_BxL=value(state))

    def advantages_recomputed(episodes, state):
        advantage = episodes.return_BxL - value(state)
        whitened = np.asarray(masking.whiten(advantage, MASK_BxL))
        return dataclasses.replace(episodes, advantage_BxL=whitened)

    def returns_recomputed(episodes, state):
        return dataclasses.replace(episodes, return_BxL=episodes.advantage_BxL + value(state))

    rejects(
        check,
        as_frozen,
        old_logp_recomputed,
        old_values_recomputed,
        advantages_recomputed,
        returns_recomputed,
    )


# --- T17, T18


def test_t17_gamma_acts_through_one_optimizer_step():
    """What PPO's gradient adds to the step falls with gamma; with a step each it would not."""
    rng = np.random.default_rng(0)
    params = {"x": rng.normal(size=40).astype(np.float32)}
    ppo_grads, ptx_grads = ({"x": rng.normal(size=40).astype(np.float32)} for _ in range(2))
    nothing = {"x": np.zeros(40, np.float32)}
    optimizer = make_optimizer(dataclasses.replace(FAST, max_grad_norm=0.1, eps=1e-2), 10)

    def moved(params, grads):
        return apply_gradients(create(params, optimizer), grads, optimizer).params

    def check(step):
        def share(gamma):
            with_ppo = step(ppo_grads, ptx_grads, gamma)["x"]
            added = np.linalg.norm(with_ppo - step(nothing, ptx_grads, gamma)["x"])
            return added / np.linalg.norm(moved(params, ppo_grads)["x"] - params["x"])

        shares = [share(gamma) for gamma in (0.0, 2.0, 5.0, 27.8, 100.0)]
        assert shares[0] == pytest.approx(1.0, abs=1e-4)
        assert all(b < 0.8 * a for a, b in itertools.pairwise(shares)), shares
        assert shares[-1] < 0.05

    def right(ppo_grads, ptx_grads, gamma):
        return moved(params, combine_gradients(ppo_grads, ptx_grads, gamma)[0])

    def scaled(ptx_grads, gamma):
        return jax.tree.map(lambda g: gamma * g, ptx_grads)

    def two_optimizer_steps(ppo_grads, ptx_grads, gamma):
        return moved(moved(params, ppo_grads), scaled(ptx_grads, gamma))

    def each_clipped_before_the_sum(ppo_grads, ptx_grads, gamma):
        def clipped(grads):
            norm = optax.tree_utils.tree_norm(grads)
            return jax.tree.map(lambda g: g * jnp.minimum(1.0, 0.1 / (norm + 1e-9)), grads)

        both = combine_gradients(clipped(ppo_grads), clipped(scaled(ptx_grads, gamma)), 1.0)[0]
        return moved(params, both)

    def gamma_on_the_learning_rate_of_a_second_step(ppo_grads, ptx_grads, gamma):
        first = moved(params, ppo_grads)
        second = moved(first, ptx_grads)
        return jax.tree.map(lambda a, b: a + gamma * (b - a), first, second)

    def mean_weighted_by_gamma_alone(ppo_grads, ptx_grads, gamma):
        return moved(params, combine_gradients(ppo_grads, ptx_grads, 27.8)[0])

    rejects(
        check,
        right,
        two_optimizer_steps,
        each_clipped_before_the_sum,
        gamma_on_the_learning_rate_of_a_second_step,
        mean_weighted_by_gamma_alone,
    )


def test_t18_epsilon_stands_where_the_config_says():
    grads = 1e-5 * np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)

    def check(optimizer_of):
        for inside in (False, True):
            config = OptimizerConfig(
                learning_rate=0.1, schedule="constant", eps=1e-5, max_grad_norm=None,
                eps_inside_correction=inside,
            )  # fmt: skip
            optimizer = optimizer_of(config)
            state = create({"x": jnp.ones(5)}, optimizer)
            for g in grads:
                state = apply_gradients(state, {"x": jnp.asarray(g)}, optimizer)
            expected = oracles.adam(np.ones(5), grads, 0.1, 0.9, 0.95, 1e-5, inside)
            np.testing.assert_allclose(state.params["x"], expected, atol=1e-5)

    def right(config):
        return make_optimizer(config, 6)

    def always_outside_the_correction(config):
        return optax.adam(0.1, b1=0.9, b2=0.95, eps=1e-5)

    def always_inside_the_correction(config):
        return right(dataclasses.replace(config, eps_inside_correction=True))

    def under_the_root(config):
        return optax.adam(0.1, b1=0.9, b2=0.95, eps=0.0, eps_root=1e-10)

    def the_other_way_round(config):
        return right(
            dataclasses.replace(config, eps_inside_correction=not config.eps_inside_correction)
        )

    rejects(
        check,
        right,
        always_outside_the_correction,
        always_inside_the_correction,
        under_the_root,
        the_other_way_round,
    )


# --- T19, T20


def test_t19_a_response_depends_on_its_episode_and_on_no_slot_or_process():
    policy = {"table": np.zeros((bigram.VOCAB, bigram.VOCAB), np.float32)}  # all tokens alike
    same = PromptBatch(
        np.full((6, 2), 5, np.int32), np.ones((6, 2), bool), np.arange(6, dtype=np.int32)
    )

    def check(keys_of):
        sample = jax.jit(
            functools.partial(
                rollout.sample_responses, model_config=ModelConfig(vocab_size=bigram.VOCAB),
                response_length=6, temperature=1.0, eos_id=-1, pad_id=PAD,
            )
        )  # fmt: skip

        def sampled(rows):
            prompts = jax.tree.map(lambda x: x[np.asarray(rows)], same)
            with on_bigram() as patch:
                patch.setattr(generate, "episode_keys", keys_of)
                return np.asarray(sample(policy, jax.random.key(4), prompts).token_BxT)

        whole = sampled(range(6))
        assert len({tuple(row) for row in whole}) == 6, "equal prompts, other episodes"
        assert all(len(set(row)) > 1 for row in whole.tolist()), "a draw of its own for each token"
        # Two processes with half of the episodes each, and another order.
        for rows in ([0, 1, 2, 0, 1, 2], [3, 4, 5, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
            np.testing.assert_array_equal(sampled(rows), whole[rows])

    def one_key_for_all_rows(key, episode_B, t):
        return jnp.broadcast_to(jax.random.fold_in(key, t), episode_B.shape)

    def key_of_the_slot(key, episode_B, t):
        return episode_keys(key, jnp.arange(episode_B.shape[0]), t)

    def keys_split_over_the_batch(key, episode_B, t):
        return jax.random.split(jax.random.fold_in(key, t), episode_B.shape[0])

    def same_key_for_every_token(key, episode_B, t):
        return episode_keys(key, episode_B, 0)

    rejects(
        check,
        episode_keys,
        one_key_for_all_rows,
        key_of_the_slot,
        keys_split_over_the_batch,
        same_key_for_every_token,
    )


def test_t19_every_stream_of_data_has_a_shuffle_of_its_own():
    def check(orders):
        prompts, text = orders(ptx_rows=8)
        assert sorted(prompts) == sorted(text) == list(range(20))
        assert prompts != text and prompts != list(range(20))
        more_prompts, _ = orders(ptx_rows=0)
        assert more_prompts == prompts, "gamma's text must not reshuffle the prompts"

    def right(ptx_rows):
        def order(purpose):
            units = SingleUnits(20, derive_seed(7, purpose))
            return [units[i][0] for i in range(20)]

        return order("prompts"), order("pretraining")

    def one_generator_for_all(ptx_rows):
        rng = np.random.default_rng(7)
        rng.random(ptx_rows)
        return rng.permutation(20).tolist(), rng.permutation(20).tolist()

    def one_seed_for_all(ptx_rows):
        units = SingleUnits(20, 7)
        order = [units[i][0] for i in range(20)]
        return order, list(order)

    rejects(check, right, one_generator_for_all, one_seed_for_all)


def test_t20_log_softmax_is_float32_under_bfloat16_activations():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.bfloat16)
    table = jnp.asarray(2 * rng.normal(size=(50, 8)), jnp.bfloat16)
    token = rng.integers(0, 50, (2, 5))
    # The products of the rounded numbers, exactly: what is left is the arithmetic behind them.
    logits = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    expected = np.array(
        [[np.log(oracles.next_token_distribution(logits[b, t], 1.0)[token[b, t]])
          for t in range(5)] for b in range(2)]
    )  # fmt: skip

    def check(logp_of):
        np.testing.assert_allclose(logp_of(x, token, table), expected, atol=5e-6)

    def right(x, token, table):
        return logprobs.chunked_token_statistics(x, token, table, vocab_size=50)[0]

    def taken(logits, token):
        logp = jax.nn.log_softmax(logits)
        return np.asarray(jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0], np.float32)

    def logits_in_bfloat16(x, token, table):
        return taken((x @ table.T).astype(jnp.float32), token)

    def softmax_in_bfloat16(x, token, table):
        return taken(jnp.asarray(logits, jnp.float32).astype(jnp.bfloat16), token)

    def result_in_bfloat16(x, token, table):
        return np.asarray(right(x, token, table).astype(jnp.bfloat16), np.float32)

    rejects(check, right, logits_in_bfloat16, softmax_in_bfloat16, result_in_bfloat16)


def test_t20_average_of_the_policy_moves_in_float32():
    start, end = {"x": np.full(3, 1.0, np.float32)}, {"x": np.full(3, 1.1, np.float32)}

    def check(average):
        ema = start
        for _ in range(100):
            ema = average(ema, end, 0.992)
        expected = oracles.ema(1.0, [1.1] * 100, 0.992)
        np.testing.assert_allclose(ema["x"], expected, rtol=1e-5)

    def in_bfloat16(ema, params, decay):
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (ema, params))
        return move_average(*low, decay)

    def stored_in_bfloat16(ema, params, decay):
        ema = move_average(ema, params, decay)
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), ema)

    def weights_exchanged(ema, params, decay):
        return move_average(ema, params, 1 - decay)

    rejects(check, move_average, in_bfloat16, stored_in_bfloat16, weights_exchanged)


def test_t20_advantages_are_float32_whatever_comes_in():
    rng = np.random.default_rng(1)
    reward, value = (jnp.asarray(rng.normal(size=(3, 40)), jnp.bfloat16) for _ in range(2))
    mask = np.ones((3, 40), bool)
    exact = [np.asarray(a, np.float64) for a in (reward, value)]
    expected = oracles.generalized_advantage(*exact, mask, 1.0, 0.95)[0]

    def check(gae):
        advantage = np.asarray(gae(reward, value, mask, 1.0, 0.95)[0], np.float32)
        np.testing.assert_allclose(advantage, expected, rtol=1e-5, atol=1e-5)

    def recursion(dtype, store):
        carried, out = jnp.zeros(3, dtype), []
        next_value = jnp.zeros(3, dtype)
        for t in range(39, -1, -1):
            r, v = reward[:, t].astype(dtype), value[:, t].astype(dtype)
            carried = store(r + next_value - v + jnp.asarray(0.95, dtype) * carried)
            next_value = v
            out.append(carried)
        return jnp.stack(out[::-1], axis=1), None

    def in_bfloat16(*_):
        return recursion(jnp.bfloat16, lambda x: x)

    def stored_in_bfloat16(*_):
        return recursion(jnp.float32, lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))

    def in_float32(*_):
        return recursion(jnp.float32, lambda x: x)

    check(in_float32)
    rejects(check, generalized_advantage, in_bfloat16, stored_in_bfloat16)


# --- zero is a value; gamma is not the discount


def test_zero_beta_is_a_value_and_its_kl_is_still_logged():
    _, metrics, _ = scored()
    assert abs(metrics["objective/kl"]) > 0.05 and metrics["objective/kl_coef"] == 0.0
    expected = np.zeros(MASK_BxL.shape)
    expected[np.arange(4), LAST_B] = reward_model_scores()

    def check(place):
        got, metrics, _ = scored(kl_coef=0.0, shaped_reward=place)
        np.testing.assert_allclose(rewards_of(got.return_BxL), expected, atol=2e-6)
        assert metrics["objective/non_score_reward"] == pytest.approx(0.0, abs=1e-6)

    def zero_means_the_default(score_B, kl_BxT, mask_BxT, kl_coef):
        beta = jnp.where(kl_coef == 0, 0.02, kl_coef)
        return shaped_reward(score_B, kl_BxT, mask_BxT, beta)

    def a_floor_under_beta(score_B, kl_BxT, mask_BxT, kl_coef):
        return shaped_reward(score_B, kl_BxT, mask_BxT, jnp.maximum(kl_coef, 1e-3))

    rejects(check, shaped_reward, zero_means_the_default, a_floor_under_beta)


def text_batch():
    return dataclasses.replace(tiny.text(3, 6), layout=padded_layout(
        3 + tiny.tokens(3, 6) % (bigram.VOCAB - 3), np.ones((3, 6), bool)
    ))  # fmt: skip


def test_zero_gamma_is_a_value_and_its_text_is_still_measured():
    config = dataclasses.replace(NO_TEXT, ptx_at_zero="measure")
    episodes, text = scored(config)[0], text_batch()
    update, start = bigram_update(config)
    logp = np.asarray(bigram.token_logprobs(POLICY(), None, text.layout))
    with on_bigram():
        gradient = jax.jit(
            jax.grad(lambda p: ppo.policy_objective(ANY_MODEL, config)(p, episodes)[0])
        )
        grads = gradient(POLICY())
    optimizer = make_optimizer(FAST, 10)
    plain = apply_gradients(create(POLICY(), optimizer), grads, optimizer)

    def check(change):
        with pytest.MonkeyPatch.context() as patch:
            bigram.install(patch)
            run = change(patch)
            state, metrics = run(start(POLICY(), VALUE()), episodes, text)
        np.testing.assert_allclose(state.policy.params["table"], plain.params["table"], atol=1e-5)
        expected = oracles.masked_nll(logp, text.weight_BxL != 0)
        assert "ptx/nll" in metrics
        np.testing.assert_allclose(metrics["ptx/nll"], expected, rtol=1e-5)

    def as_written(patch):
        return update

    def zero_means_the_default(patch):
        gamma = config.ptx_coef or PpoConfig().ptx_coef
        return bigram_update(dataclasses.replace(config, ptx_coef=gamma))[0]

    def the_text_is_left_out(patch):
        return bigram_update(NO_TEXT)[0]

    rejects(check, as_written, zero_means_the_default, the_text_is_left_out)


def test_gamma_is_not_the_discount():
    def check(advantage_of):
        def gae(reward, value, mask, discount, gae_lambda):
            return advantage_of(reward, value, mask, discount, gae_lambda)

        plain = scored(generalized_advantage=gae)[0]
        first = MASK_BxL.argmax(axis=1)
        undiscounted = plain.return_BxL[np.arange(4), first]
        np.testing.assert_allclose(undiscounted, reward_model_scores(), atol=1e-5)
        text = scored(dataclasses.replace(PLAIN, ptx_coef=27.8), generalized_advantage=gae)[0]
        np.testing.assert_array_equal(text.return_BxL, plain.return_BxL)
        short = scored(dataclasses.replace(PLAIN, discount=0.5), generalized_advantage=gae)[0]
        powers = 0.5 ** (LAST_B - first)
        np.testing.assert_allclose(
            short.return_BxL[np.arange(4), first], powers * reward_model_scores(), atol=1e-5
        )

    def gamma_of_ptx_discounts(reward, value, mask, discount, gae_lambda):
        return generalized_advantage(reward, value, mask, PLAIN.ptx_coef, gae_lambda)

    def a_discount_by_default(reward, value, mask, discount, gae_lambda):
        return generalized_advantage(reward, value, mask, min(discount, 0.99), gae_lambda)

    def lambda_and_discount_exchanged(reward, value, mask, discount, gae_lambda):
        return generalized_advantage(reward, value, mask, gae_lambda, discount)

    rejects(
        check,
        generalized_advantage,
        gamma_of_ptx_discounts,
        a_discount_by_default,
        lambda_and_discount_exchanged,
    )
