"""Sampling and scoring outside the PPO loop: candidates, comparisons, evaluation, best-of-n."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from instructax.batches import PromptBatch, Responses
from instructax.config import UserError
from instructax.data import prompts as prompt_data
from instructax.models import functional as model
from instructax.records import Record
from instructax.rl.generate import CUT_BY_LENGTH
from instructax.rl.packing import episode_rows, on_rows, prompt_rows
from instructax.runtime import mesh
from instructax.runtime.stopping import leave_if_stopped
from instructax.stages.context import Run
from instructax.steps.rollout import episode_layout, response_scores, sample_responses
from instructax.steps.slots import group_size

Params = Any


@dataclass(frozen=True)
class Sample:
    """One response to one prompt, whose index in the sampler's records is ``prompt``; nan: not asked for."""

    prompt: int
    text: str
    finished: bool
    stop: int
    tokens: int
    score: float = float("nan")
    logp: float = float("nan")
    kl: float = float("nan")


class Sampler:
    """Jitted sampling and scoring of a fixed list of prompt records, reused across parameters.

    Holds no parameters. Prompts over the run's length limit are left out and counted in ``dropped``.
    """

    def __init__(
        self,
        run: Run,
        records: Sequence[Record],
        *,
        batch_size: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ):
        config, self._run = run.config, run
        examples = prompt_data.tokenise(
            list(records),
            run.tokenizer,
            max_prompt_tokens=min(config.data.max_prompt_tokens, config.ppo.prompt_length),
            chat_template=config.data.chat_template,
        )
        self.dropped = examples.dropped
        if any(self.dropped.values()):
            print(f"sampling: {len(examples)} prompts, left out: {self.dropped}")
        self.record_index = [int(i) for i in examples.record_index_n]
        self.records = [records[i] for i in self.record_index]
        self._stream = prompt_data.stream(
            examples, batch_size=batch_size, prompt_length=config.ppo.prompt_length, seed=0
        )
        self._batches = functools.cache(self._batches_of)
        self._sample = jax.jit(
            functools.partial(
                sample_responses,
                model_config=config.model,
                response_length=config.ppo.response_length,
                temperature=temperature,
                eos_id=run.tokenizer.eos_id,
                pad_id=run.tokenizer.pad_id,
                stop_ids=stop_ids(run),
                top_k=top_k,
                top_p=top_p,
                slots=rollout_slots(run),
                cache_dtype=config.ppo.cache_dtype,
            )
        )
        self._score = jax.jit(self._scores)
        self._logps = jax.jit(self._sequence_logps)

    def _batches_of(self, copies: int) -> list[tuple[PromptBatch, np.ndarray, np.ndarray | None]]:
        """(prompts, which rows are real, how they are read), for ``copies`` responses a prompt.

        A batch has ``batch_size`` responses, however many of them share a prompt; all are one program.
        """
        parts = mesh.shards(self._run.mesh)
        # Rows that only fill up change nothing: a response depends on its own prompt alone.
        size = parts * -(-max(1, self._stream.batch_size // copies) // parts)
        batches = [_keep_rows_real(batch) for batch in self._stream.in_order(size)]
        plans = [prompt_plan(self._run, batch, copies) for batch, _ in batches]
        most = max(0 if plan is None else plan.shape[1] for plan in plans)
        return [
            (*batch, None if plan is None else _with_rows(plan, most))
            for batch, plan in zip(batches, plans, strict=True)
        ]

    def _rows(self, prompts: PromptBatch, responses: Responses) -> np.ndarray:
        """How the networks that score read the episodes: in packed rows, planned from their lengths."""
        c = self._run.config.ppo
        return episode_rows(
            np.arange(len(prompts.episode_B), dtype=np.int32)[None],
            prompts.mask_BxP,
            responses.mask_BxT.sum(axis=1),
            c.response_length,
            packed=c.packed,
            shards=mesh.shards(self._run.mesh),
        )[0]

    def _scores(self, reward: Params, prompts: PromptBatch, responses: Responses, source_RxL):
        return response_scores(
            reward,
            self._run.reward_model,
            prompts,
            responses,
            eos_id=self._run.tokenizer.eos_id,
            source_RxL=source_RxL,
        )

    def _sequence_logps(
        self, params: Params, prompts: PromptBatch, responses: Responses, source_RxL
    ):
        """log p(response | prompt) in nats, at the run's PPO temperature."""
        config = self._run.config
        layout, mask_BxL = episode_layout(prompts, responses)
        logps = functools.partial(
            model.token_logprobs, params, config.model, temperature=config.ppo.temperature
        )
        logp_BxL = on_rows(logps, layout, source_RxL)
        return jax.numpy.where(mask_BxL, logp_BxL, 0.0).sum(axis=1)

    def sample(
        self,
        params: Params,
        key: jax.Array,
        *,
        reward: Params | None = None,
        reference: Params | None = None,
    ) -> list[Sample]:
        """One response a prompt, in order. ``reward`` adds scores, ``reference`` log-ratios."""
        return self.rounds(params, [key], reward=reward, reference=reference)[0]

    def rounds(
        self,
        params: Params,
        keys: Sequence[jax.Array],
        *,
        reward: Params | None = None,
        reference: Params | None = None,
    ) -> list[list[Sample]]:
        """What :meth:`sample` draws with each key, every prompt read once for all of them."""
        copies = len(keys)
        key = keys[0] if copies == 1 else jax.numpy.stack(keys)
        found: list[list[Sample]] = [[] for _ in keys]
        for prompts, real, source_UxRxL in self._batches(copies):
            leave_if_stopped()
            drawn = self._sample(params, key, mesh.put_batch(self._run.mesh, prompts), source_UxRxL)
            prompts = jax.tree.map(lambda x: np.repeat(x, copies, axis=0), prompts)
            batch = mesh.put_batch(self._run.mesh, prompts)
            responses = mesh.to_host(drawn)
            source_RxL, extra = self._rows(prompts, responses), {}
            if reward is not None:
                extra["score"] = self._score(reward, batch, drawn, source_RxL)
            if reference is not None:
                extra["logp"] = self._logps(params, batch, drawn, source_RxL)
                extra["kl"] = extra["logp"] - self._logps(reference, batch, drawn, source_RxL)
            extra = mesh.to_host(extra)
            for row in np.flatnonzero(np.repeat(real, copies)):
                samples = found[row % copies]
                samples.append(
                    Sample(
                        prompt=len(samples),
                        text=decode(self._run, responses, int(row)),
                        finished=bool(responses.stop_B[row] != CUT_BY_LENGTH),
                        stop=int(responses.stop_B[row]),
                        tokens=int(responses.mask_BxT[row].sum()),
                        **{name: float(value[row]) for name, value in extra.items()},
                    )
                )
        return found


def rollout_slots(run: Run) -> int | None:
    """``ppo.rollout_slots``, which the mesh's batch shards must divide."""
    slots = run.config.ppo.rollout_slots
    if slots is not None:
        mesh.check_rows(run.mesh, "ppo.rollout_slots", slots)
    return slots


def prompt_plan(run: Run, prompts: PromptBatch, copies: int = 1) -> np.ndarray | None:
    """The rows in which the sampler reads prompts of ``copies`` responses; None pads each to its own."""
    c, shards = run.config.ppo, mesh.shards(run.mesh)
    if not c.packed:
        return None
    rows, group = len(prompts.episode_B), None
    if c.rollout_slots is not None and c.rollout_slots < rows * copies:
        group = group_size(rows // shards, copies, c.rollout_slots // shards)
    return prompt_rows(prompts.mask_BxP, group, shards)


def _with_rows(source_UxRxL: np.ndarray, rows: int) -> np.ndarray:
    """A plan with empty rows behind its own."""
    more = rows - source_UxRxL.shape[1]
    return np.pad(source_UxRxL, ((0, 0), (0, more), (0, 0)), constant_values=-1)


def _keep_rows_real(batch: PromptBatch) -> tuple[PromptBatch, np.ndarray]:
    """A batch whose padding rows repeat row 0 (the sampler needs a token in every row), and which are real."""
    real = batch.episode_B >= 0
    token, mask, episode = batch.token_BxP.copy(), batch.mask_BxP.copy(), batch.episode_B.copy()
    token[~real], mask[~real], episode[~real] = token[0], mask[0], episode[0]
    return PromptBatch(token, mask, episode), real


def stop_ids(run: Run) -> tuple[int, ...]:
    """The ids of ``ppo.stop_texts``, each of which must be one token."""
    found = []
    for text in run.config.ppo.stop_texts:
        ids = run.tokenizer.encode(text)
        if len(ids) != 1:
            raise UserError(f"ppo.stop_texts: {text!r} is {len(ids)} tokens, must be one")
        found.append(ids[0])
    return tuple(found)


def decode(run: Run, responses: Responses, row: int) -> str:
    """The response's text, without the EOS or stop token that ended it."""
    ids = responses.token_BxT[row][responses.mask_BxT[row]]
    if responses.stop_B[row] != CUT_BY_LENGTH:
        ids = ids[:-1]
    return run.tokenizer.decode(ids)


def mean_reward(
    sampler: Sampler, params: Params, reward: Params, key: jax.Array, num_samples: int = 1
) -> tuple[float, float | None]:
    """(mean score of ``num_samples`` samples a prompt, its standard error over the prompts).

    Round k draws from ``fold_in(key, k)``. One prompt alone has no standard error.
    """
    keys = [jax.random.fold_in(key, k) for k in range(num_samples)]
    rounds = sampler.rounds(params, keys, reward=reward)
    score_NxS = np.stack([[s.score for s in samples] for samples in rounds], axis=1)
    # Samples of a prompt share its difficulty: only prompts are independent.
    score_N = score_NxS.mean(axis=1)
    error = score_N.std(ddof=1) / np.sqrt(len(score_N)) if len(score_N) > 1 else None
    return float(score_N.mean()), None if error is None else float(error)
