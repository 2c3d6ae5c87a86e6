"""What every stage starts from: the run's folder, mesh, tokenizer, keys, and earlier stages' weights."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from instructax.config import AS_RUN, Config, ModelConfig, UserError
from instructax.data.tokenizer import Tokenizer
from instructax.interop import safetensors_io
from instructax.models import functional as model
from instructax.runtime import checkpoint, mesh
from instructax.runtime.distributed import agree, all_see, is_main, join, on_main
from instructax.runtime.stopping import leave_if_stopped

Params = Any


@dataclass(frozen=True)
class Run:
    """One run of one seed: ``run_dir/name`` and what lies in it."""

    config: Config
    folder: Path
    mesh: Mesh
    tokenizer: Tokenizer

    def key(self, purpose: str) -> jax.Array:
        """A key of its own for every purpose; nothing else of the run draws from it."""
        root = jax.random.key(self.config.seed)
        return jax.random.fold_in(root, zlib.crc32(purpose.encode()) % 2**31)

    @property
    def reward_model(self) -> ModelConfig:
        return reward_model(self.config)


def reward_model(config: Config) -> ModelConfig:
    """The architecture of reward model and value network."""
    return config.model if config.reward.model is None else config.reward.model


def longest_example(config: Config, model_config: ModelConfig) -> int:
    """Tokens of the longest prompt with a response that training takes."""
    c = config.data
    return min(c.max_prompt_tokens + c.max_response_tokens, model_config.context_length)


def run_folder(config: Config) -> Path:
    return Path(config.run_dir) / config.name


def open_run(config: Config) -> Run:
    """Join the other processes, lay out the mesh, read the tokenizer; or leave, where a stop was asked for."""
    join(config)
    leave_if_stopped()
    folder = run_folder(config)
    tokenizer = Tokenizer.from_file(tokenizer_path(config))
    agree("tokenizer", tokenizer.hash)
    for name, size in (
        ("model.vocab_size", config.model.vocab_size),
        ("reward.model.vocab_size", reward_model(config).vocab_size),
    ):
        if size != tokenizer.vocab_size:
            raise UserError(
                f"{name} is {size}, but the tokenizer {tokenizer_path(config)} has "
                f"{tokenizer.vocab_size} entries; set --{name} {tokenizer.vocab_size}"
            )
    return Run(config, folder, mesh.make_mesh(config.mesh), tokenizer)


def tokenizer_path(config: Config) -> Path:
    """The given .model file, or the one that the tokenizer verb trains into the run's folder."""
    path = Path(config.tokenizer.path or run_folder(config) / "tokenizer.model")
    if not on_main(path.is_file):
        raise UserError(
            f"no tokenizer at {path}; train one with `instructax tokenizer` or give --tokenizer.path"
        )
    all_see(path.parent, path.name)
    return path


def checkpoint_meta(run: Run, model_config: ModelConfig, head: str, **more: Any) -> dict[str, Any]:
    """What a checkpoint says about itself, so that a later stage can refuse what does not fit."""
    return {
        "tokenizer": run.tokenizer.hash,
        "head": head,
        "model": json.loads(json.dumps(dataclasses.asdict(model_config))),
        **more,
    }


def abstract_params(run: Run, model_config: ModelConfig, head: str) -> Params:
    def init() -> Params:
        return model.init(jax.random.key(0), model_config, head)

    return mesh.abstract_sharded(run.mesh, init, over=model_config.shard_over)


def load_params(
    run: Run, source: str, model_config: ModelConfig, head: str, item: str = "params"
) -> Params:
    """Weights of an earlier stage of this run (``"sft"``), another run's stage folder, or a .safetensors file.

    Where a stage has chosen among its checkpoints (``chosen.json``), the chosen one.

    Raises:
      UserError: nothing there, another tokenizer, another head or another architecture.
    """
    if source.endswith(".safetensors"):
        return _imported(run, source, model_config, head)
    where, step = on_main(lambda: _source(run.folder, source, run.tokenizer.hash, head))
    abstract = abstract_params(run, model_config, head)
    return checkpoint.load_item(Path(where) / "checkpoints", item, abstract, step)


def _source(run_folder: Path, source: str, tokenizer: str, head: str) -> tuple[str, int]:
    """The stage's folder and the step that a later stage takes from it."""
    folder = run_folder / source
    if not folder.is_dir():
        folder = Path(source)
    saved = folder / "checkpoints"
    if not saved.is_dir():
        raise UserError(
            f"no checkpoints of {source!r} in {run_folder}, nor at {source}; run that stage first "
            "or name a stage's folder or a .safetensors file"
        )
    if (folder / "chosen.json").is_file():
        step = json.loads((folder / "chosen.json").read_text("utf-8"))["step"]
    else:
        step = checkpoint.newest(saved)
    meta = checkpoint.load_meta(saved, step)
    if meta.get("tokenizer") != tokenizer:
        raise UserError(
            f"{folder} was trained with another tokenizer (hash {str(meta.get('tokenizer'))[:12]}, "
            f"this run's is {tokenizer[:12]}); token ids would not mean the same"
        )
    if meta["head"] != head:
        raise UserError(f"{folder} holds a {meta['head']} head, a {head} head is needed")
    return str(folder), step


# Fields in which weights may differ from the model that takes them up: nothing computed depends on them.
_NOT_OF_WEIGHTS = frozenset(
    (*AS_RUN, "dropout", "compute_dtype", "vocab_multiple", "init_std", "scale_residual_init")
)


def _imported(run: Run, path: str, model_config: ModelConfig, head: str) -> Params:
    found = safetensors_io.import_params(path, vocab_multiple=model_config.vocab_multiple)
    if found.tokenizer and found.tokenizer != run.tokenizer.hash:
        raise UserError(f"{path} belongs to another tokenizer (hash {found.tokenizer[:12]})")
    if found.head != head:
        raise UserError(f"{path} holds a {found.head} head, a {head} head is needed")
    for field in dataclasses.fields(ModelConfig):
        theirs, ours = (getattr(c, field.name) for c in (found.model, model_config))
        if theirs != ours and field.name not in _NOT_OF_WEIGHTS:
            raise UserError(f"{path} has {field.name} = {theirs}, this run's model {ours}")
    abstract = abstract_params(run, model_config, head)
    return jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), found.params, abstract)


def stands(result: Path, made_from: Iterable[Path]) -> bool:
    """Whether a result is there, and later than all that it was made from, none of which is gone."""
    try:
        made = result.stat().st_mtime_ns
        return all(path.stat().st_mtime_ns <= made for path in made_from)
    except FileNotFoundError:
        return False


def write_json(path: Path, value: Any) -> None:
    """Write whole or not at all (main process only)."""
    if not is_main():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)
