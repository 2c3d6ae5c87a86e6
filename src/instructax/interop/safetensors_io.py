"""Our own parameter tree as one ``.safetensors`` file.

Tensor names are paths joined by dots (``blocks.attn.q.kernel``, stacked on the layer axis). Padded
vocabulary rows stay out; the importer pads again, to any multiple. The header's metadata hold the
architecture as JSON, the head, and the tokenizer's hash.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from instructax.config import ModelConfig, UserError
from instructax.models import functional as model

Params = Any

FORMAT = "instructax-1"
_OF_VOCABULARY = ("embed.token", "head.kernel")


@dataclass(frozen=True)
class Imported:
    """What a file holds. ``head`` is "lm" or "scalar"; ``tokenizer`` is a hash, or empty."""

    params: Params
    model: ModelConfig
    head: str
    tokenizer: str


def export_params(
    path: str | os.PathLike,
    params: Params,
    model_config: ModelConfig,
    *,
    head: str,
    tokenizer: str = "",
) -> None:
    """Write ``params`` whole or not at all; ValueError where the tree is not of ``model_config``."""
    tensors = {name: np.asarray(value) for name, value in _flatten(params).items()}
    if wrong := _misfit({n: t.shape for n, t in tensors.items()}, _shapes(model_config, head)):
        raise ValueError(f"params are not of model_config: {wrong}")
    for name in _OF_VOCABULARY:
        if name in tensors:
            tensors[name] = np.ascontiguousarray(tensors[name][: model_config.vocab_size])
    metadata = {
        "format": FORMAT,
        "model": json.dumps(dataclasses.asdict(model_config)),
        "head": head,
        "tokenizer": tokenizer,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save(tensors, metadata))
    os.replace(partial, path)


def import_params(path: str | os.PathLike, *, vocab_multiple: int | None = None) -> Imported:
    """Read what :func:`export_params` wrote, the vocabulary padded by zeros to ``vocab_multiple``.

    Raises:
      UserError: not such a file, or tensors that its own metadata contradict.
    """
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error}); name another") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: was not exported from here; its metadata lack {FORMAT!r}")
    try:
        fields = json.loads(metadata["model"])
        fields["attention_pattern"] = tuple(fields["attention_pattern"])
        config, head = ModelConfig(**fields), metadata["head"]
        if vocab_multiple is not None:
            config = dataclasses.replace(config, vocab_multiple=vocab_multiple)
        expected = _shapes(config, head)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata are broken ({error}); export it again") from None
    missing_rows = config.padded_vocab_size - config.vocab_size
    for name in _OF_VOCABULARY:
        if name in tensors:
            tensors[name] = np.pad(tensors[name], ((0, missing_rows), (0, 0)))
    if wrong := _misfit({n: t.shape for n, t in tensors.items()}, expected):
        raise UserError(f"{path}: {wrong}; export it again")
    return Imported(_unflatten(tensors), config, head, metadata.get("tokenizer", ""))


def _shapes(config: ModelConfig, head: str) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), config, head))
    return {name: leaf.shape for name, leaf in _flatten(tree).items()}


def _misfit(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str | None:
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            return f"tensor {name} has shape {found.get(name)}, must be {expected.get(name)}"
    return None


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        at = f"{prefix}{name}"
        flat |= _flatten(value, f"{at}.") if isinstance(value, Mapping) else {at: value}
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree
