"""Real tokens a second of packed rows against padded ones, on the lengths of real conversations.

    INSTRUCTAX_TEST_DATA=DIR python bench/packing.py [--rounds 5] [--context 512 1024] [--only sft ppo]

The lengths are those of the ranked replies in DIR/oasst_trees, in tokens of a tokenizer trained on them; what a context does not
hold, half of it for the prompt, is left out. SFT: steps of 8 rows, a demonstration each, or of 4 rows twice as long with as many as
fit. PPO: one iteration's updates of 64 episodes in minibatches of 32, a row each or packed. The model is the small one of
bench/cases.py. "Filled" is the share of padded slots that hold a token: its inverse is the most that packing can give where a slot
costs the same.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import SMALL
from bench.ours import ADAMW, model_config, no_text
from instructax.batches import PromptBatch, Responses
from instructax.config import ModelConfig, PpoConfig, replace
from instructax.data import demonstrations
from instructax.data.convert import open_assistant
from instructax.data.tokenizer import Tokenizer, train_tokenizer
from instructax.models import functional as model
from instructax.records import prompt_text
from instructax.rl.packing import episode_rows, scored_rows
from instructax.steps import ppo as ppo_steps
from instructax.steps.optimizer import make_optimizer
from instructax.steps.rollout import score_rollout
from instructax.steps.sft import lm_step
from instructax.steps.state import PpoState, create

ROWS, EPISODES, MINIBATCH = 8, 64, 32


def examples(folder: Path, context: int) -> demonstrations.DemonstrationExamples:
    """The best reply of each conversation, as a demonstration."""
    lines = (folder / "oasst_trees" / "en_100_tree.jsonl").read_text("utf-8").splitlines()
    records = open_assistant(map(json.loads, lines))[0]
    shown = [{"prompt": prompt_text(r), "response": r["responses"][0]} for r in records]
    texts = [text for record in shown for text in record.values()]
    tokenizer = Tokenizer.from_bytes(train_tokenizer(texts, 4096))
    found = demonstrations.tokenise(
        shown, tokenizer, max_prompt_tokens=context // 2, max_length=context
    )
    print(
        f"context {context}: {len(found)} conversations, left out: {found.dropped}", file=sys.stderr
    )
    return found


def network(context: int) -> ModelConfig:
    return replace(model_config(SMALL), context_length=context)


def sft(found: demonstrations.DemonstrationExamples, context: int, packed: bool):
    config, optimizer = network(context), make_optimizer(ADAMW, 1000)
    state = create(model.init(jax.random.key(0), config, "lm"), optimizer)
    step = jax.jit(
        functools.partial(lm_step, key=None, model_config=config, optimizer=optimizer),
        donate_argnums=0,
    )
    share = 2 if packed else 1
    stream = demonstrations.stream(
        found, batch_size=ROWS // share, row_length=share * context, packed=packed, seed=0
    )
    batches = [stream(i) for i in range(4)]
    tokens = sum(int((b.layout.segment_BxL > 0).sum()) for b in batches)
    filled = tokens / sum(b.layout.segment_BxL.size for b in batches)

    def run() -> int:
        nonlocal state
        for batch in batches:
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return tokens

    return run, filled


def ppo(found: demonstrations.DemonstrationExamples, context: int, packed: bool):
    m, optimizer, width = network(context), make_optimizer(ADAMW, 1000), context // 2
    c = PpoConfig(
        ptx_coef=0.0, ptx_at_zero="skip", batch_size=EPISODES, minibatch_size=MINIBATCH,
        policy_optimizer=ADAMW, value_optimizer=ADAMW, missing_eos="none",
        prompt_length=width, response_length=width,
    )  # fmt: skip
    pairs = itertools.cycle(zip(found.prompts, found.responses, strict=True))
    chosen = list(itertools.islice(((p, r[:width]) for p, r in pairs), EPISODES))
    prompt_B, length_B = (np.asarray([len(x) for x in side]) for side in zip(*chosen, strict=True))
    rng = np.random.default_rng(0)
    ids = functools.partial(rng.integers, 5, SMALL.vocab_size, (EPISODES, width), dtype=np.int32)
    slot_T = np.arange(width)[None]
    prompts = PromptBatch(
        ids(), slot_T >= width - prompt_B[:, None], np.arange(EPISODES, dtype=np.int32)
    )
    responses = Responses(
        ids(),
        slot_T < length_B[:, None],
        np.zeros((EPISODES, width), np.float32),
        np.zeros(EPISODES, np.int32),
    )
    policy, value = (
        model.init(jax.random.key(i), m, head) for i, head in enumerate(("lm", "scalar"))
    )
    rollout, metrics, _ = jax.jit(
        functools.partial(score_rollout, config=c, model_config=m, reward_config=m, eos_id=2)
    )(policy, policy, value, value, prompts, responses, jnp.float32(0.02), jax.random.key(2))
    state = PpoState(
        create(policy, optimizer),
        create(value, optimizer),
        jax.tree.map(jnp.copy, policy),
        jnp.float32(0.02),
        jnp.int32(0),
    )
    order = np.arange(EPISODES, dtype=np.int32).reshape(-1, MINIBATCH)
    rows = episode_rows(order, prompts.mask_BxP, length_B, width, packed=packed)
    scored = scored_rows(rows, width, context)
    text = no_text(len(order))
    update = jax.jit(
        functools.partial(
            ppo_steps.ppo_iteration, config=c, model_config=m, reward_config=m,
            policy_optimizer=optimizer, value_optimizer=optimizer,
        ),
        donate_argnums=0,
    )  # fmt: skip

    def run() -> int:
        nonlocal state
        state, found = update(state, rollout, text, metrics["objective/kl"], rows, scored)
        jax.block_until_ready(found)
        return tokens

    tokens = int((prompt_B + length_B).sum())
    return run, tokens / rows.size


WORKS = {"sft": ("SFT step", sft), "ppo": ("PPO updates", ppo)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--context", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--only", choices=list(WORKS), nargs="+", default=list(WORKS))
    given = parser.parse_args()
    folder = os.environ.get("INSTRUCTAX_TEST_DATA", "")
    if not Path(folder, "oasst_trees").is_dir():
        sys.exit("packing: set INSTRUCTAX_TEST_DATA to a folder that holds oasst_trees")
    print("| work | context | filled | padded, tokens/s | packed, tokens/s | packed is |")
    print("|---|---|---|---|---|---|")
    for context in given.context:
        found = examples(Path(folder), context)
        for name, build in (WORKS[work] for work in given.only):
            (padded, filled), (packed, _) = (build(found, context, p) for p in (False, True))
            seconds: list[list[float]] = [[], []]
            tokens = [run() for run in (padded, packed)]  # compiles
            for _ in range(given.rounds):
                for times, run in zip(seconds, (padded, packed), strict=True):
                    began = time.perf_counter()
                    run()
                    times.append(time.perf_counter() - began)
            rates = [n / statistics.median(t) for n, t in zip(tokens, seconds, strict=True)]
            print(
                f"| {name} | {context} | {filled:.0%} | {rates[0]:,.0f} | {rates[1]:,.0f} | "
                f"{rates[1] / rates[0]:.2f} times |",
                flush=True,
            )


if __name__ == "__main__":
    main()
