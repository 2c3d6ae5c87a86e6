"""An iteration of PPO: sample responses, score them into a frozen rollout, update on it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from instructax.rl.packing import episode_rows, scored_rows
from instructax.runtime import mesh
from instructax.stages.context import Run
from instructax.stages.sampling import prompt_plan, rollout_slots, stop_ids
from instructax.steps import ppo as ppo_steps
from instructax.steps.rollout import sample_responses, score_rollout
from instructax.steps.state import PpoState

Array = Any
Params = Any


def programs(
    run: Run,
    frozen: Callable[[], tuple[Params, Params]],
    scale: Mapping[str, float],
    policy_optimizer,
    value_optimizer,
    shardings: PpoState,
    name: str = "ppo",
) -> Callable[..., tuple[PpoState, dict[str, Any]]]:
    """(state, i, prompts, text) -> (state, metrics): an iteration's three programs in order.

    Args:
      frozen: gives (reference, reward model); what it gives is kept for scoring and no longer.
      name: says whose programs these are where one runs for the first time.
    """
    c, config = run.config.ppo, run.config
    whole = NamedSharding(run.mesh, PartitionSpec())

    def sampled_with_lengths(policy: Params, key: Array, prompt_batch, source_UxRxL):
        responses = sample_responses(
            policy,
            key,
            prompt_batch,
            source_UxRxL,
            model_config=config.model,
            response_length=c.response_length,
            temperature=c.temperature,
            eos_id=run.tokenizer.eos_id,
            pad_id=run.tokenizer.pad_id,
            stop_ids=stop_ids(run),
            slots=rollout_slots(run),
            cache_dtype=c.cache_dtype,
        )
        return responses, responses.mask_BxT.sum(axis=1)

    sample = jax.jit(sampled_with_lengths, out_shardings=(None, whole))
    score = jax.jit(
        functools.partial(
            score_rollout,
            config=c,
            model_config=config.model,
            reward_config=run.reward_model,
            eos_id=run.tokenizer.eos_id,
        )
    )
    update = jax.jit(
        functools.partial(
            ppo_steps.ppo_iteration,
            config=c,
            model_config=config.model,
            reward_config=run.reward_model,
            policy_optimizer=policy_optimizer,
            value_optimizer=value_optimizer,
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    order = jax.jit(
        functools.partial(ppo_steps.minibatch_order, episodes=c.batch_size, config=c),
        out_shardings=whole,
    )
    rollout_key = run.key("ppo/rollout")
    score_key, order_key = run.key("ppo/shuffled_scores"), run.key("ppo/minibatches")

    shards, width = mesh.shards(run.mesh), c.prompt_length + c.response_length
    known: set[str] = set()

    def announce(program: str) -> None:
        if program not in known:
            known.add(program)
            print(f"{name}: new program, {program}", flush=True)

    def rows(what: str, order_UxM, prompt_mask_BxP, length_B, parts: int):
        """Where episodes lie, and which slots of theirs are scored."""
        source_UxRxL = episode_rows(
            order_UxM, prompt_mask_BxP, length_B, c.response_length, packed=c.packed, shards=parts
        )
        scored_UxRxM = scored_rows(source_UxRxL, c.prompt_length, width)
        _, count, length = source_UxRxL.shape
        scored = length if scored_UxRxM is None else scored_UxRxM.shape[2]
        announce(f"{what} in {count} rows of {length} tokens, logits of {scored}")
        return source_UxRxL, scored_UxRxM

    def iterate(state: PpoState, i: int, prompt_batch, text) -> tuple[PpoState, dict[str, Any]]:
        began = time.perf_counter()
        batch = mesh.put_batch(run.mesh, prompt_batch)
        policy = state.policy.params
        reading = prompt_plan(run, prompt_batch)
        count, across = (prompt_batch.mask_BxP if reading is None else reading).shape[-2:]
        announce(f"sampling, prompts in {count} rows of {across} tokens")
        responses, length = sample(policy, jax.random.fold_in(rollout_key, i), batch, reading)
        length_B = np.asarray(length)  # rows are planned on the host
        sampled = time.perf_counter()
        everyone = np.arange(c.batch_size, dtype=np.int32)[None]
        planned = rows("scoring", everyone, prompt_batch.mask_BxP, length_B, shards)
        reference, reward = frozen()
        rollout, metrics, _ = score(
            policy,
            reference,
            state.value.params,
            reward,
            batch,
            responses,
            state.kl_coef,
            jax.random.fold_in(score_key, i),
            *jax.tree.map(lambda x: x[0], planned),
            # Arguments and not constants: other seeds have other scales, and the same program.
            reward_gain=scale["gain"],
            reward_bias=scale["bias"],
        )
        del reference, reward
        order_UxM = np.asarray(order(jax.random.fold_in(order_key, i)))
        parts = shards * c.grad_accumulation
        planned = rows("updates", order_UxM, prompt_batch.mask_BxP, length_B, parts)
        scored = _ready_at(rollout)
        state, update_metrics = update(state, rollout, text, metrics["objective/kl"], *planned)
        updated = _ready_at(update_metrics)
        times = {
            "timing/rollout": sampled - began,
            "timing/score": scored - sampled,
            "timing/update": updated - scored,
            "elapsed/episodes": (i + 1) * c.batch_size,
            "elapsed/time": updated - began,
            "elapsed/fps": c.batch_size / (updated - began),
        }
        return state, metrics | update_metrics | times

    return iterate


def _ready_at(arrays: Any) -> float:
    """The time at which a program's results are there; the programs of an iteration follow each other anyway."""
    jax.block_until_ready(arrays)
    return time.perf_counter()
