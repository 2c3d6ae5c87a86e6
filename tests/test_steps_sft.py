"""The language-model step: packing, weights, dropout, and that it learns."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from instructax.batches import Layout, LmBatch, padded_layout
from instructax.config import OptimizerConfig
from instructax.models import functional as model
from instructax.steps import sft
from instructax.steps.optimizer import make_optimizer
from instructax.steps.sft import lm_objective, lm_step
from instructax.steps.state import create

LENGTHS = (5, 3, 7)
WIDTH = 18


@functools.cache
def loss_and_grad():
    return jax.jit(jax.value_and_grad(lm_objective(tiny.MODEL), has_aux=True))


@pytest.fixture(scope="module")
def params():
    return tiny.params()


def examples(prompt_weight: float):
    """(tokens, weights): the first two tokens of each are its prompt; its first has no predecessor."""
    out = []
    for i, n in enumerate(LENGTHS):
        weight = np.ones(n, np.float32)
        weight[:2] = prompt_weight
        weight[0] = 0.0
        out.append((tiny.tokens(1, n, seed=i)[0], weight))
    return out


def packed(prompt_weight: float = 0.0) -> LmBatch:
    """All examples in one row, padding behind them, and a row of nothing else."""
    rows = np.zeros((4, 2, WIDTH), np.float32)
    at = 0
    for segment, (token, weight) in enumerate(examples(prompt_weight), start=1):
        here = slice(at, at + token.size)
        rows[0, 0, here], rows[1, 0, here] = token, np.arange(token.size)
        rows[2, 0, here], rows[3, 0, here] = segment, weight
        at += token.size
    token, position, segment = rows[:3].astype(np.int32)
    return LmBatch(Layout(token, position, segment, np.zeros_like(token)), rows[3])


def separate(prompt_weight: float = 0.0) -> LmBatch:
    token, weight, mask = (np.zeros((len(LENGTHS), max(LENGTHS)), t) for t in ("i4", "f4", bool))
    for i, (t, w) in enumerate(examples(prompt_weight)):
        token[i, : t.size], weight[i, : t.size], mask[i, : t.size] = t, w, True
    return LmBatch(padded_layout(token, mask), weight)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.3])
def test_packed_examples_have_the_loss_and_gradient_of_separate_ones(params, prompt_weight):
    (loss, metrics), grads = loss_and_grad()(params, packed(prompt_weight))
    (expected, others), expected_grads = loss_and_grad()(params, separate(prompt_weight))
    assert float(loss) == pytest.approx(float(expected), abs=2e-6)
    assert float(metrics["tokens"]) == float(others["tokens"])
    tiny.assert_close(grads, expected_grads, atol=1e-5)


def test_prompt_loss_weight_is_a_weight(params):
    """The loss at w is (response sum + w prompt sum) / (response tokens + w prompt tokens)."""
    layout = separate().layout
    logprobs = jax.jit(lambda params, layout: model.token_logprobs(params, tiny.MODEL, layout))
    logp = np.asarray(logprobs(params, layout), np.float64)
    response = separate(0.0).weight_BxL > 0
    prompt = (separate(1.0).weight_BxL > 0) & ~response
    for w in (0.0, 0.3, 1.0):
        (loss, metrics), _ = loss_and_grad()(params, separate(w))
        total = -logp[response].sum() - w * logp[prompt].sum()
        assert float(loss) == pytest.approx(total / (response.sum() + w * prompt.sum()), rel=1e-5)
        assert float(metrics["tokens"]) == response.sum() + (w != 0) * prompt.sum()


def test_the_loss_falls_and_dropout_needs_a_key(params):
    config = dataclasses.replace(tiny.MODEL, dropout=0.3)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), 40)
    batch = separate()

    def step(model_config):
        return jax.jit(functools.partial(lm_step, model_config=model_config, optimizer=optimizer))

    start = create(params, optimizer)
    dropping, plain = step(config), step(tiny.MODEL)
    state, first = plain(start, batch, None)
    tiny.assert_equal(dropping(start, batch, None)[0].params, state.params)

    key = jax.random.key(0)
    _, metrics = dropping(start, batch, key)
    assert float(metrics["loss/loss"]) != float(first["loss/loss"])
    # The mask is of the step and the key: the same again, another at the next step.
    tiny.assert_equal(dropping(start, batch, key)[1], metrics)
    later = dataclasses.replace(start, step=start.step + 1)
    assert float(dropping(later, batch, key)[1]["loss/loss"]) != float(metrics["loss/loss"])

    for _ in range(39):
        state, last = plain(state, batch, None)
    assert float(last["loss/loss"]) < 0.3 * float(first["loss/loss"])
    assert int(state.step) == 40


@pytest.mark.laws
def test_microbatches_take_the_step_of_the_full_batch(params, monkeypatch):
    """Rows of 11 to 0 weighted tokens: a mean of the microbatches' means is another step."""
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-4), 10)
    batch = tiny.text(8, 12)
    count = np.array([11, 1, 0, 4, 2, 10, 0, 1])[:, None]
    weight = np.where((np.arange(12) >= 1) & (np.arange(12) <= count), batch.weight_BxL, 0.0)
    weight[0, 3:7] = 0.25
    batch = LmBatch(batch.layout, weight.astype(np.float32))

    def step(microbatches: int):
        compiled = jax.jit(
            functools.partial(
                lm_step, model_config=tiny.MODEL, optimizer=optimizer, microbatches=microbatches
            )
        )
        state, metrics = compiled(create(params, optimizer), batch, None)
        return state.params, metrics

    whole = step(1)
    for microbatches in (2, 4):
        tiny.assert_close(step(microbatches), whole, rtol=2e-6, atol=2e-6)
    monkeypatch.setattr(sft, "lm_objective", lambda m: tiny.mean_of_means(lm_objective(m), 4))
    with pytest.raises(AssertionError):
        tiny.assert_close(step(4)[0], whole[0], rtol=1e-3, atol=1e-3)
