"""The reward step: K responses behind one prompt score as K separate sequences do."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import tiny

from instructax.batches import ComparisonBatch, Layout, padded_layout
from instructax.config import OptimizerConfig
from instructax.models import functional as model
from instructax.steps import reward
from instructax.steps.optimizer import make_optimizer
from instructax.steps.reward import ranking_objective, reward_step, scores
from instructax.steps.state import create

PROMPTS = (4, 3)
RESPONSES = ((3, 5, 1), (2, 4))
GAP, WIDTH = 2, 28


def texts(seed: int = 0):
    for n, lengths in enumerate(RESPONSES):
        prompt = tiny.tokens(1, PROMPTS[n], seed=seed + 10 * n)[0]
        yield prompt, [tiny.tokens(1, m, seed + 10 * n + k + 1)[0] for k, m in enumerate(lengths)]


def batch(seed: int = 0) -> ComparisonBatch:
    """Both prompts in one row, a gap of padding between them, and room at the end."""
    token, position, segment, prefix = np.zeros((4, 1, WIDTH), np.int32)
    last, rank = np.zeros((2, 2, 3), np.int32)
    valid = np.zeros((2, 3), bool)
    at, free = 0, 1
    for n, (prompt, responses) in enumerate(texts(seed)):
        of_prompt = free
        for k, part in enumerate([prompt, *responses], start=-1):
            here = slice(at, at + part.size)
            token[0, here], segment[0, here] = part, free
            position[0, here] = np.arange(part.size) + (0 if k < 0 else prompt.size)
            at, free = at + part.size, free + 1
            if k >= 0:
                prefix[0, here] = of_prompt
                last[n, k], rank[n, k], valid[n, k] = at - 1, k, True
        at += GAP
    layout = Layout(token, position, segment, prefix)
    return ComparisonBatch(layout, np.zeros_like(last), last, rank, valid)


def separate_scores(params, seed: int = 0):
    """{(n, k): the scalar at the last token of prompt + response alone in a row, padded right}."""
    out = {}
    for n, (prompt, responses) in enumerate(texts(seed)):
        for k, response in enumerate(responses):
            token = np.concatenate([prompt, response])
            padded = np.pad(token, (0, 12 - token.size))[None]
            value = scalars()(params, padded, (np.arange(12) < token.size)[None])
            out[n, k] = float(value[0, token.size - 1])
    return out


@functools.cache
def scalars():
    return jax.jit(
        lambda params, token, mask: model.scalars(params, tiny.MODEL, padded_layout(token, mask))
    )


@functools.cache
def scored():
    return jax.jit(lambda params, batch: scores(params, tiny.MODEL, batch))


@pytest.fixture(scope="module")
def params():
    return tiny.params(head="scalar")


@pytest.mark.laws
def test_scores_of_a_shared_row_are_those_of_separate_passes(params):
    b = batch()
    score = np.asarray(scored()(params, b))
    for (n, k), expected in separate_scores(params).items():
        assert score[n, k] == pytest.approx(expected, abs=2e-6)
    assert np.ptp(score[b.valid_NxK]) > 0.1


def test_the_score_is_read_at_the_last_real_token(params):
    """Another last token moves a response's own score and no other (trap T3)."""
    b = batch()
    before = np.asarray(scored()(params, b))
    token = b.layout.token_BxL.copy()
    slot = b.last_NxK[0, 1]
    token[0, slot] = 3 + (token[0, slot] - 2) % (tiny.VOCAB - 3)
    layout = Layout(token, b.layout.position_BxL, b.layout.segment_BxL, b.layout.prefix_BxL)
    after = scored()(
        params, ComparisonBatch(layout, b.row_NxK, b.last_NxK, b.rank_NxK, b.valid_NxK)
    )
    moved = np.abs(np.asarray(after) - before) > 1e-6
    expected = np.zeros_like(moved)
    expected[0, 1] = True
    np.testing.assert_array_equal(moved[b.valid_NxK], expected[b.valid_NxK])


def test_a_shift_moves_every_score_and_leaves_the_loss(params):
    b = batch()
    shifted = model.shift_scalars(params, -2.5)
    difference = np.asarray(scored()(shifted, b) - scored()(params, b))[b.valid_NxK]
    np.testing.assert_allclose(difference, -2.5, atol=1e-5)
    loss = jax.jit(lambda params, b: ranking_objective(tiny.MODEL)(params, b)[0])
    assert float(loss(shifted, b)) == pytest.approx(float(loss(params, b)), abs=1e-5)


@pytest.mark.parametrize("name", ["pairwise", "best_of_k"])
def test_training_orders_the_responses(params, name):
    b = batch()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 30)
    step = jax.jit(
        functools.partial(reward_step, model_config=tiny.MODEL, optimizer=optimizer, loss=name)
    )
    state, first = step(create(params, optimizer), b, None)
    for _ in range(29):
        state, last = step(state, b, None)
    assert float(last["loss/loss"]) < 0.2 * float(first["loss/loss"])
    score = np.asarray(scored()(state.params, b))
    assert score[0].argmax() == 0 and score[1, 0] > score[1, 1]
    if name == "pairwise":
        assert np.all(np.diff(score[0]) < 0)


def several_rows(rows: int) -> ComparisonBatch:
    """Row 0 holds two prompts, row 1 all ties, row 2 nothing, of the others each one of :func:`batch`'s."""
    whole = [batch(seed) for seed in range(rows)]
    layout = jax.tree.map(lambda *x: np.concatenate(x), *(b.layout for b in whole))
    row, last, rank, valid = (
        np.concatenate([getattr(b, name) for b in whole])
        for name in ("row_NxK", "last_NxK", "rank_NxK", "valid_NxK")
    )
    row = np.where(valid, row + np.arange(rows).repeat(2)[:, None], 0).astype(np.int32)
    rank[2:4], valid[4:6] = 1, False
    valid[7::2] = False
    # Neither prompts nor valid entries lie in the order of rows.
    order = np.random.default_rng(0).permutation(2 * rows)
    return ComparisonBatch(layout, row[order], last[order], rank[order], valid[order])


@pytest.mark.laws
@pytest.mark.parametrize("name", ["pairwise", pytest.param("best_of_k", marks=pytest.mark.slow)])
def test_microbatches_take_the_step_of_the_full_batch(params, name, monkeypatch):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-2), 10)
    b = several_rows(8)

    def step(microbatches: int):
        compiled = jax.jit(
            functools.partial(
                reward_step, model_config=tiny.MODEL, optimizer=optimizer, loss=name,
                microbatches=microbatches,
            )
        )  # fmt: skip
        state, metrics = compiled(create(params, optimizer), b, None)
        return state.params, metrics

    whole = step(1)
    assert float(whole[1]["loss/prompts"]) == 2 + 5
    for microbatches in (2, 4):
        tiny.assert_close(step(microbatches), whole, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(
        reward, "ranking_objective", lambda *a: tiny.mean_of_means(ranking_objective(*a), 4)
    )
    with pytest.raises(AssertionError):
        tiny.assert_close(step(4)[0], whole[0], rtol=1e-3, atol=1e-3)


def test_scores_of_microbatches_are_those_of_the_batch(params):
    b = several_rows(8)
    whole = np.asarray(scored()(params, b))
    parts = jax.jit(lambda params, b: scores(params, tiny.MODEL, b, microbatches=4))(params, b)
    np.testing.assert_allclose(np.asarray(parts)[b.valid_NxK], whole[b.valid_NxK], atol=1e-5)
