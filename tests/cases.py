"""Every pure public function with its oracle and a way to draw its arguments.

The oracle tests compare them in float64, bench/numerics.py in float32 and under bfloat16. A case's
``run`` and ``oracle`` take the same arguments and return lists of arrays in the same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from instructax import logprobs, masking
from instructax.config import OptimizerConfig
from instructax.losses.language import masked_nll
from instructax.losses.ppo_ptx import combine_gradients
from instructax.losses.ranking import best_of_k_loss, pairwise_logistic_loss, ranked_pairs
from instructax.losses.surrogate import clipped_policy_loss
from instructax.losses.value import clipped_value_loss
from instructax.rl.gae import generalized_advantage
from instructax.rl.kl import ESTIMATORS, adaptive_kl_update, per_token_kl
from instructax.rl.rewards import MISSING_EOS_RULES, apply_missing_eos, shaped_reward
from instructax.rl.sampling import sample_tokens
from instructax.steps.optimizer import learning_rate, make_optimizer
from instructax.steps.state import apply_gradients, create, move_average


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    draw: Callable[
        [np.random.Generator, tuple[int, int]], tuple
    ]  # (rng, (rows, length)) -> arguments
    run: Callable[..., Any]
    oracle: Callable[..., Any]
    wrt: tuple[int, ...] = ()  # arguments that carry a gradient
    tolerance: float = 1e-10  # in float64; wider where a docstring promises float32

    @staticmethod
    def leaves(tree) -> list[np.ndarray]:
        return [np.asarray(x) for x in jax.tree.leaves(tree)]

    def outputs(self, *arguments) -> list[np.ndarray]:
        return self.leaves(self.run(*arguments))

    def expected(self, *arguments) -> list[np.ndarray]:
        return self.leaves(self.oracle(*arguments))


def _mask(rng, shape):
    mask = rng.random(shape) < 0.7
    mask[0, 0] = True
    return mask


def _stretch(rng, shape):
    rows, length = shape
    start = rng.integers(0, length, (rows, 1))
    stop = start + rng.integers(0, length + 1, (rows, 1))
    slot = np.arange(length)[None]
    return (slot >= start) & (slot < stop) | (np.arange(rows)[:, None] == 0)


def _logp(rng, shape):
    return -rng.exponential(size=shape)


def tokens_and_mask(rng, shape):
    return rng.normal(size=shape), _mask(rng, shape)


def _nll(rng, shape):
    return _logp(rng, shape), _mask(rng, shape)


def _weighted_nll(rng, shape):
    return *_nll(rng, shape), 0.1 + rng.random(shape)


def _ranking(rng, shape):
    rows = shape[0]
    score, rank = 2 * rng.normal(size=(rows, 6)), rng.integers(0, 5, (rows, 6))
    return score, rank, rng.random((rows, 6)) < 0.8


def _surrogate(rng, shape):
    old = _logp(rng, shape)
    return old + 0.4 * rng.normal(size=shape), old, rng.normal(size=shape), _mask(rng, shape)


def _values(rng, shape):
    return *(rng.normal(size=shape) for _ in range(3)), _mask(rng, shape)


def _two_logp(rng, shape):
    return _logp(rng, shape), _logp(rng, shape), _mask(rng, shape)


def _rewards(rng, shape):
    return rng.normal(size=shape[0]), 0.1 * rng.normal(size=shape), _stretch(rng, shape)


def _gae(rng, shape):
    return rng.normal(size=shape), rng.normal(size=shape), _stretch(rng, shape)


def _controller(rng, shape):
    return (np.asarray(rng.random()), np.asarray(12 * rng.random()))


def _scores(rng, shape):
    return rng.normal(size=shape[0]), rng.random(shape[0]) < 0.5


def _gradients(rng, shape):
    return rng.normal(size=shape).ravel(), rng.normal(size=shape).ravel()


def _unembedding(rng, shape):
    rows, length = min(shape[0], 3), min(shape[1], 7)
    x, table = rng.normal(size=(rows, length, 5)), 2 * rng.normal(size=(16, 5))
    return x, table, rng.integers(0, 13, (rows, length))


def _logits(rng, shape):
    return (2 * rng.normal(size=(shape[0], 40)),)


def _updates(rng, shape):
    return (rng.normal(size=7), 1e-3 * rng.normal(size=(6, 7)))


def _average(rng, shape):
    return (np.ones(()), 1 + 0.1 * rng.normal(size=50))


def _nothing(rng, shape):
    return ()


SCHEDULES = [
    OptimizerConfig(learning_rate=1e-3, schedule=name, warmup_steps=warm, warmup_from=0.1)
    for name in ("cosine", "linear", "constant")
    for warm in (0, 10)
]


def _schedules():
    return jnp.stack([learning_rate(c, 100)(step) for c in SCHEDULES for step in range(0, 120, 7)])


def _schedules_oracle():
    return np.array(
        [
            oracles.learning_rate(
                step, c.learning_rate, c.schedule, c.final_fraction, c.warmup_steps,
                c.warmup_from, 100,
            )
            for c in SCHEDULES
            for step in range(0, 120, 7)
        ]
    )  # fmt: skip


def _adam(inside):
    config = OptimizerConfig(
        learning_rate=0.01, schedule="linear", eps=1e-5, max_grad_norm=None,
        eps_inside_correction=inside,
    )  # fmt: skip

    def run(start, grads):
        optimizer = make_optimizer(config, len(grads))
        state = create({"x": jnp.asarray(start)}, optimizer)
        for g in grads:
            state = apply_gradients(state, {"x": jnp.asarray(g)}, optimizer)
        return state.params["x"]

    def oracle(start, grads):
        def rate(step):
            return oracles.learning_rate(step, 0.01, "linear", 0.1, 0, 0.0, len(grads))

        return oracles.adam(start, grads, rate, 0.9, 0.95, 1e-5, inside)

    return run, oracle


def _averaged(start, values):
    ema = {"x": jnp.asarray(start)}
    for value in values:
        ema = move_average(ema, {"x": jnp.asarray(value)}, 0.992)
    return ema["x"]


def _keys(logits):
    return jax.random.split(jax.random.key(0), logits.shape[0])


def _drawn_logp(options):
    """The log-probability of what was drawn; which token that is, is the draw's own affair."""

    def run(logits):
        return sample_tokens(_keys(logits), logits, **options)[1]

    def oracle(logits):
        token, _ = sample_tokens(_keys(logits), logits, **options)
        told = {**options, "temperature": options["temperature"] or 1.0}
        p = [oracles.next_token_distribution(row, **told) for row in logits]
        return np.log([row[t] for row, t in zip(p, np.asarray(token), strict=True)])

    return run, oracle


