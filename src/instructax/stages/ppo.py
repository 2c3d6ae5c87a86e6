"""`instructax ppo`: PPO and PPO-ptx (InstructGPT section 3.5 and appendix C.4).

An iteration is three programs: sample responses, score them into a frozen rollout, update policy
and value network on it, with pretraining text beside every minibatch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instructax.batches import LmBatch
from instructax.config import Config, PpoConfig, UserError
from instructax.data import pretraining, prompts
from instructax.data.pipeline import derive_seed, prefetch
from instructax.records import prompt_text
from instructax.runtime import mesh
from instructax.runtime.checkpoint import Checkpoints
from instructax.runtime.folder import open_run as open_folder
from instructax.runtime.loop import run_steps
from instructax.runtime.metrics import MetricsWriter, append_samples
from instructax.runtime.profile import profiled
from instructax.runtime.stopping import StopSignal
from instructax.stages import data
from instructax.stages.context import Run, checkpoint_meta, load_params, open_run, write_json
from instructax.stages.iteration import programs
from instructax.stages.pretrain import held_out_nll
from instructax.stages.sampling import Sampler
from instructax.steps import ppo as ppo_steps
from instructax.steps.optimizer import make_optimizer
from instructax.steps.state import PpoState, TrainState, by_network, create

Array = Any
Params = Any

ITEMS = ("params", "ema", "value", "rest")


def run(config: Config, arm: str = "ppo") -> None:
    """Train one arm into ``run/<arm>``; the config's ppo section is the arm's own."""
    context = open_run(config)
    with jax.set_mesh(context.mesh):
        _train(context, arm)


def _train(run: Run, arm: str) -> None:
    c, config = run.config.ppo, run.config
    folder = run.folder / arm
    open_folder(folder, config, stage="ppo")
    iterations = c.episodes // c.batch_size
    updates = c.inner_epochs * c.batch_size // c.minibatch_size
    # Where the mesh is inferred, only now is it known.
    mesh.check_rows(run.mesh, "ppo.minibatch_size", c.minibatch_size, c.grad_accumulation)
    policy_optimizer = make_optimizer(c.policy_optimizer, iterations * updates)
    value_optimizer = make_optimizer(c.value_optimizer, iterations * updates)

    with Checkpoints(folder / "checkpoints") as saved:
        done = saved.latest() or 0
        if done >= iterations:
            print(f"{arm}: all {iterations} iterations are there already")
            return
        reference = load_params(run, c.init_from or "init", config.model, "lm")
        reward = load_params(run, c.reward_from or "reward", run.reward_model, "scalar")
        scale = _reward_scale(run, folder, reference, reward)

        def fresh(policy: Params, value: Params) -> PpoState:
            value = ppo_steps.value_from_reward(value, c, scale["gain"], scale["bias"])
            return PpoState(
                policy=create(policy, policy_optimizer),
                value=create(value, value_optimizer),
                ema=jax.tree.map(jnp.copy, policy),
                kl_coef=jnp.asarray(c.kl_coef, jnp.float32),
                iteration=jnp.zeros((), jnp.int32),
            )

        over = by_network(config.model.shard_over, run.reward_model.shard_over)
        abstract = mesh.abstract_sharded(run.mesh, fresh, reference, reward, over=over)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        if done:
            state = _restore(saved, done, abstract)
        else:
            state = jax.jit(fresh, out_shardings=shardings)(reference, reward)

        frozen = _frozen(c, (reference, reward))
        del reference, reward
        iterate = programs(run, frozen, scale, policy_optimizer, value_optimizer, shardings, arm)
        watch = _watcher(run, folder, frozen)
        ahead = prefetch(_host_batches(run, updates), done, iterations)

        def one(i: int) -> Mapping[str, Any]:
            nonlocal state
            state, metrics = iterate(state, i, *next(ahead))
            if (i + 1) % c.sample_every == 0 or i + 1 == iterations:
                metrics = metrics | watch(i + 1, state)
            return metrics

        def save(step: int) -> None:
            meta = checkpoint_meta(
                run, config.model, "lm", iteration=step, episodes=step * c.batch_size, scale=scale
            )
            saved.save(step, _items(state), meta)

        watched: Callable[[int], Mapping[str, Any]] = one
        if config.profile:
            watched = profiled(one, folder / "profile", arm, iterations - done)

        try:
            with MetricsWriter(folder, resume_step=done or -1) as writer, StopSignal() as stop:
                if not done and (before := watch(0, state)):
                    writer.write(0, before)
                run_steps(
                    name=arm,
                    start=done,
                    total=iterations,
                    step=watched,
                    save=save,
                    save_at=lambda done: done % c.checkpoint_every == 0,
                    writer=writer,
                    show=("objective/score", "objective/kl", "ptx/nll"),
                    stop=stop,
                    guard=("ppo/loss/policy", "ppo/loss/value"),
                )
        finally:
            ahead.close()


def _frozen(c: PpoConfig, models: tuple[Params, Params]) -> Callable[[], tuple[Params, Params]]:
    """(reference, reward model) where and when they are wanted."""
    if c.frozen_memory == "host":
        return mesh.parked("ppo.frozen_memory", models)
    return lambda: models


def _items(state: PpoState) -> dict[str, Any]:
    rest = (
        state.policy.opt_state, state.policy.step, state.value.opt_state, state.value.step,
        state.kl_coef, state.iteration,
    )  # fmt: skip
    return {
        "params": state.policy.params, "ema": state.ema, "value": state.value.params, "rest": rest
    }  # fmt: skip


def _restore(saved: Checkpoints, step: int, abstract: PpoState) -> PpoState:
    target = _items(abstract)
    items = {name: saved.restore(step, name, target[name]) for name in ITEMS}
    policy_opt, policy_step, value_opt, value_step, kl_coef, iteration = items["rest"]
    return PpoState(
        TrainState(items["params"], policy_opt, policy_step),
        TrainState(items["value"], value_opt, value_step),
        items["ema"],
        kl_coef,
        iteration,
    )


def _host_batches(run: Run, updates: int) -> Callable[[int], tuple[Any, Any]]:
    """i -> (prompts, pretraining rows of every update), each from a stream of its own.

    Neither stream knows of the other, so another gamma never reshuffles the prompts (trap T19).
    """
    c, config = run.config.ppo, run.config
    examples = prompts.tokenise(
        data.records(config, "prompts"),
        run.tokenizer,
        max_prompt_tokens=min(config.data.max_prompt_tokens, c.prompt_length),
        chat_template=config.data.chat_template,
    )
    if any(examples.dropped.values()):
        print(f"ppo: {len(examples)} prompts, left out: {examples.dropped}")
    prompt_stream = prompts.stream(
        examples,
        batch_size=c.batch_size,
        prompt_length=c.prompt_length,
        seed=derive_seed(config.seed, "ppo/prompts"),
    )
    rows = updates * c.minibatch_size * c.ptx_examples_per_episode
    text_stream = pretraining.stream(
        pretraining.tokenise(data.records(config, "pretrain"), run.tokenizer),
        batch_size=rows,
        row_length=c.ptx_row_length,
        seed=derive_seed(config.seed, "ppo/pretrain"),
    )

    def batches(i: int):
        text: LmBatch = text_stream(i)
        stacked = jax.tree.map(lambda x: x.reshape((updates, rows // updates) + x.shape[1:]), text)
        return prompt_stream(i), stacked

    return batches


def _reward_scale(run: Run, folder, reference: Params, reward: Params) -> dict[str, float]:
    """gain = 1/std and bias = -mean * gain over the initial policy's scores (Ziegler et al. 2019), or 1 and 0."""
    c, path = run.config.ppo, folder / "reward_scale.json"
    if not c.normalize_reward:
        return {"gain": 1.0, "bias": 0.0}
    if path.is_file():
        return json.loads(path.read_text("utf-8"))
    records = list(data.records(run.config, "prompts"))[: c.normalize_samples]
    sampler = Sampler(run, records, batch_size=min(len(records), run.config.evaluate.batch_size))
    samples = sampler.sample(reference, run.key("ppo/normalize"), reward=reward)
    score = np.asarray([sample.score for sample in samples])
    if score.std() == 0.0:
        raise UserError("all samples of the initial policy get one score; nothing to normalise by")
    scale = {"gain": float(1 / score.std()), "bias": float(-score.mean() / score.std())}
    write_json(path, scale)
    return scale


