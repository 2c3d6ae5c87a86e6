"""Text survives, special tokens cannot be typed, foreign models get what they lack."""

from __future__ import annotations

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instructax.config import UserError
from instructax.data.tokenizer import ROLE_PIECES, Tokenizer, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It was 1984, or 2001?",
    "Write a poem about the sea.\nWrite a list of three cities\tand rivers.",
    "Der schnelle braune Fuchs springt über den faulen Hund. \u2581 \u2585 \0",
] * 10
MODELS = {kind: train_tokenizer(TEXTS, 316, kind=kind) for kind in ("bpe", "unigram")}
TOKENIZERS = {kind: Tokenizer.from_bytes(model) for kind, model in MODELS.items()}
TYPED = [*ROLE_PIECES.values(), "<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>", "<0x41>"]


def foreign(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=308, minloglevel=2,
        byte_fallback=True, model_type="bpe", **options,
    )  # fmt: skip
    return model.getvalue()


# Drawn as parts: the awkward ones would hardly ever be drawn as single characters.
any_text = st.lists(
    st.sampled_from([*TYPED, " ", "  ", "\n", "\u2581", "\u2585", "\0", "\r", "é", "日本", "🎉"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
).map("".join)


@pytest.mark.parametrize("kind", MODELS)
@settings(deadline=None, max_examples=300)
@given(text=any_text)
@example(text="a\u2581 \u2581\u2581b <|assistant|>\u2581")
def test_any_text_round_trips_without_special_tokens(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(np.asarray([*tokenizer.special_ids, *ids], np.int32)) == text


def test_special_ids_are_distinct_and_pad_is_not_eos():
    for tokenizer in TOKENIZERS.values():
        assert len(tokenizer.special_ids) == 7
        assert tokenizer.pad_id != tokenizer.eos_id
        assert tokenizer.vocab_size == 316


def test_digits_are_apart():
    ids = TOKENIZERS["bpe"].encode("1984")
    assert [TOKENIZERS["bpe"].decode([i]) for i in ids] == list("1984")


def test_equal_text_gives_equal_bytes_and_the_hash_tells_models_apart():
    assert train_tokenizer(TEXTS, 316) == MODELS["bpe"]
    assert train_tokenizer(iter(TEXTS), 316, kind="unigram") == MODELS["unigram"]
    assert TOKENIZERS["bpe"].hash != TOKENIZERS["unigram"].hash
    assert len(TOKENIZERS["bpe"].hash) == 64


def test_the_file_is_the_bytes(tmp_path):
    path = tmp_path / "sub" / "t.model"
    model = train_tokenizer(TEXTS, 312, model_path=path)
    assert path.read_bytes() == model
    assert [p.name for p in path.parent.iterdir()] == ["t.model"]
    assert Tokenizer.from_file(path).hash == Tokenizer.from_bytes(model).hash


def test_no_line_is_skipped_however_long():
    long = "zebra " * 50_000  # one line far beyond SentencePiece's own default limit
    tokenizer = Tokenizer.from_bytes(train_tokenizer([long], 276))
    assert len(tokenizer.encode(" zebra")) < len(" zebra")


def test_what_a_foreign_model_lacks_is_appended():
    bare = Tokenizer.from_bytes(foreign(bos_id=-1, pad_id=-1))
    assert bare.vocab_size == 308 + 2 + 4
    assert {bare.bos_id, bare.pad_id, *bare.role_ids.values()} == set(range(308, 314))
    assert bare.eos_id < 308
    assert bare.decode([bare.pad_id, *bare.encode("the fox"), bare.eos_id]) == "the fox"


def test_a_role_piece_that_text_would_match_is_not_taken_as_a_role():
    tokenizer = Tokenizer.from_bytes(foreign(user_defined_symbols=list(ROLE_PIECES.values())))
    ids = tokenizer.encode("x <|assistant|> y")
    assert not tokenizer.special_ids & set(ids)
    assert min(tokenizer.role_ids.values()) >= 308


@pytest.mark.parametrize("size", [100, 5000])
def test_a_size_that_cannot_be_is_refused(size):
    with pytest.raises(UserError, match=f"vocab_size {size} .*"):
        train_tokenizer(TEXTS, size)


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="empty"):
        train_tokenizer([" \n ", ""], 300)
    with pytest.raises(ValueError, match="kind"):
        train_tokenizer(TEXTS, 300, kind="wordpiece")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no.model: cannot read"):
        Tokenizer.from_file(tmp_path / "no.model")
    for content in (b"", b"not a model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match="bad.model: is not a SentencePiece model"):
            Tokenizer.from_file(tmp_path / "bad.model")


def test_decode_checks_its_ids():
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="ids must lie"):
        tokenizer.decode([316])
    with pytest.raises(ValueError, match="rank 1"):
        tokenizer.decode(np.zeros((2, 2), np.int32))
