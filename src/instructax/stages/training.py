"""The loop that pretraining, SFT and reward training share: one network, one stream of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from instructax.config import ModelConfig
from instructax.data.pipeline import prefetch
from instructax.models import functional as model
from instructax.runtime import mesh
from instructax.runtime.checkpoint import Checkpoints
from instructax.runtime.folder import open_run as open_folder
from instructax.runtime.loop import run_steps
from instructax.runtime.metrics import MetricsWriter
from instructax.runtime.profile import profiled
from instructax.runtime.stopping import StopSignal
from instructax.stages.context import Run, checkpoint_meta
from instructax.steps.state import TrainState, create

Params = Any


def train(
    run: Run,
    stage: str,
    *,
    model_config: ModelConfig,
    head: str,
    start_params: Callable[[], Params],
    optimizer: optax.GradientTransformation,
    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]],
    batches: Callable[[int], Any],
    total_steps: int,
    save_at: Callable[[int], bool],
    batch_size: int,
    keep_all: bool = False,
    evaluate: Callable[[Params], Mapping[str, float]],
    evaluate_at: Callable[[int], bool],
    finish: Callable[[Params], Params] | None = None,
    show: tuple[str, ...] = ("loss/nll", "lr"),
    guard: tuple[str, ...] = ("loss/loss",),
) -> Params:
    """Train to ``total_steps``, going on from the newest checkpoint; returns the final parameters.

    Batch i is ``batches(i)``, so the step is the data's cursor. ``evaluate`` runs on the parameters after
    the steps that ``evaluate_at`` names. ``finish`` changes the parameters that are saved last
    (the reward model's shift).
    """
    folder = run.folder / stage
    open_folder(folder, run.config, stage=stage)
    with jax.set_mesh(run.mesh), Checkpoints(folder / "checkpoints", keep_all=keep_all) as saved:

        def fresh() -> TrainState:
            return create(model.init(jax.random.key(0), model_config, head), optimizer)

        abstract = mesh.abstract_sharded(run.mesh, fresh, over=model_config.shard_over)
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        done = saved.latest()
        if done is None:
            state = jax.jit(lambda p: create(p, optimizer), out_shardings=shardings)(start_params())
        else:
            rest = saved.restore(done, "optimizer", (abstract.opt_state, abstract.step))
            state = TrainState(saved.restore(done, "params", abstract.params), *rest)
        done = done or 0
        if done >= total_steps:
            return state.params
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        ahead = prefetch(batches, done, total_steps)

        def one(i: int) -> dict[str, Any]:
            nonlocal state
            state, metrics = jitted(state, mesh.put_batch(run.mesh, next(ahead)))
            metrics = dict(metrics)
            if evaluate_at(i + 1):
                metrics |= evaluate(state.params)
            return metrics

        def save(step: int) -> None:
            params = state.params
            if finish is not None and step == total_steps:
                params = finish(params)
            meta = checkpoint_meta(run, model_config, head, consumed=step * batch_size)
            saved.save(step, {"params": params, "optimizer": (state.opt_state, state.step)}, meta)

        watched: Callable[[int], Mapping[str, Any]] = one
        if run.config.profile:
            watched = profiled(one, folder / "profile", stage, total_steps - done)

        # Enough rows for any curve; a row a step would cost a small model a tenth of its time.
        every = max(1, total_steps // 500)
        writer = MetricsWriter(folder, resume_step=done if done else -1)
        try:
            with writer, StopSignal() as stop:
                run_steps(
                    name=stage,
                    start=done,
                    total=total_steps,
                    step=watched,
                    save=save,
                    save_at=save_at,
                    writer=writer,
                    show=show,
                    stop=stop,
                    guard=guard,
                    log_at=lambda done: done % every == 0 or evaluate_at(done),
                )
        finally:
            ahead.close()
        saved.wait()
        return state.params if finish is None else finish(state.params)
