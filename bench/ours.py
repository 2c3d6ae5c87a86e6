"""Our side: the step functions and programs of the stages, jitted as the stages jit them."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench import cases
from bench.cases import Case, Shape
from instructax.batches import (
    ComparisonBatch,
    LmBatch,
    PromptBatch,
    padded_layout,
    scored_slots,
)
from instructax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, PpoConfig
from instructax.data.comparisons import family_sizes, layout_rows
from instructax.models import functional as model
from instructax.rl import generate
from instructax.runtime import mesh, profile
from instructax.stages import iteration
from instructax.stages.context import Run
from instructax.steps import rollout
from instructax.steps.optimizer import make_optimizer
from instructax.steps.reward import reward_step
from instructax.steps.sft import lm_step
from instructax.steps.state import PpoState, create

PACKAGES = ("jax", "jaxlib", "flax", "optax")

# AdamW as torch has it by default, so that both sides do the same arithmetic.
ADAMW = OptimizerConfig(
    learning_rate=1e-5, schedule="constant", b2=0.999, weight_decay=0.01, max_grad_norm=None
)
NEVER = -1  # an id that no token has: no response ends early


def model_config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        num_layers=shape.num_layers,
        d_model=shape.d_model,
        num_heads=shape.num_heads,
        vocab_size=shape.vocab_size,
        context_length=shape.context_length,
        compute_dtype=shape.dtype,
        remat=shape.remat,
    )


def build(case: Case) -> Callable[[], Any]:
    """One unit of the case's work; its results are there when it returns."""
    # A token of every row reads all weights: where they are many, each device reads its part of them.
    by_weights = case.work.kind == "generate" and case.shape != cases.SMALL
    lay = mesh.make_mesh(MeshConfig(1, 1, -1) if by_weights else MeshConfig())
    with jax.set_mesh(lay):
        once = _BUILD[case.work.kind](case, lay)

    def on_mesh():
        with jax.set_mesh(lay):
            return jax.block_until_ready(once())

    return on_mesh


def text_batch(case: Case) -> LmBatch:
    token_BxL, response_BxL = cases.texts(case)
    layout = padded_layout(token_BxL, np.ones(token_BxL.shape, bool))
    weight_BxL = response_BxL.astype(np.float32)
    return LmBatch(layout, weight_BxL, scored_slots(weight_BxL))


def comparison_batch(case: Case) -> ComparisonBatch:
    """Every prompt's responses behind one copy of it, or (form "sequences") each behind its own."""
    prompt_NxP, response_NxKxT, rank_NxK = cases.rankings(case)
    valid_NxK = np.ones(rank_NxK.shape, bool)
    if case.form == "sequences":
        token_NxKxL = cases.sequences(case)
        token_BxL = token_NxKxL.reshape(-1, token_NxKxL.shape[2])
        layout = padded_layout(token_BxL, np.ones(token_BxL.shape, bool))
        row_NxK = np.arange(rank_NxK.size, dtype=np.int32).reshape(rank_NxK.shape)
        last_NxK = np.full(rank_NxK.shape, token_BxL.shape[1] - 1, np.int32)
        return ComparisonBatch(layout, row_NxK, last_NxK, rank_NxK, valid_NxK)
    work = case.work
    length = work.prompt + work.ways * work.response
    layout, row_NxK, last_NxK, valid_NxK = layout_rows(
        list(prompt_NxP),
        [list(response_KxT) for response_KxT in response_NxKxT],
        rows=work.rows,
        row_length=length,
        pad_id=0,
        max_responses=work.ways,
        families=family_sizes(
            [work.prompt],
            [work.response],
            ways=work.ways,
            most_in_row=1,
            row_scores=model.row_scores(length),
            tile=model.family_tile(),
        ),
    )
    return ComparisonBatch(layout, row_NxK, last_NxK, rank_NxK, valid_NxK)


def prompt_batch(case: Case) -> PromptBatch:
    token_BxP = cases.prompts(case)
    rows = token_BxP.shape[0]
    return PromptBatch(token_BxP, np.ones(token_BxP.shape, bool), np.arange(rows, dtype=np.int32))


def no_text(updates: int) -> LmBatch:
    """Pretraining text is not read at gamma = 0: one row of two tokens an update stands in for it."""
    layout = padded_layout(np.zeros((1, 2), np.int32), np.zeros((1, 2), bool))
    rows = LmBatch(layout, np.zeros((1, 2), np.float32))
    return jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (updates, *x.shape)), rows)


def _params(case: Case, lay, head: str, seed: int = 0):
    config = model_config(case.shape)
    return mesh.init_sharded(lay, lambda: model.init(jax.random.key(seed), config, head))


def _training(case: Case, lay, head: str, step, batch) -> Callable[[], Any]:
    optimizer = make_optimizer(ADAMW, 1000)
    config = model_config(case.shape)
    state = mesh.init_sharded(
        lay, lambda: create(model.init(jax.random.key(0), config, head), optimizer)
    )
    placed = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(
        functools.partial(step, key=None, model_config=config, optimizer=optimizer),
        donate_argnums=0,
        out_shardings=(placed, None),
    )

    def once():
        nonlocal state
        state, metrics = jitted(state, mesh.put_batch(lay, batch))
        return metrics

    return once


