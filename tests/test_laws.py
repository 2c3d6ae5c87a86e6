"""What must hold for every input. Laws of the transformer and of whole steps stand, marked, beside
their modules' tests: causality, cached = uncached, chunked = dense, packed = unpacked, gamma = 0.
"""

from __future__ import annotations

import dataclasses
import functools

import apart
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import traps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from instructax import masking
from instructax.batches import padded_layout
from instructax.losses.language import masked_nll
from instructax.losses.ppo_ptx import combine_gradients
from instructax.losses.ranking import best_of_k_loss, pairwise_logistic_loss, ranked_pairs
from instructax.losses.surrogate import clipped_policy_loss
from instructax.losses.value import clipped_value_loss
from instructax.rl.gae import generalized_advantage
from instructax.rl.kl import ESTIMATORS, adaptive_kl_update, per_token_kl
from instructax.rl.rewards import apply_missing_eos, shaped_reward
from instructax.steps import ppo, rollout

pytestmark = pytest.mark.laws
law = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

ROWS, LENGTH, RESPONSES = 3, 5, 4
SHAPE = (ROWS, LENGTH)
# Multiples of 1/16: rounding stays small, and a counterexample is easy to read.
NUMBERS = st.integers(-64, 64).map(lambda n: n / 16)


def floats(shape=SHAPE):
    return hnp.arrays(np.float32, shape, elements=NUMBERS)


def bools(shape=SHAPE):
    return hnp.arrays(np.bool_, shape)


@st.composite
def stretches(draw):
    """Contiguous masks that start anywhere; some rows are empty, some full."""
    start = draw(hnp.arrays(np.int32, (ROWS, 1), elements=st.integers(0, LENGTH - 1)))
    size = draw(hnp.arrays(np.int32, (ROWS, 1), elements=st.integers(0, LENGTH)))
    slot = np.arange(LENGTH)[None]
    return (slot >= start) & (slot < start + size)


@st.composite
def rankings(draw):
    shape = (ROWS, RESPONSES)
    rank = draw(hnp.arrays(np.int32, shape, elements=st.integers(0, 3)))
    return draw(floats(shape)), rank, draw(bools(shape))


def permutations(n):
    return st.permutations(range(n)).map(np.asarray)


def close(a, b, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} | tolerance
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def scores_of(x_BxT, mask_BxT):
    """One number a row that depends on nothing outside the mask."""
    return jnp.sum(jnp.where(mask_BxT, x_BxT, 0.0), axis=1)


# (mask, three arrays) -> a tree of scalars, BxT arrays and B arrays.
TOKENWISE = {
    "masked_mean": lambda m, x, y, z: masking.masked_mean(x, m),
    "masked_var": lambda m, x, y, z: masking.masked_var(x, m),
    "whiten": lambda m, x, y, z: (masking.whiten(x, m), masking.whiten(x, m, False)),
    "masked_nll": lambda m, x, y, z: (masked_nll(x, m), masked_nll(x, m, weight_BxT=y)),
    "clipped_policy_loss": lambda m, x, y, z: clipped_policy_loss(x, y, z, m, 0.2),
    "clipped_value_loss": lambda m, x, y, z: clipped_value_loss(x, y, z, m, 0.2),
    "per_token_kl": lambda m, x, y, z: [per_token_kl(x, y, m, name) for name in ESTIMATORS],
    "shaped_reward": lambda m, x, y, z: shaped_reward(scores_of(y, m), x, m, 0.3),
    "generalized_advantage": lambda m, x, y, z: generalized_advantage(x, y, m, 0.9, 0.95),
}
RANKINGS = {
    "pairwise": pairwise_logistic_loss,
    "best_of_k": best_of_k_loss,
    "ranked_pairs": ranked_pairs,
}


@functools.cache
def jitted(name):
    return jax.jit({**TOKENWISE, **RANKINGS}[name])


# --- padding is inert; permuting permutes


