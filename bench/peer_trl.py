"""The peer in TRL: reward training on pairs, and PPO. Its trainers run whole; callbacks take the time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from bench import cases
from bench.cases import Case
from bench.peer_torch import PAD, config

PACKAGES = ("torch", "transformers", "trl")


class Stopwatch(TrainerCallback):
    """The seconds from one mark of a trainer's loop to the end of its step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_train_begin(self, *_, **__) -> None:
        self._since = time.perf_counter()

    def on_step_begin(self, *_, **__) -> None:
        # PPO's trainer has no such mark: its turn begins where the one before it ended.
        self._since = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._since)
        self._since = now


def build(case: Case, device: str) -> Callable[[int], list[float]]:
    """n -> the seconds of n units of the case's work."""
    torch.manual_seed(0)
    trainer, watch, set_turns = (_pairs if case.form == "pairs" else _ppo)(case, device)

    def measure(n: int) -> list[float]:
        watch.seconds.clear()
        set_turns(n)
        trainer.train()
        return list(watch.seconds)

    return measure


def _tokenizer(case: Case) -> PreTrainedTokenizerFast:
    """Ids for the trainers, which ask for a tokenizer and are given ids."""
    words = {f"w{i}": i for i in range(case.shape.vocab_size)} | {"<unk>": case.shape.vocab_size}
    words["<pad>"] = words.pop(f"w{PAD}")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="w1",
    )


def _settings(case: Case, device: str) -> dict:
    """What both trainers are told: no files, no reports, nothing recomputed without need."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="bench-"),
        "learning_rate": 1e-5,
        "weight_decay": 0.01,
        "bf16": case.shape.dtype == "bfloat16",
        "gradient_checkpointing": case.recompute,
        "use_cpu": device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _pairs(case: Case, device: str):
    chosen, rejected = cases.pairs(case)
    watch = Stopwatch()
    trainer = RewardTrainer(
        model=GPT2ForSequenceClassification(config(case.shape)),
        args=RewardConfig(
            per_device_train_batch_size=len(chosen),
            max_length=case.shape.context_length,
            max_steps=1,
            **_settings(case, device),
        ),
        train_dataset=Dataset.from_dict(
            {"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()}
        ),
        processing_class=_tokenizer(case),
        callbacks=[watch],
    )

    def set_turns(n: int) -> None:
        trainer.args.max_steps = n

    return trainer, watch, set_turns


def _ppo(case: Case, device: str):
    w = case.work
    watch = Stopwatch()
    trainer = PPOTrainer(
        args=PPOConfig(
            per_device_train_batch_size=w.rows,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=w.epochs,
            local_rollout_forward_batch_size=w.rows,
            total_episodes=w.rows,
            response_length=w.response,
            temperature=1.0,
            num_sample_generations=0,
            **_settings(case, device),
        ),
        processing_class=_tokenizer(case),
        model=GPT2LMHeadModel(config(case.shape)),
        ref_model=GPT2LMHeadModel(config(case.shape)),
        reward_model=GPT2ForSequenceClassification(config(case.shape)),
        value_model=GPT2ForSequenceClassification(config(case.shape)),
        train_dataset=Dataset.from_dict({"input_ids": cases.prompts(case).tolist()}),
        callbacks=[watch],
    )

    def set_turns(n: int) -> None:
        trainer.args.num_total_batches = n

    return trainer, watch, set_turns
