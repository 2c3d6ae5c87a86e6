"""Every file in configs/ loads, is consistent, and its three train steps trace at its own sizes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from instructax import presence
from instructax.batches import ComparisonBatch, Layout, LmBatch, PromptBatch, Responses
from instructax.config import Config
from instructax.models import functional as model
from instructax.resolve import apply_arm, load_config
from instructax.stages import sft
from instructax.steps.optimizer import make_optimizer
from instructax.steps.ppo import ppo_iteration
from instructax.steps.reward import reward_step
from instructax.steps.rollout import score_rollout
from instructax.steps.sft import lm_step
from instructax.steps.state import PpoState, create
from instructax.validation import validate

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.py"))


def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def layout(rows: int, length: int) -> Layout:
    return Layout(*(array((rows, length), jnp.int32) for _ in range(4)))


def lm_batch(rows: int, length: int) -> LmBatch:
    return LmBatch(layout(rows, length), array((rows, length), jnp.float32))


def comparisons(rows: int, prompts: int, length: int, k: int) -> ComparisonBatch:
    index = array((prompts, k), jnp.int32)
    return ComparisonBatch(
        layout(rows, length), index, index, index, array((prompts, k), jnp.bool_)
    )


@pytest.fixture(params=FILES, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))
def config(request, tmp_path, monkeypatch) -> Config:
    monkeypatch.setenv("INSTRUCTAX_DATA", str(tmp_path))
    monkeypatch.setattr(presence, "file_rules", lambda config, verb: iter(()))
    return load_config(request.param)


def test_it_is_consistent_for_the_verbs_it_names_and_so_is_every_arm(config, request):
    file = request.node.callspec.params["config"]
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8")))
    verbs = set(re.findall(r"instructax (\w+) --config", docstring))
    assert verbs, "the docstring gives the command"
    for verb in verbs:
        validate(config, verb)
    if not verbs & {"run", "ppo"}:
        return
    assert len({arm.name for arm in config.arms}) == len(config.arms)
    for arm in config.arms:
        validate(apply_arm(config, arm), "ppo")


KEY = jax.eval_shape(lambda: jax.random.key(0))


def started(model_config, head, optimizer):
    """Shapes of a network in training; nothing is computed."""
    return jax.eval_shape(
        lambda: create(model.init(jax.random.key(0), model_config, head), optimizer)
    )


def test_its_steps_trace(config):
    """Shapes only: a 175b config costs no memory here. Batches of two rows, lengths as configured."""
    reward_config = config.model if config.reward.model is None else config.reward.model
    rows = 2

    c = config.sft
    optimizer = make_optimizer(c.optimizer, 10)
    model_config = sft.network(config.model, c)
    step = functools.partial(lm_step, model_config=model_config, optimizer=optimizer)
    state = started(model_config, "lm", optimizer)
    after, _ = jax.eval_shape(step, state, lm_batch(rows, c.row_length), KEY)
    assert after == state

    r = config.reward
    optimizer = make_optimizer(r.optimizer, 10)
    step = functools.partial(
        reward_step, model_config=reward_config, optimizer=optimizer, loss=r.loss
    )
    state = started(reward_config, "scalar", optimizer)
    batch = comparisons(rows, 3, r.row_length, r.max_responses)
    after, _ = jax.eval_shape(step, state, batch, None)
    assert after == state

    for arm in config.arms:
        _trace_ppo(apply_arm(config, arm), reward_config)


def _trace_ppo(config: Config, reward_config) -> None:
    c = dataclasses.replace(config.ppo, minibatch_size=2 * config.ppo.grad_accumulation)
    episodes = 2 * c.minibatch_size
    policy_optimizer = make_optimizer(c.policy_optimizer, 10)
    value_optimizer = make_optimizer(c.value_optimizer, 10)
    policy = started(config.model, "lm", policy_optimizer)
    value = started(reward_config, "scalar", value_optimizer)
    scalar = array((), jnp.float32)
    state = PpoState(policy, value, policy.params, scalar, array((), jnp.int32))

    def of(length, dtype):
        return array((episodes, length), dtype)

    ids = array((episodes,), jnp.int32)
    prompts = PromptBatch(of(c.prompt_length, jnp.int32), of(c.prompt_length, jnp.bool_), ids)
    responses = Responses(
        of(c.response_length, jnp.int32),
        of(c.response_length, jnp.bool_),
        of(c.response_length, jnp.float32),
        ids,
    )
    score = functools.partial(
        score_rollout, config=c, model_config=config.model, reward_config=reward_config, eos_id=1
    )
    rollout, metrics, _ = jax.eval_shape(
        score, policy.params, policy.params, value.params, value.params, prompts, responses,
        scalar, KEY,
    )  # fmt: skip
    updates = 2 * c.inner_epochs
    text = jax.tree.map(
        lambda x: array((updates, *x.shape), x.dtype), lm_batch(c.minibatch_size, c.ptx_row_length)
    )
    after, _ = jax.eval_shape(
        functools.partial(
            ppo_iteration,
            config=c,
            model_config=config.model,
            reward_config=reward_config,
            policy_optimizer=policy_optimizer,
            value_optimizer=value_optimizer,
        ),
        state, rollout, text, metrics["objective/kl"],
        array((updates, episodes // 2, c.prompt_length + c.response_length), jnp.int32),
    )  # fmt: skip
    assert after == state