@pytest.mark.parametrize("name", TOKENWISE)
@law
@given(stretches(), floats(), floats(), floats(), st.sampled_from([np.nan, np.inf, -np.inf, 1e30]))
def test_padding_is_inert(name, mask, x, y, z, junk):
    """Junk outside the mask, two columns on the left, one on the right and a row of nothing."""
    plain = jitted(name)(mask, x, y, z)

    def wide(a):
        dirty = np.where(mask, a, np.float32(junk))
        return np.pad(dirty, ((0, 1), (2, 1)), constant_values=np.float32(junk))

    wide_mask = np.pad(mask, ((0, 1), (2, 1)))
    padded = jitted(name)(wide_mask, wide(x), wide(y), wide(z))

    def same(a, b):
        if np.ndim(a) == 2:
            assert not np.any(np.asarray(b)[~wide_mask])
            b = b[:ROWS, 2 : 2 + LENGTH]
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)

    jax.tree.map(same, plain, padded)


@pytest.mark.parametrize("name", TOKENWISE)
@law
@given(stretches(), floats(), floats(), floats(), permutations(ROWS))
def test_permuting_rows_permutes(name, mask, x, y, z, order):
    plain = jitted(name)(mask, x, y, z)
    moved = jitted(name)(mask[order], x[order], y[order], z[order])
    close(moved, jax.tree.map(lambda a: a[order] if np.ndim(a) == 2 else a, plain))


@pytest.mark.parametrize("name", RANKINGS)
@law
@given(rankings(), permutations(ROWS), permutations(RESPONSES))
def test_permuting_prompts_and_responses_permutes(name, drawn, prompts, responses):
    def moved(a):
        return a[prompts][:, responses]

    plain, other = jitted(name)(*drawn), jitted(name)(*map(moved, drawn))
    if name == "ranked_pairs":
        plain = [np.asarray(a)[prompts][:, responses][:, :, responses] for a in plain]
        other = list(other)
    close(other, plain)


@law
@given(permutations(4), st.sampled_from([0.0, 0.5]))
def test_permuting_episodes_permutes_the_rollout(order, beta):
    """The whole scoring: scores, KL, rewards, values, advantages whitened over the batch."""
    config = dataclasses.replace(traps.PLAIN, whiten_advantages=True, gae_lambda=0.95)

    def run(order):
        with traps.on_bigram():
            return rollout.score_rollout(
                traps.POLICY(), traps.REFERENCE(), traps.VALUE(), traps.REWARD(),
                *traps.prompts_and_responses(order), jnp.float32(beta), jax.random.key(0),
                config=config, model_config=traps.ANY_MODEL, reward_config=traps.ANY_MODEL,
                eos_id=traps.EOS,
            )  # fmt: skip

    plain, metrics, per_episode = run(np.arange(4))
    moved, other_metrics, other_per_episode = run(order)
    rows = jax.tree.map(lambda a: a[order], (plain, per_episode))
    close((moved, other_per_episode), rows, atol=2e-6)
    close(other_metrics, metrics)


# --- the ranking loss


@law
@given(rankings(), NUMBERS, hnp.arrays(np.float32, (ROWS, 1), elements=NUMBERS))
def test_only_differences_of_rewards_within_a_prompt_count(drawn, shift, shift_of_prompt):
    score, rank, valid = drawn
    for name in RANKINGS:
        close(
            jitted(name)(score + np.float32(shift) + shift_of_prompt, rank, valid),
            jitted(name)(score, rank, valid),
        )


@law
@given(floats((ROWS, 2)), st.booleans())
def test_two_responses_make_the_logistic_loss(score, second_wins):
    rank = np.tile([[1, 0]] if second_wins else [[0, 1]], (ROWS, 1))
    valid = np.ones((ROWS, 2), bool)
    margin = (score[:, 1] - score[:, 0]) if second_wins else (score[:, 0] - score[:, 1])
    expected = np.mean(np.log1p(np.exp(-margin.astype(np.float64))))
    for name in ("pairwise", "best_of_k"):
        close(jitted(name)(score, rank, valid)[0], expected)