CASES = [
    Case("masked_mean", tokens_and_mask, masking.masked_mean, oracles.masked_mean, (0,)),
    Case("masked_var", tokens_and_mask, masking.masked_var, oracles.masked_var, (0,)),
    Case("whiten", tokens_and_mask, masking.whiten, lambda x, m: oracles.whiten(x, m, True), (0,)),
    Case("whiten, mean kept", tokens_and_mask, lambda x, m: masking.whiten(x, m, False),
         lambda x, m: oracles.whiten(x, m, False), (0,)),
    Case("last_token_index", lambda rng, s: (_stretch(rng, s),), masking.last_token_index,
         lambda m: np.array(oracles.last_token_index(m))),
    Case("masked_nll", _nll, lambda x, m: masked_nll(x, m)[0], oracles.masked_nll, (0,)),
    Case("masked_nll, weighted", _weighted_nll, lambda x, m, w: masked_nll(x, m, weight_BxT=w)[0],
         oracles.masked_nll, (0, 2)),
    Case("masked_nll, metrics", _weighted_nll,
         lambda x, m, w: [masked_nll(x, m)[1], masked_nll(x, m, weight_BxT=w)[1]],
         lambda x, m, w: [oracles.masked_nll_metrics(x, m), oracles.masked_nll_metrics(x, m, w)]),
    Case("pairwise_logistic_loss", _ranking, lambda *a: pairwise_logistic_loss(*a)[0],
         oracles.pairwise_logistic_loss, (0,)),
    Case("best_of_k_loss", _ranking, lambda *a: best_of_k_loss(*a)[0], oracles.best_of_k_loss, (0,)),
    Case("pairwise_logistic_loss, metrics", _ranking, lambda *a: pairwise_logistic_loss(*a)[1],
         lambda *a: oracles.ranking_metrics(*a)[0]),
    Case("best_of_k_loss, metrics", _ranking, lambda *a: best_of_k_loss(*a)[1],
         lambda *a: oracles.ranking_metrics(*a)[1]),
    Case("ranked_pairs", _ranking, ranked_pairs, oracles.ranked_pairs),
    Case("clipped_policy_loss", _surrogate, lambda *a: clipped_policy_loss(*a, 0.2)[0],
         lambda *a: oracles.clipped_policy_loss(*a, 0.2)["loss"], (0,)),
    Case("clipped_policy_loss, metrics", _surrogate, lambda *a: clipped_policy_loss(*a, 0.2)[1],
         lambda *a: oracles.clipped_policy_loss(*a, 0.2)),
    Case("clipped_value_loss", _values, lambda *a: clipped_value_loss(*a, 0.2)[0],
         lambda *a: oracles.clipped_value_loss(*a, 0.2)["loss"], (0,)),
    Case("clipped_value_loss, no clip", _values, lambda *a: clipped_value_loss(*a, None)[0],
         lambda *a: oracles.clipped_value_loss(*a, None)["loss"], (0,)),
    Case("clipped_value_loss, metrics", _values, lambda *a: clipped_value_loss(*a, 0.2)[1],
         lambda *a: oracles.clipped_value_loss(*a, 0.2)),
    *(
        Case(f"per_token_kl, {name}", _two_logp,
             lambda x, y, m, name=name: per_token_kl(x, y, m, name),
             lambda x, y, m, name=name: oracles.per_token_kl(x, y, m, name), (0, 1))
        for name in ESTIMATORS
    ),
    Case("adaptive_kl_update", _controller,
         lambda beta, kl: adaptive_kl_update(jnp.asarray(beta), jnp.asarray(kl), 6.0, 512, 10_000),
         lambda beta, kl: oracles.adaptive_kl_update(beta, kl, 6.0, 512, 10_000)),
    Case("shaped_reward", _rewards, lambda *a: shaped_reward(*a, 0.02),
         lambda *a: oracles.shaped_reward(*a, 0.02), (0, 1)),
    *(
        Case(f"apply_missing_eos, {rule}", _scores,
             lambda s, f, rule=rule: apply_missing_eos(s, f, rule, -1.5),
             lambda s, f, rule=rule: np.array(oracles.apply_missing_eos(s, f, rule, -1.5)), (0,))
        for rule in MISSING_EOS_RULES
    ),
    Case("generalized_advantage", _gae, lambda *a: generalized_advantage(*a, 0.9, 0.95),
         lambda *a: oracles.generalized_advantage(*a, 0.9, 0.95), (0, 1)),
    Case("combine_gradients", _gradients,
         lambda a, b: combine_gradients(a, b, 27.8),
         lambda a, b: oracles.combine_gradients(a, b, 27.8), tolerance=2e-6),
    *(
        Case(f"chunked_token_statistics, {name}", _unembedding,
             lambda x, w, t, chunk=chunk, vocab=vocab: logprobs.chunked_token_statistics(
                 x, t, w, vocab_size=vocab, temperature=0.7, chunk=chunk),
             lambda x, w, t, vocab=vocab: oracles.chunked_token_statistics(x, t, w, vocab, 0.7),
             (0, 1))
        for name, vocab, chunk in (
            ("dense", 13, None), ("in chunks", 13, 2), ("no padded vocabulary", 16, 3)
        )
    ),
    *(
        Case(f"sample_tokens, {name}", _logits, *_drawn_logp(options))
        for name, options in {
            "plain": {"temperature": 0.7},
            "greedy": {"temperature": 0.0},
            "top-k": {"temperature": 1.0, "top_k": 5},
            "top-p": {"temperature": 1.0, "top_p": 0.8},
            "padded vocabulary": {"temperature": 1.3, "valid_vocab": 33},
        }.items()
    ),
    Case("learning_rate", _nothing, _schedules, _schedules_oracle, tolerance=2e-6),
    Case("Adam", _updates, *_adam(False), tolerance=2e-6),
    Case("Adam of TensorFlow 1", _updates, *_adam(True), tolerance=2e-6),
    Case("move_average", _average, _averaged, lambda x, v: oracles.ema(x, v, 0.992)),
]  # fmt: skip
