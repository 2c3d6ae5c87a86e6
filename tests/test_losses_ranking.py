import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructax.losses import ranking

LOSSES = [ranking.pairwise_logistic_loss, ranking.best_of_k_loss]


def draw(seed, shape=(4, 5), ranks=4) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    score = (2 * rng.normal(size=shape)).astype(np.float32)
    rank = rng.integers(-3, ranks - 3, size=shape)
    return score, rank, rng.random(shape) < 0.7


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_equal_loops(seed):
    score, rank, valid = draw(seed)
    loss, metrics = ranking.pairwise_logistic_loss(score, rank, valid)
    pairs = oracles.preferred_pairs(rank, valid)
    expected = oracles.pairwise_logistic_loss(score, rank, valid)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7)
    accuracy = oracles.pairwise_accuracy(score, rank, valid)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    assert metrics["pairs"] == sum(map(len, pairs))
    assert metrics["prompts"] == sum(map(bool, pairs))
    loss, metrics = ranking.best_of_k_loss(score, rank, valid)
    expected = oracles.best_of_k_loss(score, rank, valid)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    assert metrics["prompts"] == sum(map(bool, pairs))


def test_golden():
    # Prompt 0 is a > b = c: pairs (a,b), (a,c). Prompt 1 has one response, prompt 2 one tie.
    score = np.array([[2.0, 0.0, 1.0], [5.0, 0.0, 0.0], [1.0, 2.0, 0.0]], np.float32)
    rank = np.array([[1, 7, 7], [1, 2, 3], [4, 4, 1]])
    valid = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], bool)
    loss, metrics = ranking.pairwise_logistic_loss(score, rank, valid)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["accuracy"] == 1 and metrics["pairs"] == 2 and metrics["prompts"] == 1
    assert metrics["margin"] == 1.5
    loss, metrics = ranking.best_of_k_loss(score, rank, valid)
    expected = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(1)))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["accuracy"] == 1 and metrics["prompts"] == 1