@law
@given(rankings())
def test_every_preference_is_a_pair_once_and_reversal_reverses(drawn):
    score, rank, valid = drawn
    p, preferred = jitted("ranked_pairs")(score, rank, valid)
    q, reverse = jitted("ranked_pairs")(score, -rank, valid)
    preferred, reverse = np.asarray(preferred), np.asarray(reverse)
    np.testing.assert_array_equal(reverse, preferred.transpose(0, 2, 1))
    assert not np.any(preferred & reverse)
    close(np.where(preferred, p, 0) + np.where(reverse, q, 0).transpose(0, 2, 1), preferred * 1.0)


# --- rewards and advantages


@law
@given(stretches(), floats(), floats(), st.sampled_from([0.02, 0.5, 3.0]))
def test_shaped_reward_is_affine_in_beta_with_slope_minus_the_kl(mask, kl, x, beta):
    score = np.asarray(scores_of(x, mask))
    at = [np.asarray(shaped_reward(score, kl, mask, b)) for b in (0.0, beta, 2 * beta)]
    close(at[2] - at[0], 2 * (at[1] - at[0]))
    close((at[1] - at[0]).sum(1), -beta * np.where(mask, kl, 0.0).sum(1), atol=1e-4)
    close(at[0].sum(1), score)


@law
@given(st.sampled_from([0.0, 0.02, 1.0, 50.0]))
def test_where_the_policy_is_the_reference_beta_is_irrelevant(beta):
    plain = traps.scored()[0]

    def same_policy(logp, ref_logp, mask, estimator):
        return per_token_kl(logp, logp, mask, estimator)

    close(traps.scored(kl_coef=beta, per_token_kl=same_policy)[0], plain, atol=1e-6)
    if beta > 0:
        other = traps.scored(kl_coef=beta)[0]
        assert np.abs(other.return_BxL - plain.return_BxL).max() > 1e-3


@law
@given(bools(), floats())
def test_whitened_means_mean_zero_and_variance_one_over_real_tokens(mask, x):
    real = x[mask]
    white = np.asarray(masking.whiten(x, mask))[mask]
    kept = np.asarray(masking.whiten(x, mask, False))[mask]
    if len(real) == 0:
        return
    np.testing.assert_allclose(white.mean(), 0.0, atol=1e-4)
    np.testing.assert_allclose(kept.mean(), real.mean(), atol=1e-4)
    var = real.astype(np.float64).var()
    np.testing.assert_allclose(white.astype(np.float64).var(), var / (var + 1e-8), atol=1e-4)


@law
@given(bools(), floats(), st.sampled_from([0.5, 4.0]), NUMBERS)
def test_whitening_forgets_scale_and_shift(mask, x, scale, shift):
    if x[mask].size and x[mask].std() > 0.05:
        moved = np.float32(scale) * x + np.float32(shift)
        close(masking.whiten(moved, mask), masking.whiten(x, mask), atol=1e-4)


@law
@given(stretches(), floats(), floats(), floats(), st.sampled_from([0.0, 0.95, 1.0]))
def test_advantages_are_linear_in_rewards_and_values_together(mask, r, v, s, gae_lambda):
    def gae(r, v):
        return np.asarray(generalized_advantage(r, v, mask, 0.9, gae_lambda)[0])

    close(gae(2 * r + s, 2 * v), 2 * gae(r, v) + gae(s, np.zeros_like(v)), atol=1e-4)


@law
@given(hnp.arrays(np.float32, ROWS, elements=NUMBERS), bools((ROWS,)), NUMBERS)
def test_missing_eos_leaves_the_finished_alone(score, finished, value):
    for rule in ("replace", "subtract", "none"):
        got = np.asarray(apply_missing_eos(score, finished, rule, value))
        np.testing.assert_array_equal(got[finished], score[finished])
    np.testing.assert_array_equal(
        apply_missing_eos(score, finished, "subtract", 0.0),
        apply_missing_eos(score, finished, "none", 0.0),
    )


@law
@given(st.floats(0.001, 10), st.floats(-50, 50), st.integers(1, 512))
def test_the_controller_moves_beta_towards_its_target_and_never_far(beta, kl, episodes):
    after = float(adaptive_kl_update(beta, kl, 6.0, episodes, 512))
    assert abs(after / beta - 1) <= 0.2 * episodes / 512 + 1e-5
    if abs(kl - 6.0) > 1e-3:
        assert (after > beta) == (kl > 6.0)


