"""What is known of a program before it is compiled, and the abstract arrays that programs take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instructax.batches import Layout, LmBatch, PromptBatch, Responses
from instructax.config import Config, ModelConfig
from instructax.models import functional as model
from instructax.plan.memory import shard_bytes
from instructax.runtime import mesh as mesh_lib
from instructax.stages.context import reward_model
from instructax.steps.state import TrainState, create


@dataclass(frozen=True)
class Program:
    """One jitted function with abstract arguments, and what else is known of it."""

    name: str
    jitted: Any
    arguments: tuple[Any, ...]
    passed: dict[str, float]
    """Bytes a chip of its arguments by kind; what is not named is batch."""
    held: dict[str, float] = field(default_factory=dict)
    """Bytes a chip of what lies there beside it."""
    made: dict[str, float] = field(default_factory=dict)
    """Bytes a chip of its temporaries that have a name."""
    model_flops: float = 0.0
    """Of the whole program, over all chips."""
    least_moved: float = 0.0
    """Bytes that a chip cannot but send; 0 where nothing is said."""
    unknown_trips: int = 1
    """Turns of the loop whose number only the data knows."""
    filled: tuple[int, int] = (1, 1)
    """From how many slots to how many the cache fills in that loop."""
    bandwidth_bound: float = 0.0
    """Bytes a chip that decoding cannot but read: weights and cache, each token."""
    iterations: int = 0
    """How often a run of PPO makes this update."""


class Shapes:
    """Abstract arrays as the stages lay them out on the mesh; what builds a stage's programs starts from it."""

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.reward_model = reward_model(config)
        self.by_rows = mesh_lib.batch_sharding(mesh)
        self.whole = NamedSharding(mesh, PartitionSpec())

    def of_rows(self, field: str, shape: tuple[int, ...], dtype: Any) -> Any:
        mesh_lib.check_rows(self.mesh, field, shape[0])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.by_rows)

    def layout(self, field: str, rows: int, length: int, prefixed: bool = False) -> Layout:
        slots = self.of_rows(field, (rows, length), jnp.int32)
        return Layout(slots, slots, slots, slots, prefixed)

    def text(self, field: str, rows: int, length: int) -> LmBatch:
        weight = self.of_rows(field, (rows, length), jnp.float32)
        return LmBatch(self.layout(field, rows, length), weight)

    def prompts(self, field: str, rows: int) -> PromptBatch:
        shape = (rows, self.config.ppo.prompt_length)
        return PromptBatch(
            self.of_rows(field, shape, jnp.int32),
            self.of_rows(field, shape, jnp.bool_),
            self.of_rows(field, (rows,), jnp.int32),
        )

    def responses(self, field: str, rows: int) -> Responses:
        shape = (rows, self.config.ppo.response_length)
        return Responses(
            self.of_rows(field, shape, jnp.int32),
            self.of_rows(field, shape, jnp.bool_),
            self.of_rows(field, shape, jnp.float32),
            self.of_rows(field, (rows,), jnp.int32),
        )

    def sources(self, *shape: int) -> Any:
        """Where rows of the host go: the same on every chip. None where episodes are not packed."""
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.whole)

    def key(self) -> Any:
        return jax.eval_shape(lambda: jax.random.key(0))

    def params(self, m: ModelConfig, head: str) -> Any:
        return mesh_lib.abstract_sharded(
            self.mesh, lambda: model.init(jax.random.key(0), m, head), over=m.shard_over
        )

    def state(self, m: ModelConfig, head: str, optimizer: Any) -> TrainState:
        return mesh_lib.abstract_sharded(
            self.mesh,
            lambda: create(model.init(jax.random.key(0), m, head), optimizer),
            over=m.shard_over,
        )


def shardings(abstract: Any) -> Any:
    """Where each leaf of a tree of abstract arrays lies."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def bytes_of(state: TrainState) -> dict[str, float]:
    """Bytes a chip of a network in training, by kind."""
    return {
        "params": shard_bytes(state.params),
        "optimizer": shard_bytes((state.opt_state, state.step)),
    }
