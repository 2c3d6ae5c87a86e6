"""The programs of PPO, and of sampling and scoring outside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from instructax.batches import EPISODE_WIDTHS, Layout, LmBatch, Rollout, scored_width
from instructax.config import ModelConfig, replace
from instructax.models import functional as model
from instructax.plan import least_moves, model_flops
from instructax.plan.memory import shard_bytes
from instructax.plan.program import Program, Shapes, shardings
from instructax.runtime import mesh as mesh_lib
from instructax.steps import ppo as ppo_steps
from instructax.steps.optimizer import make_optimizer
from instructax.steps.rollout import response_scores, sample_responses, score_rollout
from instructax.steps.state import PpoState

EOS, PAD = 1, 0  # which ids they are changes no program


class Reinforcement(Shapes):
    """Four networks of two architectures, and a sampler."""

    def ppo(self, name: str) -> Iterator[Program]:
        c, m, r = self.config.ppo, self.config.model, self.reward_model
        policy_optimizer = make_optimizer(c.policy_optimizer, 1000)
        value_optimizer = make_optimizer(c.value_optimizer, 1000)
        policy = self.state(m, "lm", policy_optimizer)
        value = self.state(r, "scalar", value_optimizer)
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=self.whole)
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=self.whole)
        state = PpoState(policy, value, policy.params, scalar, count)
        reference, reward = policy.params, value.params
        state_bytes = {
            "params": shard_bytes((policy.params, value.params)),
            "optimizer": shard_bytes((policy.opt_state, value.opt_state)),
            "ema": shard_bytes(state.ema),
        }
        frozen = {"frozen": shard_bytes((reference, reward))}
        # What lies on a chip between uses.
        staying = frozen if c.frozen_memory == "device" else {}
        everything = state_bytes | staying

        def beside(passed: dict[str, float]) -> dict[str, float]:
            return {kind: size - passed.get(kind, 0.0) for kind, size in everything.items()}

        held = beside({"params": shard_bytes(policy.params)})
        yield self._copy(name, policy.params, held)
        yield self._sampling(
            f"{name}/sample", held, c.temperature, rows_of="ppo.batch_size", rows=c.batch_size
        )

        width, rows = c.prompt_length + c.response_length, c.batch_size
        tokens = rows * width
        passed = {"params": state_bytes["params"]} | frozen
        source = self.sources(rows, width) if c.packed else None
        scored = scored_width(width, c.response_length, *EPISODE_WIDTHS)
        unembedded = scored or width
        arguments = (
            policy.params, reference, value.params, reward, self.prompts("ppo.batch_size", rows),
            self.responses("ppo.batch_size", rows), scalar, self.key(), source,
            self.sources(rows, scored) if scored else None,
        )  # fmt: skip
        score = functools.partial(
            score_rollout, config=c, model_config=m, reward_config=r, eos_id=EOS
        )
        yield Program(
            f"{name}/score",
            jax.jit(score),
            arguments,
            passed=passed,
            held=beside(passed),
            model_flops=2 * model_flops.forward(m, tokens, width, unembedded=rows * unembedded)
            + 2 * model_flops.forward(r, tokens, width, unembedded=0.0),
            least_moved=2 * least_moves.forward(m, tokens, self.mesh.shape)
            + 2 * least_moves.forward(r, tokens, self.mesh.shape, scalar=True),
        )

        with jax.set_mesh(self.mesh):
            rollout, _, _ = jax.eval_shape(score, *arguments)
        rollout = Rollout(
            self.layout("ppo.batch_size", rows, width),
            *(
                self.of_rows("ppo.batch_size", x.shape, x.dtype)
                for x in (
                    rollout.mask_BxL, rollout.old_logp_BxL, rollout.old_value_BxL,
                    rollout.advantage_BxL, rollout.return_BxL,
                )
            ),
        )  # fmt: skip
        updates = c.inner_epochs * rows // c.minibatch_size
        texts = c.minibatch_size * c.ptx_examples_per_episode
        self.text("ppo.minibatch_size * ppo.ptx_examples_per_episode", texts, 1)
        mesh_lib.check_rows(self.mesh, "ppo.minibatch_size", c.minibatch_size, c.grad_accumulation)
        slots = self.sources(updates, texts, c.ptx_row_length)
        text = LmBatch(
            Layout(slots, slots, slots, slots, prefixed=False),
            jax.ShapeDtypeStruct(
                (updates, texts, c.ptx_row_length), jnp.float32, sharding=self.whole
            ),
        )
        update = functools.partial(
            ppo_steps.ppo_iteration,
            config=c,
            model_config=m,
            reward_config=r,
            policy_optimizer=policy_optimizer,
            value_optimizer=value_optimizer,
        )
        trained = tokens * c.inner_epochs
        read = updates * texts * c.ptx_row_length
        of_policy = model_flops.forward if c.rl_coef == 0.0 else model_flops.train
        flops = of_policy(m, trained, width, unembedded=c.inner_epochs * rows * unembedded)
        flops += model_flops.train(r, trained, width, unembedded=0.0)
        learned = [trained] * (c.rl_coef != 0.0) + [read] * (c.ptx_coef != 0.0)
        moves = functools.partial(least_moves.train, mesh=self.mesh.shape, updates=updates)
        parts = updates * c.grad_accumulation
        moved = moves(r, trained, parts=parts, scalar=True)
        if learned:
            moved += moves(m, sum(learned), parts=len(learned) * parts)
        if c.ptx_coef != 0.0:
            flops += model_flops.train(m, read, c.ptx_row_length)
        elif c.ptx_at_zero == "measure":
            flops += model_flops.forward(m, read, c.ptx_row_length)
        yield Program(
            f"{name}/update",
            jax.jit(update, donate_argnums=0, out_shardings=(shardings(state), None)),
            (
                state,
                rollout,
                text,
                scalar,
                self.sources(updates, c.minibatch_size, width),
                self.sources(updates, c.minibatch_size, scored) if scored else None,
            ),
            passed=state_bytes,
            held=staying,
            model_flops=flops,
            least_moved=moved,
            iterations=c.episodes // c.batch_size,
        )

    def _copy(self, name: str, params: Any, held: dict[str, float]) -> Program:
        """Part of sampling; on its own so that its time is known."""
        return Program(
            f"{name}/rollout_copy",
            jax.jit(functools.partial(model.rollout_copy, config=self.config.model)),
            (params,),
            passed={"params": shard_bytes(params)},
            held=held,
        )

    def _sampling(
        self, name: str, held: dict[str, float], temperature: float, *, rows_of: str, rows: int
    ) -> Program:
        c, m = self.config.ppo, self.config.model
        prompts, slots = self.prompts(rows_of, rows), c.prompt_length + c.response_length
        params = self.params(m, "lm")
        sample = functools.partial(
            sample_responses,
            model_config=m,
            response_length=c.response_length,
            temperature=temperature,
            eos_id=EOS,
            pad_id=PAD,
            # Their number counts, not which they are.
            stop_ids=tuple(range(EOS + 1, EOS + 1 + len(c.stop_texts))),
            cache_dtype=c.cache_dtype,
        )
        parts = mesh_lib.shards(self.mesh)
        tensor = self.mesh.shape["model"]
        width = jnp.dtype(m.compute_dtype).itemsize
        # Keys and values are of a row and a head, and lie where both do.
        cache = 2.0 * m.num_layers * rows / parts * slots * m.kv_heads / tensor * m.head_width
        # The rollout copy lies over fsdp alone, whatever else the parameters are shared out over.
        copy = shard_bytes(self.params(replace(m, shard_over="fsdp"), "lm")) * width / 4
        # int8 has a float32 scale for every token and head.
        kept = {"bfloat16": 2.0, "int8": 1 + 4 / m.head_width}.get(c.cache_dtype or "", width)
        decoded = rows * (c.response_length - 1)
        mean_context = c.prompt_length + c.response_length / 2
        flops = model_flops.forward(m, rows * c.prompt_length, c.prompt_length, unembedded=rows)
        flops += model_flops.forward(m, decoded, mean_context)
        # A chip reads its share of the weights, were they spread over all, and of the filled cache.
        weights = (model_flops.matrix_parameters(m) + m.padded_vocab_size * m.d_model) * width
        filled = c.prompt_length + 1, slots - 1
        seen = sum(_seen(m, n) for n in range(filled[0], filled[1] + 1)) / (slots * m.num_layers)
        bound = (c.response_length - 1) * weights / self.mesh.size + cache * kept * seen
        return Program(
            name,
            jax.jit(sample),
            (params, self.key(), prompts),
            passed={"params": shard_bytes(params)},
            held=held,
            made={"copy": copy, "cache": cache * kept},
            model_flops=flops,
            unknown_trips=c.response_length - 1,
            filled=filled,
            bandwidth_bound=bound,
        )

    def evaluating(self) -> Iterator[Program]:
        c, m, r = self.config.evaluate, self.config.model, self.reward_model
        rows, ppo = c.batch_size, self.config.ppo
        params, reward = self.params(m, "lm"), self.params(r, "scalar")
        frozen = {"frozen": shard_bytes(reward)}
        yield self._sampling(
            "evaluate/sample", frozen, c.temperature, rows_of="evaluate.batch_size", rows=rows
        )
        width = ppo.prompt_length + ppo.response_length
        batch = (
            self.prompts("evaluate.batch_size", rows),
            self.responses("evaluate.batch_size", rows),
            self.sources(rows, width) if ppo.packed else None,
        )

        def score(reward, prompts, responses, source_RxL):
            return response_scores(reward, r, prompts, responses, eos_id=EOS, source_RxL=source_RxL)

        yield Program(
            "evaluate/score",
            jax.jit(score),
            (reward, *batch),
            passed=frozen,
            held={"params": shard_bytes(params)},
            model_flops=model_flops.forward(r, rows * width, width, unembedded=0.0),
        )


def _seen(m: ModelConfig, filled: int) -> int:
    """Slots that a token sees of a cache with so many filled, over all layers."""
    kinds = [m.attention_pattern[i % len(m.attention_pattern)] for i in range(m.num_layers)]
    return sum(min(filled, m.band_width) if kind == "banded" else filled for kind in kinds)