@law
@given(stretches(), floats(), floats())
def test_estimators_of_the_kl_agree_to_second_order_and_k1_is_antisymmetric(mask, x, y):
    def kl(name, a, b):
        return np.asarray(per_token_kl(a, b, mask, name))

    close(kl("k1", x, y), -kl("k1", y, x))
    close(kl("abs", x, y), kl("max0", x, y) + kl("max0", y, x))
    assert kl("k2", x, y).min() >= 0 and kl("k3", x, y).min() >= -1e-6
    near = (0.01 * x).astype(np.float32)
    close(kl("k3", near, 0 * x), kl("k2", near, 0 * x), atol=2e-5)


# --- losses


@law
@given(bools(), floats(), floats(), floats())
def test_without_a_clip_the_first_step_is_reinforce_with_a_baseline(mask, logp, reward, baseline):
    """Clip = infinity, one epoch: the gradient is that of -mean (R - b) log pi, with R - b fixed."""
    advantage = reward - baseline
    n = max(1, mask.sum())

    def surrogate(x, clip_range):
        return clipped_policy_loss(x, logp, advantage, mask, clip_range)[0]

    reinforce = -np.where(mask, advantage, 0.0) / n
    close(jax.grad(surrogate)(jnp.asarray(logp), np.inf), reinforce)
    # At the old policy no ratio is outside any clip, so that the clip makes no difference.
    close(jax.grad(surrogate)(jnp.asarray(logp), 0.2), reinforce)


@law
@given(bools(), floats(), floats(), floats())
def test_an_infinite_clip_is_no_clip_away_from_the_old_policy(mask, logp, old_logp, advantage):
    got, metrics = clipped_policy_loss(logp, old_logp, advantage, mask, np.inf)
    ratio = np.exp(logp.astype(np.float64) - old_logp)
    weighted = np.where(mask, -advantage * ratio, 0.0)
    np.testing.assert_allclose(got, weighted.sum() / max(1, mask.sum()), rtol=1e-4, atol=1e-4)
    assert metrics["clipfrac"] == 0.0
    free = clipped_value_loss(logp, old_logp, advantage, mask, None)[0]
    close(clipped_value_loss(logp, old_logp, advantage, mask, np.inf)[0], free)


@law
@given(bools(), floats(), floats(), floats(), st.sampled_from([0.0, 0.2, 1.0]))
def test_clipping_never_lowers_a_loss(mask, x, y, z, clip_range):
    for loss, free in ((clipped_policy_loss, np.inf), (clipped_value_loss, None)):
        unclipped = float(loss(x, y, z, mask, free)[0])
        clipped = float(loss(x, y, z, mask, clip_range)[0])
        assert clipped >= unclipped - 1e-5 * abs(unclipped) - 1e-6


MICROBATCHED = {
    "masked_nll": lambda m, x, y, z, n: masked_nll(x, m, n)[0],
    "clipped_policy_loss": lambda m, x, y, z, n: clipped_policy_loss(x, y, z, m, 0.2, n)[0],
    "clipped_value_loss": lambda m, x, y, z, n: clipped_value_loss(x, y, z, m, 0.2, n)[0],
    "masked_mean": lambda m, x, y, z, n: masking.masked_mean(x, m, n),
}


@functools.cache
def gradient(name):
    return jax.jit(jax.value_and_grad(MICROBATCHED[name], argnums=1))


@pytest.mark.parametrize("name", MICROBATCHED)
@law
@given(bools(), floats(), floats(), floats())
def test_microbatches_add_up_to_the_full_batch(name, mask, x, y, z):
    """Rows with any number of real tokens, none included, each divided by the global count."""
    n = np.float32(mask.sum())
    arrays = mask, x, y, z
    whole = gradient(name)(*arrays, n)
    parts = [gradient(name)(*(a[b : b + 1] for a in arrays), n) for b in range(ROWS)]
    close(sum(np.asarray(loss) for loss, _ in parts), whole[0])
    close(np.concatenate([grad for _, grad in parts]), whole[1])


