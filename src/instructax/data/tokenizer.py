"""SentencePiece with pad, bos, eos and role tokens of its own.

The special tokens are *control* pieces: SentencePiece never produces them from text, so a user who
types ``<|assistant|>`` gets ordinary pieces. Any ``.model`` file can be loaded; what it lacks among
pad, bos, eos and the four role tokens is appended behind its vocabulary, so ``vocab_size`` may be
larger than the file's. pad is never eos. With a tokenizer trained here ``decode(encode(text))`` is
``text`` for every text; a foreign model keeps its own normalisation and may lose characters it does
not know unless it has byte fallback.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece

from instructax.config import UserError

ROLE_PIECES = {
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "end": "<|end|>",
}

# SentencePiece writes a space as U+2581, so the character itself would come back as a space.
_SPACE_MARK = "\u2581"
# Characters its trainer reserves; a line that holds one is skipped, unless it is replaced first.
_RESERVED = str.maketrans({_SPACE_MARK: " ", "\u2585": " ", "\t": " ", "\r": " ", "\0": " "})
_LINE_CHARS = 16384


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    kind: Literal["bpe", "unigram"] = "bpe",
    character_coverage: float = 0.9995,
    model_path: str | os.PathLike | None = None,
) -> bytes:
    """Train a SentencePiece model and return its bytes, also written to ``model_path`` if given.

    Byte fallback (no text is lost), digits apart, no normalisation, no dummy prefix. ``vocab_size``
    counts everything: 4 + 4 special tokens, 256 bytes, and pieces. ``character_coverage`` is the
    share of characters that become pieces; rarer ones are spelt in bytes. Newlines are bytes too, so
    no piece spans two lines. Equal texts give equal bytes. Raises UserError where the size cannot be
    reached.
    """
    if kind not in ("bpe", "unigram"):
        raise ValueError(f"kind must be 'bpe' or 'unigram', got {kind!r}")
    model = io.BytesIO()
    lines = _lines(texts)
    try:
        first = next(lines)
    except StopIteration:
        raise UserError(
            "tokenizer: the training text is empty; name files that hold text"
        ) from None
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=kind,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=8 * _LINE_CHARS,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="<|pad|>",
            bos_piece="<|bos|>",
            eos_piece="<|eos|>",
            unk_piece="<|unk|>",
            control_symbols=list(ROLE_PIECES.values()),
            num_threads=1,  # the sums of unigram training depend on the number of threads
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "SentencePiece failed"
        raise UserError(
            f"tokenizer: vocab_size {vocab_size} does not suit this text: {reason}"
        ) from None
    if model_path is not None:
        path = Path(model_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(model.getvalue())
        os.replace(partial, path)
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.translate(_RESERVED).split("\n"):
            for start in range(0, len(line), _LINE_CHARS):
                part = line[start : start + _LINE_CHARS]
                if part.strip():
                    yield part


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


class Tokenizer:
    """Text to ids and back; ``hash`` identifies the model file and goes into every checkpoint."""

    def __init__(self, model: bytes, name: str = "tokenizer"):
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model) if model else None
        except RuntimeError:
            processor = None
        if processor is None:
            raise UserError(f"{name}: is not a SentencePiece model; name a .model file")
        self._processor = processor
        self.hash: str = hashlib.sha256(model).hexdigest()
        size = processor.piece_size()
        self._size = size

        def own_or_appended(candidate: int) -> int:
            nonlocal size
            if candidate >= 0:
                return candidate
            size += 1
            return size - 1

        eos, bos, pad = processor.eos_id(), processor.bos_id(), processor.pad_id()
        self.eos_id: int = own_or_appended(eos)
        self.bos_id: int = own_or_appended(bos if bos != eos else -1)
        self.pad_id: int = own_or_appended(pad if pad not in (eos, bos, processor.unk_id()) else -1)
        self.role_ids: dict[str, int] = {
            role: own_or_appended(self._control(piece)) for role, piece in ROLE_PIECES.items()
        }
        self.vocab_size: int = size
        self.special_ids: frozenset[int] = frozenset(
            {self.pad_id, self.bos_id, self.eos_id, *self.role_ids.values()}
        )
        ids = range(self._size)
        self._is_text = np.zeros(size, bool)
        self._is_text[: self._size] = [not processor.is_control(i) for i in ids]
        mark = [processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE_MARK.encode()]
        self._space_mark = mark if all(processor.is_byte(i) for i in mark) else None

    @classmethod
    def from_bytes(cls, model: bytes) -> Tokenizer:
        return cls(model)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Tokenizer:
        """Raises UserError where the file is missing or is no SentencePiece model."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(
                f"{os.fspath(path)}: cannot read the tokenizer ({error.strerror}); train one with "
                "`instructax tokenizer` or name an existing .model file"
            ) from None
        return cls(model, os.fspath(path))

    def _control(self, piece: str) -> int:
        """Id of a control piece, or -1. A user-defined piece of that name would match typed text."""
        i = self._processor.piece_to_id(piece)
        same = self._processor.id_to_piece(i) == piece and self._processor.is_control(i)
        return i if same else -1

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; no special token is ever among them."""
        if self._space_mark is None or _SPACE_MARK not in text:
            return self._processor.encode(text)
        first, *rest = text.split(_SPACE_MARK)
        ids = self._processor.encode(first)
        for part in rest:
            ids += self._space_mark
            ids += self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; special tokens are left out, broken byte sequences become U+FFFD."""
        array = np.asarray(ids, np.int64)
        if array.ndim != 1:
            raise ValueError(f"ids must have rank 1, got shape {array.shape}")
        if array.size == 0:
            return ""
        if array.min() < 0 or array.max() >= self.vocab_size:
            raise ValueError(f"ids must lie in [0, {self.vocab_size})")
        return self._processor.decode(array[self._is_text[array]].tolist())