def _watcher(run: Run, folder, frozen: Callable[[], tuple[Params, Params]]):
    """(step, state) -> metrics: responses to the same validation prompts, and the pretraining loss."""
    c = run.config.ppo
    records = list(data.records(run.config, "prompts_validation"))[: c.log_prompts]
    sampler = Sampler(run, records, batch_size=len(records), temperature=c.temperature)
    nll = None
    if data.exists(run.config, "pretrain_validation"):
        rows = max(1, c.minibatch_size * c.ptx_examples_per_episode)
        nll = held_out_nll(run, run.config.model, c.ptx_row_length, rows, c.grad_accumulation)
    key = run.key("ppo/watch")

    def watch(step: int, state: PpoState) -> dict[str, float]:
        params = state.policy.params
        reference, reward = frozen()
        samples = sampler.sample(params, key, reward=reward, reference=reference)
        append_samples(
            folder,
            [
                {
                    "step": step,
                    "id": str(sampler.records[s.prompt].get("id", s.prompt)),
                    "prompt": prompt_text(sampler.records[s.prompt]),
                    "kind": sampler.records[s.prompt].get("kind", ""),
                    "response": s.text,
                    "finished": s.finished,
                    "score": s.score,
                    "kl": s.kl,
                }
                for s in samples
            ],
        )
        return {} if nll is None else {"eval/pretrain_nll": nll(params)["all"]}

    return watch