def _sft(case: Case, lay) -> Callable[[], Any]:
    return _training(case, lay, "lm", lm_step, text_batch(case))


def _reward(case: Case, lay) -> Callable[[], Any]:
    return _training(case, lay, "scalar", reward_step, comparison_batch(case))


@contextlib.contextmanager
def ending_after(length_N: np.ndarray) -> Iterator[None]:
    """Programs traced in here draw as ever, but a response ends where its episode's length says."""

    class Ending(generate.Drawing):
        def __call__(self, key, episode_B, t, logits_BxV):
            token_B, logp_B, _ = super().__call__(key, episode_B, t, logits_BxV)
            ended_B = t + 1 >= jnp.asarray(length_N)[episode_B]
            return (
                token_B,
                logp_B,
                jnp.where(ended_B, generate.ENDED_BY_EOS, generate.CUT_BY_LENGTH),
            )

    with (
        mock.patch.object(generate, "Drawing", Ending),
        mock.patch.object(rollout, "Drawing", Ending),
    ):
        yield


def _generate(case: Case, lay) -> Callable[[], Any]:
    params, key = _params(case, lay, "lm"), jax.random.key(1)
    sample = jax.jit(
        functools.partial(
            rollout.sample_responses,
            model_config=model_config(case.shape),
            response_length=case.work.response,
            temperature=1.0,
            eos_id=NEVER,
            pad_id=0,
            slots=case.work.slots,
        )
    )

    def once():
        drawn = case.work.mean is not None
        with ending_after(cases.lengths(case)) if drawn else contextlib.nullcontext():
            return sample(params, key, mesh.put_batch(lay, prompt_batch(case)))

    return once


def ppo_config(case: Case) -> Config:
    work = case.work
    return Config(
        model=model_config(case.shape),
        ppo=PpoConfig(
            ptx_coef=0.0,
            ptx_at_zero="skip",
            batch_size=work.rows,
            minibatch_size=work.rows,
            inner_epochs=work.epochs,
            policy_optimizer=ADAMW,
            value_optimizer=ADAMW,
            missing_eos="none",
            prompt_length=work.prompt,
            response_length=work.response,
        ),
    )


def _ppo(case: Case, lay) -> Callable[[], Any]:
    config = ppo_config(case)
    optimizer = make_optimizer(ADAMW, 1000)
    ids: Any = SimpleNamespace(eos_id=NEVER, pad_id=0)
    run = Run(config, Path(), lay, ids)
    reference, reward = _params(case, lay, "lm"), _params(case, lay, "scalar", 1)

    def fresh(policy, value) -> PpoState:
        return PpoState(
            create(policy, optimizer),
            create(value, optimizer),
            jax.tree.map(jnp.copy, policy),
            jnp.asarray(config.ppo.kl_coef, jnp.float32),
            jnp.zeros((), jnp.int32),
        )

    placed = jax.tree.map(
        lambda x: x.sharding, mesh.abstract_sharded(lay, fresh, reference, reward)
    )
    state = jax.jit(fresh, out_shardings=placed)(reference, reward)
    scale = {"gain": 1.0, "bias": 0.0}
    iterate = iteration.programs(
        run, lambda: (reference, reward), scale, optimizer, optimizer, placed
    )
    text, prompts, done = no_text(case.work.epochs), prompt_batch(case), 0

    def once():
        nonlocal state, done
        state, metrics = iterate(state, done, prompts, text)
        done += 1
        return metrics

    return once


_BUILD = {"sft": _sft, "reward": _reward, "generate": _generate, "ppo": _ppo}


def went(once: Callable[[], Any]) -> dict[str, float]:
    """Seconds of ``once`` under the profiler: all, those in which no operation ran, and by kind on the mean device."""
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        began = time.perf_counter()
        once()
        found = {"all": time.perf_counter() - began}
        jax.profiler.stop_trace()
        events = profile.read(Path(folder))
    found["between programs"] = found["all"] - profile.busy_time(events) / 1e9
    for (_, name), nanoseconds in profile.own_time(events).items():
        kind = profile.kind(name)
        found[kind] = found.get(kind, 0.0) + nanoseconds / 1e9 / jax.device_count()
    return found


def rates(device: str) -> tuple[float, float]:
    """(FLOP/s of a large matrix product in the device's dtype, bytes/s of a copy), best of several."""
    size, dtype = (8192, jnp.bfloat16) if device == "gpu" else (3072, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    line = jnp.zeros(2**27, jnp.float32)
    product, copied = jax.jit(lambda x: x @ x), jax.jit(lambda line: line + 1.0)
    return 2 * size**3 / _best(product, x), 2 * line.nbytes / _best(copied, line)


def _best(function, argument, times: int = 5) -> float:
    jax.block_until_ready(function(argument))
    found = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(function(argument))
        found.append(time.perf_counter() - began)
    return min(found)
