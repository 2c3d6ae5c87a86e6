"""Llama models in llama2.c's version-0 form, and its tokenizer files.

A model is 7 int32 (width, hidden width, layers, heads, key-value heads, vocabulary, context), then
float32 tensors, linear weights as out x in. A negative vocabulary says that the head is untied. Rotary
pairs are neighbours, so the config says ``rope_pairing="interleaved"`` and no weight is permuted.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instructax.config import ModelConfig, UserError
from instructax.models.presets import llama

Params = Any

BOS, EOS = 1, 2


def load(path: str | os.PathLike) -> tuple[Params, ModelConfig]:
    """Parameters in our tree, float32, and the architecture they belong to.

    Raises:
      UserError: the file cannot be read, or its size is not what its header says.
    """
    content = _bytes(path)
    if len(content) < 28:
        raise UserError(f"{path}: is too short for a llama2.c model; name another file")
    width, hidden, layers, heads, groups, vocab, context = struct.unpack("<7i", content[:28])
    tied, vocab = vocab > 0, abs(vocab)
    if min(width, hidden, layers, heads, groups, vocab, context) < 1 or width % heads:
        raise UserError(f"{path}: has no llama2.c version-0 header; name another file")
    head_width = width // heads
    kv = groups * head_width
    shapes: dict[str, tuple[int, ...]] = {
        "token": (vocab, width),
        "attn_norm": (layers, width),
        "q": (layers, width, width),
        "k": (layers, kv, width),
        "v": (layers, kv, width),
        "out": (layers, width, width),
        "mlp_norm": (layers, width),
        "gate": (layers, hidden, width),
        "down": (layers, width, hidden),
        "up": (layers, hidden, width),
        "final_norm": (width,),
        # Tables of cosines and sines that later versions leave out; ours are computed.
        "cos": (context, head_width // 2),
        "sin": (context, head_width // 2),
    }
    if not tied:
        shapes["head"] = (vocab, width)
    size = 28 + 4 * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    if size != len(content):
        raise UserError(
            f"{path}: has {len(content)} bytes, its header asks for {size}; it is cut short or no "
            "llama2.c version-0 model"
        )
    tensors, start = {}, 28
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        values = np.frombuffer(content, "<f4", count, start).astype(np.float32)
        tensors[name] = values.reshape(shape)
        start += 4 * count
    config = llama(
        layers,
        width,
        heads,
        hidden,
        vocab,
        context,
        num_kv_heads=groups,
        tie_embeddings=tied,
        rope_pairing="interleaved",
    )

    def kernel(name: str, *shape: int) -> Params:
        return {"kernel": tensors[name].swapaxes(1, 2).reshape(layers, *shape)}

    pad = ((0, config.padded_vocab_size - vocab), (0, 0))
    params = {
        "embed": {"token": np.pad(tensors["token"], pad)},
        "blocks": {
            "attn_norm": {"scale": tensors["attn_norm"]},
            "attn": {
                "q": kernel("q", width, heads, head_width),
                "k": kernel("k", width, groups, head_width),
                "v": kernel("v", width, groups, head_width),
                "out": kernel("out", heads, head_width, width),
            },
            "mlp_norm": {"scale": tensors["mlp_norm"]},
            "mlp": {
                "gate": kernel("gate", width, hidden),
                "up": kernel("up", width, hidden),
                "down": kernel("down", hidden, width),
            },
        },
        "final_norm": {"scale": tensors["final_norm"]},
    }
    if not tied:
        params["head"] = {"kernel": np.pad(tensors["head"], pad)}
    return params, config


def load_pieces(path: str | os.PathLike, vocab_size: int) -> list[bytes]:
    """The pieces of a tokenizer file: int32 longest piece, then (float32 score, int32 length, bytes) each."""
    content = _bytes(path)
    pieces, start = [], 4
    try:
        for _ in range(vocab_size):
            _, length = struct.unpack_from("<fi", content, start)
            start += 8
            if not 0 <= length <= len(content) - start:
                raise struct.error("a piece reaches beyond the end")
            pieces.append(content[start : start + length])
            start += length
    except struct.error:
        raise UserError(
            f"{path}: does not hold {vocab_size} pieces; name the tokenizer of this model"
        ) from None
    return pieces


def decode(pieces: Sequence[bytes], ids: Sequence[int]) -> str:
    """Text of the ids: BOS and EOS are left out, and the space that follows BOS; byte pieces become bytes."""
    out = b""
    for i, token in enumerate(ids):
        if token in (BOS, EOS):
            continue
        piece = pieces[token]
        if byte := re.fullmatch(rb"<0x([0-9A-Fa-f]{2})>", piece):
            piece = bytes([int(byte[1], 16)])
        if i > 0 and ids[i - 1] == BOS:
            piece = piece.removeprefix(b" ")
        out += piece
    return out.decode("utf-8", "replace")


def _bytes(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}); name another file") from None