@law
@given(rankings())
def test_microbatches_of_prompts_add_up_to_the_full_batch(drawn):
    for loss in (pairwise_logistic_loss, best_of_k_loss):
        whole, metrics = loss(*drawn)
        parts = [
            loss(*(a[b : b + 1] for a in drawn), normalizer=metrics["prompts"])[0]
            for b in range(ROWS)
        ]
        close(np.sum(parts), whole)


@law
@given(floats(), floats(), st.sampled_from([0.0, 0.5, 27.8]))
def test_gradients_of_both_objectives_add_and_zero_leaves_ppo_untouched(a, b, gamma):
    grads, metrics = combine_gradients({"x": a}, {"x": b}, gamma)
    close(grads["x"], a + np.float32(gamma) * b, rtol=1e-6)
    norms = [float(np.linalg.norm(v.astype(np.float64))) for v in (a, b)]
    close([metrics["ppo_grad_norm"], metrics["ptx_grad_norm"]], norms)
    assert abs(float(metrics["grad_cosine"])) <= 1.0
    if gamma == 0.0:
        assert np.asarray(grads["x"]).tobytes() == a.tobytes()


@pytest.mark.parametrize("gamma", [0.5, 27.8])
def test_with_zero_advantages_the_policys_step_is_pretraining_scaled_by_gamma(gamma):
    """The whole gradient of the policy on the bigram model: no value loss reaches it."""
    config = dataclasses.replace(traps.PLAIN, ptx_coef=gamma)
    episodes = traps.scored(config)[0]
    silent = dataclasses.replace(episodes, advantage_BxL=np.zeros_like(episodes.advantage_BxL))
    token = 3 + tiny.tokens(3, 6) % 8
    text = dataclasses.replace(
        tiny.text(3, 6), layout=padded_layout(token, np.ones(token.shape, bool))
    )
    with traps.on_bigram():

        def of(episodes):
            return jax.jit(
                lambda p: ppo.policy_gradients(p, traps.ANY_MODEL, config, episodes, text)[0]
            )(traps.POLICY())

        grads, loud = of(silent), of(episodes)
        pretraining = jax.jit(
            jax.grad(lambda p: ppo.ptx_objective(traps.ANY_MODEL, config)(p, text)[0])
        )(traps.POLICY())
    scaled = jax.tree.map(lambda g: gamma * g, pretraining)
    close(grads, scaled, rtol=1e-5, atol=1e-6)
    assert np.abs(loud["table"] - scaled["table"]).max() > 1e-3


# --- devices


EIGHT = """
import functools
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
import tiny
from instructax.config import MeshConfig
from instructax.runtime import mesh
from instructax.steps.rollout import sample_responses

prompts = tiny.prompts((6, 3, 1, 4, 2, 5, 6, 2), 6)
params = tiny.params()
sample = functools.partial(
    sample_responses, model_config=tiny.MODEL, response_length=5, temperature=0.8,
    eos_id=tiny.EOS, pad_id=tiny.PAD,
)
seen = []
for count in (1, 2, 8):
    made = mesh.make_mesh(MeshConfig(), jax.devices()[:count])
    with jax.set_mesh(made):
        batch = mesh.put_batch(made, prompts)
        assert len(batch.token_BxP.addressable_shards) == count
        out = jax.jit(sample)(params, jax.random.key(0), batch)
        seen.append([np.asarray(x) for x in (out.token_BxT, out.mask_BxT, out.stop_B)])
for other in seen[1:]:
    for a, b in zip(seen[0], other, strict=True):
        np.testing.assert_array_equal(a, b)
assert len({tuple(row) for row in seen[0][0].tolist()}) > 4
print("passed")
"""


@pytest.mark.traps
def test_one_two_and_eight_devices_sample_the_same_tokens():
    """Trap T19: the keys are of episodes, so where an episode is computed does not matter."""
    apart.passes(EIGHT)
