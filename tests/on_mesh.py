"""What every mesh must compute alike, and a program that computes it as one of many processes.

``python on_mesh.py FOLDER MESH... -- STATE...`` with MESH as ``data,fsdp,model``. The main process
writes ``FOLDER/<mesh>.npz``; the state after one PPO iteration is saved into ``FOLDER/<mesh>``. Every
mesh also goes on from each STATE, such a folder of another mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import tiny

from instructax import partitioning
from instructax.batches import LmBatch, PromptBatch
from instructax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    RewardConfig,
)
from instructax.data import comparisons
from instructax.models import functional as model
from instructax.runtime import checkpoint, distributed, mesh
from instructax.stages import iteration, ppo, reward
from instructax.stages.context import Run
from instructax.stages.sampling import Sampler
from instructax.steps.optimizer import make_optimizer
from instructax.steps.reward import reward_step
from instructax.steps.sft import lm_step
from instructax.steps.state import PpoState, by_network, create

ONE = (1, 1, 1)
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8))
MODEL = dataclasses.replace(
    tiny.MODEL, num_layers=1, d_model=32, num_heads=8, d_ff=64, context_length=40
)
# Reward model and value network are shared out over data as well.
SCALAR = dataclasses.replace(MODEL, shard_over="data+fsdp")
# A large eps: where a gradient is 0 but for rounding, as of a bias that every score shares, Adam
# would make whole steps of the rounding, and no two meshes round alike.
RATE = OptimizerConfig(learning_rate=1e-2, eps=1e-3, schedule="constant", max_grad_norm=0.5)
PROMPT, RESPONSE, EPISODES, MINIBATCH = 6, 7, 16, 8
UPDATES = 2
CONFIG = Config(
    model=MODEL,
    data=DataConfig(max_prompt_tokens=PROMPT),
    reward=RewardConfig(model=SCALAR, batch_size=8, row_length=32, max_responses=3, optimizer=RATE),
    ppo=PpoConfig(
        kl_coef=0.1,
        ptx_coef=0.7,
        episodes=2 * EPISODES,
        batch_size=EPISODES,
        minibatch_size=MINIBATCH,
        policy_optimizer=RATE,
        value_optimizer=RATE,
        ema_decay=0.5,
        prompt_length=PROMPT,
        response_length=RESPONSE,
    ),
)


class Letters:
    """A tokenizer of single characters, whose texts show every id."""

    pad_id, bos_id, eos_id, vocab_size = tiny.PAD, 1, tiny.EOS, tiny.VOCAB
    role_ids = MappingProxyType({"system": 3, "user": 4, "assistant": 5, "end": 6})
    hash = "letters"

    def encode(self, text: str) -> list[int]:
        return [7 + ord(c) % (tiny.VOCAB - 7) for c in text]

    def decode(self, ids) -> str:
        return " ".join(str(int(i)) for i in ids)


def open_run(shape: tuple[int, int, int]) -> Run:
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(*shape))
    devices = jax.devices()[: int(np.prod(shape))]
    letters: Any = Letters()
    return Run(config, Path(), mesh.make_mesh(config.mesh, devices), letters)


def name_of(shape: Sequence[int]) -> str:
    return ",".join(map(str, shape))


def compute(
    shape: tuple[int, int, int], folder: Path, restore: Sequence[Path] = ()
) -> dict[str, np.ndarray]:
    """Losses, metrics, gradients, parameters and texts by name, the same on every process."""
    run = open_run(shape)
    with jax.set_mesh(run.mesh):
        networks = Ppo(run)
        found = {
            "sft": sft(run),
            "reward": rewards(run),
            "texts": texts(run),
            "ppo": networks.two_iterations(folder / name_of(shape)),
        }
        for state in restore:
            found[f"from {state.parent.name} {state.name}"] = networks.continued(state)
        found = mesh.to_host(found)
    paths = jax.tree_util.tree_leaves_with_path(found)
    return {partitioning.path_name(path): np.asarray(leaf) for path, leaf in paths}


def sft(run: Run) -> dict[str, Any]:
    """Packed weights with zeros among them, and dropout, whose draws must not depend on the mesh."""
    config = dataclasses.replace(MODEL, dropout=0.2)
    text = tiny.text(8, 12)
    weight = text.weight_BxL * (np.random.default_rng(1).random((8, 12)) < 0.6)
    batch = mesh.put_batch(run.mesh, LmBatch(jax.device_get(text.layout), weight.astype("f4")))
    step = functools.partial(lm_step, model_config=config, optimizer=make_optimizer(RATE, 10))
    return stepped(run, config, "lm", step, batch)


def rewards(run: Run) -> dict[str, Any]:
    rng = np.random.default_rng(2)

    def word(longest: int) -> str:
        return "".join(rng.choice(list("abcdefghijklmno"), rng.integers(1, longest + 1)))

    records = [
        {"prompt": word(4), "responses": [word(5) for _ in range(k)], "ranks": list(range(k))}
        for k in (3, 2, 3, 3, 2, 3, 2, 3)
    ]
    examples = comparisons.tokenise(
        records, run.tokenizer, max_prompt_tokens=PROMPT, max_length=16, max_slots=32
    )
    stream = comparisons.stream(
        examples, batch_size=8, row_length=32, max_responses=3, seed=0,
        rows=reward._rows(run, examples, 8), row_multiple=mesh.shards(run.mesh),
    )  # fmt: skip
    batch = mesh.put_batch(run.mesh, next(iter(stream.in_order())))
    step = functools.partial(reward_step, model_config=SCALAR, optimizer=make_optimizer(RATE, 10))
    return stepped(run, SCALAR, "scalar", step, batch)


def stepped(run: Run, config: ModelConfig, head: str, step, batch) -> dict[str, Any]:
    """What two steps make of metrics, parameters and optimizer; its moments are the gradients."""
    key = run.key("dropout") if head == "lm" else None

    def fresh():
        return create(model.init(jax.random.key(3), config, head), make_optimizer(RATE, 10))

    state = mesh.init_sharded(run.mesh, fresh, over=config.shard_over)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(lambda s, b: step(s, b, key), out_shardings=(shardings, None))
    state, first = jitted(state, batch)
    state, second = jitted(state, batch)
    return {"metrics": [first, second], "state": state}


def texts(run: Run) -> dict[str, Any]:
    """The Sampler's texts, scores and log-ratios; its list divides no mesh."""
    records = [{"prompt": "hi there"[: 1 + i % 4]} for i in range(11)]
    sampler = Sampler(run, records, batch_size=5)
    policy, reference = (
        mesh.init_sharded(run.mesh, lambda k=k: model.init(jax.random.key(k), MODEL, "lm"))
        for k in (3, 4)
    )
    scalar = reward_model(run)
    samples = sampler.sample(policy, jax.random.key(9), reward=scalar, reference=reference)
    assert [s.prompt for s in samples] == list(range(11))
    return {
        "text": np.asarray([s.text for s in samples]),
        "score": np.asarray([s.score for s in samples]),
        "kl": np.asarray([s.kl for s in samples]),
    }


