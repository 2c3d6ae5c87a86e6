"""The programs of pretraining, SFT, the RL init and the reward model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from instructax.batches import ComparisonBatch, Families, Layout
from instructax.config import PretrainConfig, SftConfig
from instructax.models import functional as model
from instructax.plan import least_moves, model_flops
from instructax.plan.memory import shard_bytes
from instructax.plan.program import Program, Shapes, bytes_of, shardings
from instructax.runtime import mesh as mesh_lib
from instructax.stages.reward import even_families
from instructax.stages.sft import network
from instructax.steps.accumulate import measure
from instructax.steps.optimizer import make_optimizer
from instructax.steps.reward import reward_step, scores
from instructax.steps.sft import lm_objective, lm_step

LmConfig = PretrainConfig | SftConfig


class Supervised(Shapes):
    """One loss, one network."""

    def pretraining(self) -> Iterator[Program]:
        c, m = self.config.pretrain, self.config.model
        params = self.params(m, "lm")
        yield Program(
            "pretrain/init",
            jax.jit(
                lambda: model.init(jax.random.key(0), m, "lm"), out_shardings=shardings(params)
            ),
            (),
            passed={},
        )
        optimizer = make_optimizer(c.optimizer, c.steps)

        def step(state, batch):
            return lm_step(
                state,
                batch,
                None,
                model_config=m,
                optimizer=optimizer,
                microbatches=c.grad_accumulation,
            )

        yield self._lm_training("pretrain", c, m, optimizer, step)
        yield self._lm_evaluation("pretrain", c, m, self._moments(optimizer))

    def fine_tuning(self, stage: str, c: SftConfig) -> Iterator[Program]:
        m = network(self.config.model, c)
        # A cosine's length changes no program.
        optimizer = make_optimizer(c.optimizer, 1000)

        def step(state, batch):
            key = jax.random.key(0) if c.dropout != 0.0 else None
            return lm_step(
                state,
                batch,
                key,
                model_config=m,
                optimizer=optimizer,
                microbatches=c.grad_accumulation,
            )

        yield self._lm_training(stage, c, m, optimizer, step)
        yield self._lm_evaluation(stage, c, m, self._moments(optimizer))

    def _lm_training(self, stage, c: LmConfig, m, optimizer, step) -> Program:
        state, rows, length = self.state(m, "lm", optimizer), c.batch_size, c.row_length
        mesh_lib.check_rows(self.mesh, f"{stage}.batch_size", rows, c.grad_accumulation)
        return Program(
            f"{stage}/step",
            jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), None)),
            (state, self.text(f"{stage}.batch_size", rows, length)),
            passed=bytes_of(state),
            model_flops=model_flops.train(m, rows * length, length),
            least_moved=least_moves.train(m, rows * length, self.mesh.shape, c.grad_accumulation),
        )

    def _moments(self, optimizer: Any) -> float:
        """Bytes a chip of the optimizer state of the policy, which stays where it is while a loss is measured."""
        return bytes_of(self.state(self.config.model, "lm", optimizer))["optimizer"]

    def _lm_evaluation(self, stage, c: LmConfig, m, moments: float) -> Program:
        params, rows, length = self.params(m, "lm"), c.batch_size, c.row_length
        measured = functools.partial(measure, lm_objective(m), microbatches=c.grad_accumulation)
        return Program(
            f"{stage}/held_out_loss",
            jax.jit(measured),
            (params, self.text(f"{stage}.batch_size", rows, length)),
            passed={"params": shard_bytes(params)},
            held={"optimizer": moments},
            model_flops=model_flops.forward(m, rows * length, length),
            least_moved=least_moves.forward(m, rows * length, self.mesh.shape, c.grad_accumulation),
        )

    def rewarding(self) -> Iterator[Program]:
        c, m = self.config.reward, self.reward_model
        optimizer = make_optimizer(c.optimizer, 1000)
        state = self.state(m, "scalar", optimizer)
        parts = mesh_lib.shards(self.mesh) * c.grad_accumulation
        # Packed into fewer rows where the data allows it; at most each prompt has a row of its own.
        rows = -(-c.batch_size // parts) * parts
        index = (c.batch_size, c.max_responses)
        number = self.of_rows("reward.batch_size", index, jnp.int32)
        valid = self.of_rows("reward.batch_size", index, jnp.bool_)
        layout, context = self._rankings(rows)
        batch = ComparisonBatch(layout, number, number, number, valid)

        def step(state, batch):
            key = jax.random.key(0) if c.dropout != 0.0 else None
            return reward_step(
                state,
                batch,
                key,
                model_config=m,
                optimizer=optimizer,
                loss=c.loss,
                microbatches=c.grad_accumulation,
            )

        tokens = rows * c.row_length
        yield Program(
            "reward/step",
            jax.jit(step, donate_argnums=0, out_shardings=(shardings(state), None)),
            (state, batch),
            passed=bytes_of(state),
            model_flops=model_flops.train(m, tokens, context, unembedded=0.0),
            least_moved=least_moves.train(
                m, tokens, self.mesh.shape, c.grad_accumulation, scalar=True
            ),
        )
        yield Program(
            "reward/scores",
            jax.jit(lambda p, batch: scores(p, m, batch, microbatches=c.grad_accumulation)),
            (state.params, batch),
            passed={"params": shard_bytes(state.params)},
            held={"optimizer": bytes_of(state)["optimizer"]},
            model_flops=model_flops.forward(m, tokens, context, unembedded=0.0),
            least_moved=least_moves.forward(
                m, tokens, self.mesh.shape, c.grad_accumulation, scalar=True
            ),
        )

    def _rankings(self, rows: int) -> tuple[Layout, float]:
        """Rows of a prompt with its responses, and how many slots a token of them attends to in the mean."""
        c, field = self.config.reward, "reward.batch_size"
        layout = self.layout(field, rows, c.row_length, prefixed=True)
        with jax.set_mesh(self.mesh):
            sizes = even_families(c)
        if sizes is None:
            return layout, c.row_length
        families = Families(
            self.of_rows(field, (rows, sizes.prompts, sizes.prompt), jnp.int32),
            self.of_rows(field, (rows, sizes.prompts, c.max_responses, sizes.response), jnp.int32),
        )
        context = sizes.scores(c.max_responses) / c.row_length
        return dataclasses.replace(layout, families=families), context