def test_pairs_are_averaged_within_a_prompt_before_prompts():
    # All scores 0: each pair costs log 2, whatever K; a mean over all pairs would hide this.
    score = np.array([[0.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    rank = np.array([[0, 1, 0, 0], [0, 1, 2, 3]])
    valid = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    loss, _ = ranking.pairwise_logistic_loss(score, rank, valid)
    np.testing.assert_allclose(loss, (math.log(1 + math.exp(3)) + math.log(2)) / 2, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_invariances(loss):
    score, rank, valid = draw(3)
    reference = loss(score, rank, valid)[0]
    order = np.random.default_rng(0).permutation(5)
    for changed in (
        (score + 3.0, rank, valid),  # only differences are identified
        (score[:, order], rank[:, order], valid[:, order]),
        (score, 10 * rank + 7, valid),  # only the order of ranks counts
        (score, rank + 2**40, valid),  # also beyond int32
        (score, (rank + 3).astype(np.uint8), valid),
        [np.pad(a, ((0, 2), (0, 1))) for a in (score, rank, valid)],
    ):
        np.testing.assert_allclose(loss(*changed)[0], reference, rtol=1e-5)


def test_best_of_two_is_the_pairwise_loss():
    score, rank, valid = draw(4, shape=(6, 2))
    np.testing.assert_allclose(
        ranking.best_of_k_loss(score, rank, valid)[0],
        ranking.pairwise_logistic_loss(score, rank, valid)[0],
        rtol=1e-6,
    )


def test_reversed_preferences_flip_the_gradient_at_equal_scores():
    rank, valid = np.array([[1, 2, 3]]), np.ones((1, 3), bool)
    grad = jax.grad(lambda s, r: ranking.pairwise_logistic_loss(s, r, valid)[0])
    forward, backward = grad(jnp.zeros((1, 3)), rank), grad(jnp.zeros((1, 3)), -rank)
    assert forward[0, 0] < 0 < forward[0, 2]  # descent raises the preferred score
    np.testing.assert_allclose(forward, -backward, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_equals_finite_differences(loss):
    score, rank, valid = draw(5)
    with jax.enable_x64(True):
        score = score.astype(np.float64)
        grad = jax.grad(lambda s: loss(s, rank, valid)[0])(jnp.asarray(score))
        assert grad.dtype == jnp.float64
    oracle = getattr(oracles, loss.__name__)
    expected = oracles.central_difference(lambda s: oracle(s, rank, valid), score)
    np.testing.assert_allclose(grad, expected, atol=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_invalid_responses_are_inert(loss, junk):
    score, rank, valid = draw(6)
    valid[3] = False
    dirty = np.where(valid, score, np.float32(junk))
    value_and_grad = jax.value_and_grad(lambda s, r: loss(s, r, valid)[0])
    clean = value_and_grad(jnp.asarray(score), rank)
    other = value_and_grad(jnp.asarray(dirty), np.where(valid, rank, -99))
    assert clean[0] == other[0]
    np.testing.assert_array_equal(clean[1], other[1])
    assert not np.any(np.asarray(clean[1])[~valid])


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_to_learn_is_zero(loss):
    score, rank, valid = draw(7)
    for r, v in ((np.zeros_like(rank), valid), (rank, np.zeros_like(valid))):
        value, grad = jax.value_and_grad(lambda s, r=r, v=v: loss(s, r, v)[0])(jnp.asarray(score))
        assert value == 0 and not np.any(grad)
        assert all(np.isfinite(m) for m in loss(score, r, v)[1].values())


@pytest.mark.parametrize("loss", LOSSES)
def test_microbatches_add_up(loss):
    score, rank, valid = draw(8)
    whole, metrics = loss(score, rank, valid)
    parts = [
        loss(score[i : i + 1], rank[i : i + 1], valid[i : i + 1], normalizer=metrics["prompts"])[0]
        for i in range(4)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_extreme_scores_stay_finite():
    score = np.array([[-1e4, 1e4]], np.float32)
    rank, valid = np.array([[0, 1]]), np.ones((1, 2), bool)
    for loss in LOSSES:
        value, grad = jax.value_and_grad(lambda s, f=loss: f(s, rank, valid)[0])(jnp.asarray(score))
        np.testing.assert_allclose(value, 2e4, rtol=1e-6)
        np.testing.assert_allclose(grad, [[-1.0, 1.0]])


def test_equal_scores_count_half():
    score, valid = np.zeros((1, 3), np.float32), np.ones((1, 3), bool)
    assert ranking.pairwise_logistic_loss(score, np.array([[1, 2, 3]]), valid)[1]["accuracy"] == 0.5
    metrics = ranking.best_of_k_loss(score, np.array([[1, 2, 3]]), valid)[1]
    np.testing.assert_allclose(metrics["accuracy"], 1 / 3)


def test_ranked_pairs_list_each_untied_pair_once_winner_first():
    score, rank, valid = draw(9)
    p, preferred = ranking.ranked_pairs(score, rank, valid)
    pairs = oracles.preferred_pairs(rank, valid)
    expected = [(b, w, l_) for b, row in enumerate(pairs) for w, l_ in row]
    assert [tuple(i) for i in np.argwhere(np.asarray(preferred)).tolist()] == expected
    for b, w, l_ in expected:
        expected_p = 1 / (1 + np.exp(score[b, l_] - score[b, w]))
        np.testing.assert_allclose(p[b, w, l_], expected_p, rtol=1e-5)
    assert not np.any(np.asarray(p)[~np.asarray(preferred)])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_door(loss):
    score, rank, valid = draw(10)
    assert loss(jnp.asarray(score, jnp.bfloat16), rank, valid)[0].dtype == jnp.float32
    for args, error, name in (
        ((rank, rank, valid), TypeError, "score_BxK"),
        ((score, score, valid), TypeError, "rank_BxK"),
        ((score, rank, rank), TypeError, "valid_BxK"),
        ((score[0], rank, valid), ValueError, "score_BxK"),
        ((score, rank[:, :2], valid), ValueError, "rank_BxK"),
    ):
        with pytest.raises(error, match=name):
            loss(*args)


def test_under_jit():
    score, rank, valid = draw(11)
    np.testing.assert_allclose(
        jax.jit(ranking.pairwise_logistic_loss)(score, rank.astype(np.int32), valid)[0],
        ranking.pairwise_logistic_loss(score, rank, valid)[0],
        rtol=1e-6,
    )