def reward_model(run: Run) -> Any:
    return mesh.init_sharded(
        run.mesh, lambda: model.init(jax.random.key(5), SCALAR, "scalar"), over=SCALAR.shard_over
    )


class Ppo:
    """Two iterations of the stage's own programs, the second from a checkpoint or not."""

    def __init__(self, run: Run):
        self.run = run
        optimizer = make_optimizer(RATE, 10)
        self._reference = mesh.init_sharded(
            run.mesh, lambda: model.init(jax.random.key(3), MODEL, "lm")
        )
        reward = reward_model(run)

        def fresh(policy, value) -> PpoState:
            return PpoState(
                create(policy, optimizer),
                create(value, optimizer),
                jax.tree.map(jax.numpy.copy, policy),
                jax.numpy.float32(CONFIG.ppo.kl_coef),
                jax.numpy.int32(0),
            )

        over = by_network(MODEL.shard_over, SCALAR.shard_over)
        self.abstract = mesh.abstract_sharded(run.mesh, fresh, self._reference, reward, over=over)
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        # Not the reference itself: from there the log-ratios would all be 0.
        policy = jax.jit(lambda p: jax.tree.map(lambda x: x * 1.1, p))(self._reference)
        born = jax.jit(fresh, out_shardings=shardings)
        self._start = functools.partial(born, policy, reward)
        frozen = (self._reference, reward)
        # On one device they lie there, on several in the host's memory: it must make no difference.
        parked = mesh.parked("ppo.frozen_memory", frozen) if run.mesh.size > 1 else lambda: frozen
        self._iterate = iteration.programs(
            run, parked, {"gain": 1.3, "bias": -0.2}, optimizer, optimizer, shardings
        )

    def iteration(self, state: PpoState, i: int) -> tuple[PpoState, dict[str, Any]]:
        lengths = [1 + (5 * b + i) % PROMPT for b in range(EPISODES)]
        prompts: PromptBatch = tiny.prompts(lengths, PROMPT, first_episode=i * EPISODES)
        text = tiny.text(UPDATES * MINIBATCH, 12, seed=i)
        stacked = jax.tree.map(
            lambda x: np.asarray(x).reshape((UPDATES, MINIBATCH) + x.shape[1:]), text
        )
        state, metrics = self._iterate(state, i, prompts, stacked)
        clocks = ("timing/", "elapsed/")
        return state, {k: v for k, v in metrics.items() if not k.startswith(clocks)}

    def two_iterations(self, folder: Path) -> dict[str, Any]:
        state, first = self.iteration(self._start(), 0)
        # The next iteration takes the state's memory.
        found = mesh.to_host({"metrics": first, "state": ppo._items(state)})
        with checkpoint.Checkpoints(folder) as saved:
            saved.save(1, ppo._items(state), {})
        return {"first": found, "second": self._second(state)}

    def continued(self, folder: Path) -> dict[str, Any]:
        """The second iteration, from what any mesh has saved after the first."""
        with checkpoint.Checkpoints(folder) as saved:
            return {"second": self._second(ppo._restore(saved, 1, self.abstract))}

    def _second(self, state: PpoState) -> dict[str, Any]:
        state, metrics = self.iteration(state, 1)
        return {"metrics": metrics, "state": ppo._items(state)}


def main(arguments: Sequence[str]) -> None:
    split = arguments.index("--")
    folder, *names = arguments[:split]
    distributed.initialize_if_needed()
    for name in names:
        data, fsdp, tensor = map(int, name.split(","))
        found: dict[str, Any] = compute(
            (data, fsdp, tensor), Path(folder), list(map(Path, arguments[split + 1 :]))
        )
        if distributed.is_main():
            np.savez(Path(folder) / f"{name}.npz", **found)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    main(sys.argv[1:])
