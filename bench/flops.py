"""FLOPs of each phase as compiled, against the least that its tokens need; nothing is timed.

    python bench/flops.py [--size small medium] [--miniature]

Compiled: products in the compiled text, bodies of loops as often as they run (`instructax.plan.timing`). The least counts each
token once, a prompt once however many responses it has, attention over what a token sees, logits where a loss or the sampler reads
them, and no recomputation (bench/roofline.py). Scoring reads four networks: policy, reference, value network, reward model.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import jax
import jax.numpy as jnp
import numpy as np

from bench import cases, ours, roofline
from bench.cases import Case
from instructax.batches import Responses
from instructax.models import functional as model
from instructax.plan import chips, timing
from instructax.rl.packing import episode_rows, scored_rows
from instructax.steps import ppo as ppo_steps
from instructax.steps.optimizer import make_optimizer
from instructax.steps.reward import reward_step
from instructax.steps.rollout import sample_responses, score_rollout
from instructax.steps.sft import lm_step
from instructax.steps.state import PpoState, create

FORMS = ("sft", "reward, shared prompt", "generate", "ppo")


def phases(case: Case) -> Iterator[tuple[str, Any, int, float]]:
    """(name, lowered program, turns of the sampler's loop, least FLOPs) of each phase of a case."""
    m, kind, least = ours.model_config(case.shape), case.work.kind, roofline.flops(case)
    optimizer = make_optimizer(ours.ADAMW, 1000)

    def init(head: str) -> Any:
        return jax.eval_shape(lambda: model.init(jax.random.key(0), m, head))

    def state(head: str) -> Any:
        return jax.eval_shape(lambda p: create(p, optimizer), init(head))

    def lowered(function: Any, *arguments: Any, **fixed: Any) -> Any:
        return jax.jit(functools.partial(function, **fixed)).lower(*arguments)

    if kind in ("sft", "reward"):
        step, head = (lm_step, "lm") if kind == "sft" else (reward_step, "scalar")
        batch = ours.text_batch(case) if kind == "sft" else ours.comparison_batch(case)
        fixed = {"key": None, "model_config": m, "optimizer": optimizer}
        yield kind, lowered(step, state(head), batch, **fixed), 1, least
        return
    w, key = case.work, jax.eval_shape(lambda: jax.random.key(0))
    prompts = ours.prompt_batch(case)
    if kind == "generate":
        fixed = {
            "model_config": m, "response_length": w.response, "temperature": 1.0,
            "eos_id": ours.NEVER, "pad_id": 0,
        }  # fmt: skip
        program = lowered(sample_responses, init("lm"), key, prompts, **fixed)
        yield "sampling", program, w.response - 1, least
        return
    c, slots = ours.ppo_config(case).ppo, (w.rows, w.response)
    responses = Responses(
        np.full(slots, cases.FIRST_ID, np.int32), np.ones(slots, bool), np.zeros(slots, np.float32),
        np.zeros(w.rows, np.int32),
    )  # fmt: skip
    networks, scale = (init("lm"), init("lm"), init("scalar"), init("scalar")), np.float32(0.02)
    fixed = {"config": c, "model_config": m, "reward_config": m}
    length_B, width = np.full(w.rows, w.response), w.prompt + w.response
    planned = functools.partial(
        episode_rows, prompt_mask_BxP=prompts.mask_BxP, response_length_B=length_B, slots=w.response
    )
    everyone = planned(np.arange(w.rows, dtype=np.int32)[None])
    one, scored = jax.tree.map(lambda x: x[0], (everyone, scored_rows(everyone, w.prompt, width)))
    arguments = (*networks, prompts, responses, scale, key, one, scored)
    words = roofline.reading(case, w.response)
    scalars = roofline.reading(case, 0.0)
    score = functools.partial(score_rollout, **fixed, eos_id=ours.NEVER)
    yield "scoring", lowered(score, *arguments), 1, 2 * (words + scalars)
    rollout, metrics, _ = jax.eval_shape(score, *arguments)
    order = np.tile(np.arange(w.rows, dtype=np.int32), (w.epochs, 1))
    rows = planned(order)
    begun = PpoState(state("lm"), state("scalar"), init("lm"), scale, jnp.int32(0))
    update = functools.partial(
        ppo_steps.ppo_iteration, **fixed, policy_optimizer=optimizer, value_optimizer=optimizer
    )
    program = lowered(
        update,
        begun,
        rollout,
        ours.no_text(w.epochs),
        metrics["objective/kl"],
        rows,
        scored_rows(rows, w.prompt, width),
    )
    yield "update", program, 1, 3 * w.epochs * (words + scalars)


def compiled_flops(lowered: Any, turns: int) -> float:
    text = lowered.compile().as_text()
    return timing.analyse(text, chips.cpu(), [None] * jax.device_count(), turns).flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", nargs="+", choices=("small", "medium"), default=["small", "medium"]
    )
    parser.add_argument("--miniature", action="store_true", help="tiny shapes: does it run?")
    given = parser.parse_args()
    print("| phase | size | compiled, GFLOP | least | compiled / least |\n|---|---|---|---|---|")
    for case in cases.cpu_cases():
        if case.name not in FORMS or case.size not in given.size:
            continue
        for name, lowered, turns, least in phases(
            cases.miniature(case) if given.miniature else case
        ):
            found = compiled_flops(lowered, turns)
            print(
                f"| {name} | {case.size} | {found / 1e9:.1f} | {least / 1e9:.1f} | {found / least:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
