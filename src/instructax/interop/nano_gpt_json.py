"""GPT-2-shaped models as JSON: ``{"config": ..., NAME: {shape, dtype, data}}`` with PyTorch's names.

Tensors are base64 of little-endian float32; linear weights are out x in; the head is untied.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instructax.config import ModelConfig, UserError

Params = Any


def load(path: str | os.PathLike) -> tuple[Params, ModelConfig]:
    """Parameters in our tree, float32, and the architecture they belong to.

    Raises:
      UserError: the file cannot be read, or a tensor is missing or of another shape.
    """
    tensors, settings = read(path)
    try:
        layers, width, heads = (int(settings[k]) for k in ("n_layer", "n_embd", "n_head"))
        config = ModelConfig(
            num_layers=layers,
            d_model=width,
            num_heads=heads,
            vocab_size=int(settings["vocab_size"]),
            context_length=int(settings["block_size"]),
            tie_embeddings=False,
        )
        head_width = config.head_width
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: its config cannot be used ({error!r}); name another") from None

    def get(name: str, *shape: int) -> np.ndarray:
        found = tensors.get(name)
        if found is None or found.shape != shape:
            what = "is missing" if found is None else f"has shape {found.shape}"
            raise UserError(f"{path}: tensor {name} {what}, must be {shape}; name another file")
        return found

    def norm(name: str) -> Params:
        return {"scale": get(f"{name}.weight", width), "bias": get(f"{name}.bias", width)}

    def linear(name: str, inputs: int, outputs: int) -> Params:
        kernel = get(f"{name}.weight", outputs, inputs).T
        return {"kernel": kernel, "bias": get(f"{name}.bias", outputs)}

    def block(i: int) -> Params:
        at = f"transformer.h.{i}"
        qkv = linear(f"{at}.attn.c_attn", width, 3 * width)
        kernel = qkv["kernel"].reshape(width, 3, heads, head_width)
        bias = qkv["bias"].reshape(3, heads, head_width)
        attn = {n: {"kernel": kernel[:, j], "bias": bias[j]} for j, n in enumerate("qkv")}
        out = linear(f"{at}.attn.c_proj", width, width)
        out["kernel"] = out["kernel"].reshape(heads, head_width, width)
        return {
            "attn_norm": norm(f"{at}.ln_1"),
            "attn": attn | {"out": out},
            "mlp_norm": norm(f"{at}.ln_2"),
            "mlp": {
                "up": linear(f"{at}.mlp.c_fc", width, config.mlp_width),
                "down": linear(f"{at}.mlp.c_proj", config.mlp_width, width),
            },
        }

    blocks = [block(i) for i in range(layers)]
    pad = ((0, config.padded_vocab_size - config.vocab_size), (0, 0))
    vocab = config.vocab_size
    params = {
        "embed": {
            "token": np.pad(get("transformer.wte.weight", vocab, width), pad),
            "position": get("transformer.wpe.weight", config.context_length, width),
        },
        "blocks": jax.tree.map(lambda *leaves: np.stack(leaves), *blocks),
        "final_norm": norm("transformer.ln_f"),
        "head": {"kernel": np.pad(get("lm_head.weight", vocab, width), pad)},
    }
    return params, config


def read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], Mapping[str, Any]]:
    """All tensors of such a file by name, and its ``config``."""
    try:
        content = json.loads(Path(path).read_bytes())
        tensors = {n: _tensor(v) for n, v in content.items() if isinstance(v, dict) and "data" in v}
        return tensors, content["config"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise UserError(
            f"{path}: is no JSON file of config and tensors ({error}); name another file"
        ) from None


def _tensor(entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] != "torch.float32":
        raise ValueError(f"dtype {entry['dtype']} is not torch.float32")
    data = base64.b64decode(entry["data"], validate=True)
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(entry["shape"])
