"""`instructax tokenizer`: train a SentencePiece model on the run's text."""

from __future__ import annotations

from pathlib import Path

from instructax.config import Config, UserError
from instructax.data.sources import load_records
from instructax.data.tokenizer import train_tokenizer
from instructax.runtime.distributed import on_main
from instructax.stages import data
from instructax.stages.context import run_folder


def run(config: Config) -> None:
    """Train ``run/tokenizer.model`` unless a path is given or one is there already."""
    if config.tokenizer.path:
        raise UserError(
            f"tokenizer.path names an existing model, {config.tokenizer.path}; leave it empty to train one"
        )
    on_main(lambda: _train(config, run_folder(config) / "tokenizer.model"))


def _train(config: Config, path: Path) -> None:
    if path.is_file():
        print(f"tokenizer: {path} is there already")
        return
    if config.tokenizer.train_paths:
        texts = [r["text"] for r in load_records("text", config.tokenizer.train_paths)]
    else:
        texts = list(data.all_texts(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, config.tokenizer.vocab_size, kind=config.tokenizer.kind, model_path=path)
    print(f"tokenizer: {config.tokenizer.vocab_size} entries from {len(texts)} texts, {path}")
