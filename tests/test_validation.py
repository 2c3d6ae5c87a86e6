"""The validator: each rule refuses its case and lets the neighbour pass; nothing else ever escapes."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest

from instructax.config import (
    Arm,
    Config,
    DataConfig,
    ModelConfig,
    PpoConfig,
    RewardConfig,
    SftConfig,
    TokenizerConfig,
    UserError,
    WorldConfig,
    replace,
)
from instructax.ranges import RANGES, Range
from instructax.resolve import dump, from_dict, parse
from instructax.validation import alternatives, describe, hints, shown, validate

GOOD = Config(
    tokenizer=TokenizerConfig(vocab_size=512),
    data=DataConfig(max_prompt_tokens=32, max_response_tokens=16),
    model=ModelConfig(num_layers=4, d_model=48, num_heads=4, vocab_size=512, context_length=64),
    pretrain=replace(Config().pretrain, row_length=64, batch_size=16),
    sft=SftConfig(row_length=128, batch_size=16),
    init=SftConfig(row_length=128, batch_size=16, pretrain_mix=0.1),
    reward=RewardConfig(row_length=128),
    ppo=PpoConfig(prompt_length=32, response_length=32, ptx_row_length=64),
)
WITH_OTHERS = replace(
    GOOD,
    data=replace(GOOD.data, world=WorldConfig()),
    reward=replace(GOOD.reward, model=GOOD.model, init_from="sft"),
    arms=(Arm(), Arm("ppo", (("ptx_coef", 0.0),))),
)


def put(value, path: str, new):
    """A copy with the field at ``a.b.c`` (or ``arms.0.name``) set."""
    name, _, rest = path.partition(".")
    if isinstance(value, tuple):
        i = int(name)
        return (*value[:i], put(value[i], rest, new) if rest else new, *value[i + 1 :])
    return dataclasses.replace(
        value, **{name: put(getattr(value, name), rest, new) if rest else new}
    )


def changed(start: Config, changes: dict) -> Config:
    for path, new in changes.items():
        start = put(start, path, new)
    return start


def refusal(config, verb=None) -> str:
    with pytest.raises(UserError) as caught:
        validate(config, verb)
    text = str(caught.value)
    assert "\n" not in text
    assert " = " in text and ": " in text and "; " in text
    return text


def test_the_starting_points_are_valid():
    validate(GOOD)
    validate(WITH_OTHERS)


# --- types and ranges ------------------------------------------------------------------------


def leaves(value, prefix=""):
    """(path, class, field) of every field that is no section."""
    for name in hints(type(value)):
        inner = getattr(value, name)
        if dataclasses.is_dataclass(inner):
            yield from leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", type(value), name
    if isinstance(value, Config):
        yield from leaves(value.arms[0], "arms.0.")


LEAVES = list(leaves(WITH_OTHERS))
NUMBERS = [(p, c, n) for p, c, n in LEAVES if {int, float} & set(alternatives(hints(c)[n]))]


def test_every_number_has_a_range():
    for _, cls, name in NUMBERS:
        assert name in RANGES[cls], f"add {cls.__name__}.{name} to instructax.ranges.RANGES"


def test_ranges_name_fields_that_exist():
    for cls, table in RANGES.items():
        assert set(table) <= set(hints(cls)), cls


@pytest.mark.parametrize(("path", "cls", "name"), NUMBERS, ids=[p for p, _, _ in NUMBERS])
def test_every_number_is_held_to_its_range(path, cls, name):
    allowed = RANGES[cls][name]
    step = 1 if float not in alternatives(hints(cls)[name]) else 1e-6
    outside = []
    if math.isfinite(allowed.low):
        outside.append(allowed.low if allowed.low_open else allowed.low - step)
    if math.isfinite(allowed.high):
        outside.append(allowed.high if allowed.high_open else allowed.high + step)
    for value in (*outside, 2**63, -(2**63), 10**5000):
        assert path in refusal(put(WITH_OTHERS, path, value))
    if float in alternatives(hints(cls)[name]):
        for value in (math.nan, math.inf, -math.inf):
            assert path in refusal(put(WITH_OTHERS, path, value))


@pytest.mark.parametrize(("path", "cls", "name"), LEAVES, ids=[p for p, _, _ in LEAVES])
def test_every_field_is_held_to_its_type(path, cls, name):
    wrong = [object(), b"x", {"a": 1}, [1], 1j, np.zeros(2), np.int32(3)]
    members = alternatives(hints(cls)[name])
    wrong += [] if str in members else ["text"]
    wrong += [] if bool in members else [True]
    wrong += [] if type(None) in members else [None]
    wrong += [] if {int, float} & set(members) else [1, 1.5]
    wrong += [1.0] if int in members and float not in members else []
    wrong += [("a",)] if not hasattr(members[0], "__args__") else ["abc", (1,), ((1, 2),)]
    for value in wrong:
        text = refusal(put(WITH_OTHERS, path, value))
        assert path.split(".")[-1] in text, (value, text)
        assert "must be" in text


def test_an_integer_is_a_number():
    validate(
        changed(GOOD, {"ppo.kl_coef": 0, "ppo.ptx_coef": 1, "ppo.temperature": np.float64(1.0)})
    )


@pytest.mark.parametrize("value", [None, 3, "config", PpoConfig(), Config])
def test_what_is_no_config_is_refused(value):
    assert "must be a Config" in refusal(value)


def test_sections_of_another_class_are_refused():
    assert "ppo = " in refusal(replace(GOOD, ppo=SftConfig()))
    assert "reward.model" in refusal(put(GOOD, "reward.model", PpoConfig()))
    assert "arms[0]" in refusal(replace(GOOD, arms=("ppo",)))


def test_message_says_field_value_reason_and_remedy():
    assert refusal(put(GOOD, "ppo.kl_coef", -0.5)) == (
        "ppo.kl_coef = -0.5: must be at least 0; correct it in the config file, or give --ppo.kl-coef"
    )
    assert "must be one of 'pre', 'post'" in refusal(put(GOOD, "model.norm_position", "mid"))
    # The part that is wrong is named, inside containers and optional sections.
    assert refusal(put(GOOD, "data.names", ("a", 3))).startswith("data.names[1] = 3: must be text")
    assert refusal(put(WITH_OTHERS, "reward.model.d_ff", 1.5)).startswith("reward.model.d_ff = 1.5")
    assert refusal(put(WITH_OTHERS, "reward.model.d_ff", 0)).startswith("reward.model.d_ff = 0")
    assert len(refusal(put(GOOD, "ppo.kl_coef", "x" * 5000))) < 250


def test_words():
    assert describe(hints(PpoConfig)["value_clip_range"]) == "none or a number"
    assert describe(hints(Arm)["changes"]).startswith("a tuple, each a tuple of 2 (text; none or ")
    assert describe(hints(Config)["ppo"]) == "a PpoConfig"
    assert str(Range(0, 1, high_open=True)) == "at least 0 and below 1"
    assert shown(10**5000) == "<int>"
    assert shown("x\ny") == "'x\\ny'"


# --- rules across fields ---------------------------------------------------------------------

RULES = {
    # name: (verb, what is refused, what passes, part of the message)
    "heads divide the width": (None, {"model.num_heads": 5}, {"model.num_heads": 3}, "model.num_heads = 5: does not divide d_model = 48"),
    "or d_head is given": (None, {"model.num_heads": 5}, {"model.num_heads": 5, "model.d_head": 8}, "d_head"),
    "kv heads divide heads": (None, {"model.num_kv_heads": 3}, {"model.num_kv_heads": 2}, "model.num_kv_heads = 3"),
    "rope rotates pairs": (None, {"model.positions": "rope", "model.d_head": 5}, {"model.positions": "rope", "model.d_head": 6}, "5 wide"),
    "pattern is not empty": (None, {"model.attention_pattern": ()}, {"model.attention_pattern": ("banded",), "model.band_width": 8}, "names no layer"),
    "whole patterns": (None, {"model.attention_pattern": ("dense",) * 3}, {"model.attention_pattern": ("dense",) * 2}, "num_layers = 4"),
    "band inside the context": (None, {"model.attention_pattern": ("banded",), "model.band_width": 65}, {"model.attention_pattern": ("banded",), "model.band_width": 64}, "model.band_width = 65"),
    "no band, no rule": (None, {"model.attention_pattern": ("dense", "banded")}, {"model.band_width": 999}, "band"),
    "post-norm is LayerNorm": (None, {"model.norm_position": "post", "model.norm": "rms"}, {"model.norm_position": "post"}, "model.norm = 'rms'"),
    "reward model's shape": (None, {"reward.model": replace(GOOD.model, num_heads=5), "reward.init_from": "sft"}, {"reward.model": replace(GOOD.model, num_heads=3), "reward.init_from": "sft"}, "reward.model.num_heads"),
    "pretraining warm-up": (None, {"pretrain.steps": 100}, {"pretrain.steps": 101}, "pretrain.optimizer.warmup_steps = 100"),
    "minibatches divide": (None, {"ppo.minibatch_size": 65}, {"ppo.minibatch_size": 32}, "ppo.minibatch_size = 65: does not divide batch_size = 512"),
    "microbatches divide": (None, {"sft.grad_accumulation": 3}, {"sft.grad_accumulation": 4}, "sft.grad_accumulation = 3: does not divide batch_size = 16 into equal microbatches"),
    "microbatches of prompts divide": (None, {"reward.grad_accumulation": 3}, {"reward.grad_accumulation": 4}, "reward.grad_accumulation = 3"),
    "microbatches of a minibatch divide": (None, {"ppo.grad_accumulation": 3}, {"ppo.grad_accumulation": 64}, "ppo.grad_accumulation = 3: does not divide minibatch_size = 64"),
    "arm's microbatches divide": (None, {"arms.0.changes": (("grad_accumulation", 3),)}, {"arms.0.changes": (("grad_accumulation", 2),)}, "arms[0].ppo.grad_accumulation = 3"),
    "whole iterations": (None, {"ppo.episodes": 256_001}, {"ppo.episodes": 256_512}, "use 256000 or 256512"),
    "at least one iteration": (None, {"ppo.episodes": 100}, {"ppo.episodes": 512 * 11}, "use 512"),
    "policy warm-up": (None, {"ppo.episodes": 512 * 10}, {"ppo.episodes": 512 * 10, "ppo.inner_epochs": 2}, "ppo.policy_optimizer.warmup_steps = 80: leaves no step"),
    "value warm-up": (None, {"ppo.value_optimizer.warmup_steps": 4000}, {"ppo.value_optimizer.warmup_steps": 3999}, "ppo.value_optimizer.warmup_steps = 4000"),
    "some gradient": (None, {"ppo.rl_coef": 0.0, "ppo.ptx_coef": 0.0}, {"ppo.rl_coef": 0.0}, "no gradient is left"),
    "temperature": (None, {"ppo.temperature": 0.0}, {"ppo.temperature": 0.1}, "ppo.temperature = 0.0: must be above 0"),
    "kl estimator": (None, {"ppo.kl_estimator": "k4"}, {"ppo.kl_estimator": "k3"}, "must be one of 'k1'"),
    "adaptive beta starts above 0": (None, {"ppo.kl_controller": "adaptive", "ppo.kl_coef": 0}, {"ppo.kl_coef": 0}, "stays 0"),
    "adaptive beta stays above 0": (None, {"ppo.kl_controller": "adaptive", "ppo.kl_horizon": 102}, {"ppo.kl_controller": "adaptive", "ppo.kl_horizon": 103}, "use more than 102"),
    "missing EOS unused": (None, {"ppo.missing_eos": "none", "ppo.missing_eos_value": -1.0}, {"ppo.missing_eos": "none"}, "has no effect"),
    "missing EOS replaced": (None, {"ppo.missing_eos_value": 1.0}, {"ppo.missing_eos_value": -1.0}, "would reward a response without an end"),
    "missing EOS subtracted": (None, {"ppo.missing_eos": "subtract", "ppo.missing_eos_value": -1.0}, {"ppo.missing_eos": "subtract", "ppo.missing_eos_value": 1.0}, "would raise the score"),
    "greedy copies": (None, {"sample.temperature": 0, "sample.samples_per_prompt": 2}, {"sample.temperature": 0}, "copies of one greedy response"),
    "greedy best of n": (None, {"evaluate.temperature": 0}, {"evaluate.temperature": 0, "evaluate.best_of": 1}, "evaluate.best_of = 16"),
    "known policies": (None, {"evaluate.policies": ("sft", "ppo_ptxx")}, {"evaluate.policies": ("sft", "ppo_ptx")}, "did you mean 'ppo_ptx'?"),
    "an arm is a policy": (None, {"evaluate.policies": ("new",)}, {"evaluate.policies": ("new",), "arms": (Arm("new"),)}, "use one of pretrain, sft"),
    "policies of another verb": ("evaluate", {"evaluate.policies": ("x",)}, {}, "is no policy of this run"),
    "policies once": (None, {"evaluate.policies": ("sft", "sft")}, {"evaluate.policies": ("sft",)}, "evaluate.policies[1] = 'sft': is named twice"),
    "run name": (None, {"name": "../x"}, {"name": "x/seed0"}, "cannot name a folder"),
    "run name is not empty": (None, {"name": ""}, {"name": "a.b-c"}, "cannot name a folder"),
    "run folder": (None, {"run_dir": ""}, {"run_dir": "."}, "run_dir = '': is empty"),
    "arm name": (None, {"arms.0.name": "a/b"}, {"arms.0.name": "a=b", "evaluate.policies": ()}, "arms[0].name = 'a/b'"),
    "arm is no stage": (None, {"arms.0.name": "sft"}, {"arms.0.name": "ppo", "evaluate.policies": ()}, "is a name of the run's own"),
    "arm is nothing else of the run": (None, {"arms.0.name": "best_of_n"}, {"arms.0.name": "ppo", "evaluate.policies": ()}, "is a name of the run's own"),
    "arm names differ": (None, {"arms": (Arm("a"), Arm("a")), "evaluate.policies": ()}, {"arms": (Arm("a"), Arm("b")), "evaluate.policies": ()}, "arms[1].name = 'a': names two arms"),
    "arm field": (None, {"arms.0.changes": (("klcoef", 1.0),)}, {"arms.0.changes": (("kl_coef", 1.0),)}, "did you mean 'kl_coef'?"),
    "arm field once": (None, {"arms.0.changes": (("kl_coef", 1.0), ("kl_coef", 2.0))}, {"arms.0.changes": (("kl_coef", 1.0), ("rl_coef", 2.0))}, "is changed twice"),
    "arm type": (None, {"arms.0.changes": (("batch_size", 64.0),)}, {"arms.0.changes": (("batch_size", 64),)}, "arms[0].changes.batch_size = 64.0: must be an integer"),
    "arm range": (None, {"arms.0.changes": (("kl_coef", -1.0),)}, {"arms.0.changes": (("kl_coef", 0),)}, "arms[0].changes.kl_coef = -1.0: must be at least 0"),
    "arm section": (None, {"arms.0.changes": (("policy_optimizer", 1.0),)}, {"arms.0.changes": ()}, "must be a OptimizerConfig"),
    "arm pairs": (None, {"arms.0.changes": (("kl_coef",),)}, {"arms.0.changes": (("value_clip_range", None),)}, "must be a tuple of 2"),
    "arm rules": (None, {"arms.0.changes": (("minibatch_size", 65),)}, {"arms.0.changes": (("minibatch_size", 32),)}, "arms[0].ppo.minibatch_size = 65"),
    "arm against the model": (None, {"arms.0.changes": (("response_length", 33),)}, {"arms.0.changes": (("response_length", 31),)}, "ppo.response_length = 33"),
    "empty texts": (None, {"ppo.stop_texts": ("",)}, {"ppo.stop_texts": ("\n",)}, "ppo.stop_texts = ('',): holds an empty text"),
    "no NUL in text": (None, {"data.names": ("a\0",)}, {"data.names": ("a",)}, "data.names[0]"),
    # Sections against the model, where the verb uses the section.
    "vocabulary": ("sft", {"tokenizer.vocab_size": 511}, {"tokenizer.vocab_size": 512}, "model.vocab_size = 512: is not tokenizer.vocab_size = 511"),
    "vocabulary of no concern": ("sft", {"tokenizer.vocab_size": 511}, {"tokenizer.vocab_size": 511, "tokenizer.path": "there/t.model"}, "name a trained tokenizer"),
    "one tokenizer": (None, {"reward.model": replace(GOOD.model, vocab_size=513)}, {"reward.model": GOOD.model}, "share a tokenizer"),
    "reward model of another size": (None, {"reward.model": replace(GOOD.model, d_model=96)}, {"reward.model": replace(GOOD.model, d_model=96), "reward.init_from": "sft"}, "reward.init_from = '': is empty"),
    "pretraining rows": (None, {"pretrain.row_length": 65}, {"pretrain.row_length": 65, "pretrain.cross_document_mask": True}, "pretrain.row_length = 65: exceeds the model's context_length = 64"),
    "ptx rows": (None, {"ppo.ptx_row_length": 65}, {"ppo.ptx_row_length": 63}, "ppo.ptx_row_length = 65"),
    "demonstrations in context": (None, {"data.max_response_tokens": 33}, {"data.max_response_tokens": 32}, "context_length = 64 of the model in init"),
    "comparisons in context": (None, {"reward.model": replace(GOOD.model, context_length=47), "reward.init_from": "sft", "ppo.prompt_length": 1}, {"reward.model": replace(GOOD.model, context_length=48), "reward.init_from": "sft", "ppo.prompt_length": 1}, "context_length = 47 of the model in reward"),
    "demonstrations in a row": (None, {"sft.row_length": 47}, {"sft.row_length": 48}, "sft.row_length = 47: does not hold"),
    "comparisons in a row": (None, {"reward.row_length": 47}, {"reward.row_length": 48}, "reward.row_length = 47"),
    "episodes in context": (None, {"ppo.prompt_length": 33}, {"ppo.prompt_length": 31}, "exceed the policy's context_length = 64"),
    "episodes in the value's context": (None, {"reward.model": replace(GOOD.model, context_length=63), "reward.init_from": "sft"}, {"reward.model": replace(GOOD.model, context_length=65), "reward.init_from": "sft"}, "exceed the reward model's context_length = 63"),
    "another verb's section": ("pretrain", {"pretrain.row_length": 65}, {"ppo.prompt_length": 33, "sft.row_length": 47}, "pretrain.row_length"),
    "sampling has the episodes' lengths": ("sample", {"ppo.prompt_length": 33}, {"reward.row_length": 1}, "ppo.response_length"),
    "the report needs nothing": ("pretrain", {"pretrain.row_length": 65}, {}, "pretrain"),
    # The mesh.
    "no empty axis": (None, {"mesh.fsdp": 0}, {"mesh.fsdp": 1}, "mesh.fsdp = 0"),
    "one axis inferred": (None, {"mesh.fsdp": -1}, {"mesh.data": 2, "mesh.fsdp": -1}, "cannot both be inferred"),
    "heads over the mesh": (None, {"mesh.model": 3}, {"mesh.model": 4}, "does not split the model's num_heads = 4 into 3"),
    "kv heads over the mesh": (None, {"mesh.model": 4, "model.num_kv_heads": 2}, {"mesh.model": 4, "model.num_kv_heads": 1}, "kv_heads = 2"),
    "width over the mesh": (None, {"mesh.fsdp": 32}, {"mesh.fsdp": 16}, "mesh.fsdp = 32: does not split the model's d_model = 48"),
    "reward model over the mesh": (None, {"mesh.fsdp": 16, "reward.model": replace(GOOD.model, d_model=40), "reward.init_from": "sft"}, {"mesh.fsdp": 8, "reward.model": replace(GOOD.model, d_model=40), "reward.init_from": "sft"}, "mesh.fsdp = 16: does not split the reward model's d_model = 40"),
    "reward model over data as well": (None, {"mesh.data": 8, "mesh.fsdp": 2, "reward.model": replace(GOOD.model, d_model=40, shard_over="data+fsdp"), "reward.init_from": "sft"}, {"mesh.data": 8, "mesh.fsdp": 2, "reward.model": replace(GOOD.model, d_model=40), "reward.init_from": "sft"}, "mesh.data = 8: does not split the reward model's d_model = 40 into 16"),
    "a reward model that lies elsewhere has the same weights": (None, {"reward.model": replace(GOOD.model, d_model=96)}, {"reward.model": replace(GOOD.model, shard_over="data+fsdp", remat="none")}, "reward.init_from = '': is empty"),
    "batch over the mesh": (None, {"mesh.data": 32}, {"mesh.data": 16}, "batch_size = 16: is not divided by the 32 batch shards"),
    "minibatch over the mesh": ("ppo", {"mesh.data": 128}, {"mesh.data": 64}, "ppo.minibatch_size = 64: is not divided by the 128"),
    "microbatches over the mesh": (None, {"mesh.data": 8, "init.grad_accumulation": 4}, {"mesh.data": 8, "init.grad_accumulation": 2}, "init.batch_size = 16: is not divided by the 8 batch shards of mesh.data * mesh.fsdp for each of 4 microbatches; use a multiple of 32"),
    "microbatches of a minibatch over the mesh": ("ppo", {"mesh.data": 16, "ppo.grad_accumulation": 8}, {"mesh.data": 16, "ppo.grad_accumulation": 4}, "ppo.minibatch_size = 64: is not divided by the 16"),
    "batch of an inferred tensor axis": (None, {"mesh.model": -1, "mesh.data": 32}, {"mesh.model": -1, "mesh.data": 8}, "32 batch shards"),
    # Names of sources.
    "empty path": (None, {"data.prompts": ("",)}, {"data.prompts": ("a",)}, "data.prompts[0] = '': is an empty path"),
    "TFDS source": (None, {"data.prompts": ("tfds:x",)}, {"data.prompts": ("tfds:x@y#train",)}, "write tfds:NAME@FOLDER"),
    "world or files": (None, {"data.world": WorldConfig(), "data.prompts": ("a",)}, {"data.world": WorldConfig()}, "leave one of the two out"),
    # What is on the disk.
    "file is there": ("ppo", {"data.prompts": ("gone.jsonl",)}, {}, "data.prompts[0] = 'gone.jsonl': is not there, seen from "),
    "glob matches": ("ppo", {"data.prompts": ("there/*.gone",)}, {"data.prompts": ("there/*.jsonl",)}, "is not there"),
    "glob of an impossible name": ("ppo", {"data.prompts": ("\ud800/*",)}, {"data.prompts": ("there/**/a.jsonl",)}, "is not there"),
    "file is no folder": ("ppo", {"data.prompts": ("there",)}, {"data.prompts": ("there/a.jsonl",)}, "is or holds a folder"),
    "glob holds no folder": ("ppo", {"data.prompts": ("ther*",)}, {"data.prompts": ("there/a*",)}, "is or holds a folder"),
    "TFDS folder is there": ("ppo", {"data.prompts": ("tfds:x@gone",)}, {"data.prompts": ("tfds:x@there#train",)}, "is not there"),
    "bucket cannot be seen": ("ppo", {"data.prompts": ("gs:/bucket/x",)}, {"data.prompts": ("gs://bucket/x",)}, "is not there"),
    "prompts are needed": ("ppo", {"data.prompts": ()}, {"data.prompts": (), "data.pretrain": (), "data.world": WorldConfig()}, "data.prompts = (): names nothing, but `ppo` needs it"),
    "ptx text is needed": ("ppo", {"data.pretrain": ()}, {"data.pretrain": (), "ppo.ptx_coef": 0, "ppo.ptx_at_zero": "skip", "arms": ()}, "data.pretrain = ()"),
    "demonstrations are needed": ("sft", {"data.demonstrations": ()}, {"data.demonstrations": ("there/a.jsonl",)}, "`sft` needs it"),
    "SFT mix": ("sft", {"sft.pretrain_mix": 0.1, "data.pretrain": (), "data.demonstrations": ("there/a.jsonl",)}, {"data.pretrain": (), "data.demonstrations": ("there/a.jsonl",)}, "data.pretrain"),
    "init mix": ("init", {"data.pretrain": (), "data.demonstrations": ("there/a.jsonl",)}, {"init.pretrain_mix": 0, "data.pretrain": (), "data.demonstrations": ("there/a.jsonl",)}, "data.pretrain"),
    "comparisons are needed": ("reward", {"data.demonstrations": ("there/a.jsonl",)}, {"data.demonstrations": ("there/a.jsonl",), "data.comparisons": ("there/a.jsonl",)}, "data.comparisons"),
    "centre": ("reward", {"data.comparisons": ("there/a.jsonl",)}, {"data.comparisons": ("there/a.jsonl",), "reward.center_on_demonstrations": False}, "data.demonstrations"),
    "evaluation prompts": ("evaluate", {"data.prompts": ()}, {"data.prompts": (), "data.prompts_evaluation": ("there/a.jsonl",)}, "data.prompts_evaluation"),
    "prompts to sample": ("sample", {"data.prompts": ()}, {"data.prompts": (), "sample.prompts": ("there/a.jsonl",)}, "data.prompts_evaluation"),
    "prompts to sample are there": ("sample", {"sample.prompts": ("gone",)}, {"sample.prompts": ("there/a.jsonl",)}, "sample.prompts[0] = 'gone'"),
    "some data": ("data", {"data.prompts": (), "data.pretrain": ()}, {"data.pretrain": ()}, "`data` needs it"),
    "text for the tokenizer": ("tokenizer", {"data.prompts": (), "data.pretrain": ()}, {"data.pretrain": ()}, "`tokenizer` needs it"),
    "its own text": ("tokenizer", {"tokenizer.train_paths": ("gone",)}, {"tokenizer.train_paths": ("there/a.jsonl",), "data.pretrain": ("gone",)}, "tokenizer.train_paths[0]"),
    "tokenizer file": ("ppo", {"tokenizer.path": "gone"}, {"tokenizer.path": "there/t.model"}, "tokenizer.path = 'gone': is not there"),
    "weights": ("ppo", {"ppo.init_from": "gone"}, {"ppo.init_from": "there", "ppo.reward_from": "reward"}, "ppo.init_from = 'gone': is not there"),
    "weights of the run": ("ppo", {"ppo.reward_from": "other"}, {"run_dir": ".", "name": "there", "ppo.reward_from": "old"}, "ppo.reward_from"),
    "weights to sample": ("sample", {"sample.checkpoint": "gone"}, {"sample.checkpoint": "ppo_ptx"}, "sample.checkpoint"),
    "the whole recipe": ("run", {}, {"data.demonstrations": ("there/a.jsonl",), "data.comparisons": ("there/a.jsonl",)}, "`run` needs it"),
    "curated data is not looked for again": ("ppo", {"data.prompts": ("gone",)}, {"data.prompts": ("gone",), "run_dir": "there", "name": "curated"}, "gone"),
    "nor by the seeds of a run": ("ppo", {"data.prompts": ("gone",)}, {"data.prompts": (), "run_dir": "there", "name": "curated/seed0"}, "gone"),
}  # fmt: skip


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("there/old", "there/curated/data"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("a.jsonl", "t.model", "curated/data/curation.json"):
        (tmp_path / "there" / file).write_text("{}\n")


@pytest.mark.parametrize("name", RULES)
def test_rule(name, disk):
    verb, refused, passes, says = RULES[name]
    start = GOOD
    if verb is not None and "data.world" not in refused:
        start = changed(
            GOOD, {"data.prompts": ("there/a.jsonl",), "data.pretrain": ("there/a.jsonl",)}
        )
    if verb in ("pretrain", "sft") and "data.demonstrations" not in passes:
        start = put(start, "data.demonstrations", ("there/a.jsonl",))
    assert says in refusal(changed(start, refused), verb)
    validate(changed(start, passes), verb)


def test_report_looks_at_no_file(disk):
    validate(
        changed(
            GOOD, {"data.prompts": ("gone",), "tokenizer.path": "gone", "ppo.prompt_length": 99}
        ),
        "report",
    )


# --- fuzzing ---------------------------------------------------------------------------------

VERBS = (
    None,
    "run",
    "tokenizer",
    "data",
    "pretrain",
    "sft",
    "init",
    "reward",
    "ppo",
    "sample",
    "evaluate",
    "report",
)
POOL = [
    None, True, False, 0, 1, -1, 2, 3, 7, 63, 64, 65, 512, 2**31, 2**63, 10**400, -(10**30), 0.0, -0.0, 0.1, 0.5, 1.0,
    1.5, -2.5, 1e308, 1e-320, math.nan, math.inf, -math.inf, "", "a", "none", "k1", "ppo", "sft", "../x", "a\0b", "\ud800",
    "tfds:", "tfds:a@b", "gs://b/c", "~", "[", "**", "gone.jsonl", (), ("a",), ("",), ("a", "a"), (1,), (None,),
    (("kl_coef", 0.0),), (("nope", 1),), (("kl_coef",),), (("stop_texts", "x"),), ("dense", "banded"), ("dense",) * 7,
    [], {}, set(), b"x", 1j, object(), object, len, np.float32(1), np.arange(3), Arm(), (Arm(), Arm()), PpoConfig(), Config(),
    ModelConfig(), WorldConfig(), "x" * 10_000,
]  # fmt: skip
SECTIONS = [f.name for f in dataclasses.fields(Config)] + [
    "reward.model",
    "data.world",
    "ppo.policy_optimizer",
    "arms.0",
]
PATHS = [path for path, _, _ in LEAVES] + SECTIONS


def nearby(rng, config, path):
    """A value of the right kind close to the present one: what gets past the types, to the rules."""
    value = config
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, tuple) else getattr(value, name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return rng.choice([value + 1, value - 1, value * 2, value * 3, value // 2, -value, 0])
    if isinstance(value, tuple):
        return value * 2 or ("a",)
    return rng.choice([value, "a", None])


def outcome(config, verb) -> bool:
    """True where valid; UserError is the only other way out, in one line."""
    try:
        validate(config, verb)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        return False
    return True


def fuzz(mutations: int, seed: int) -> int:
    rng = random.Random(seed)
    valid = 0
    for _ in range(mutations):
        config = rng.choice([GOOD, WITH_OTHERS])
        for path in rng.sample(PATHS, rng.choice([1, 1, 2, 4])):
            try:
                config = put(
                    config,
                    path,
                    rng.choice(POOL) if rng.random() < 0.5 else nearby(rng, config, path),
                )
            except (TypeError, AttributeError, IndexError, ValueError):
                continue  # an earlier mutation took the section away
        verb = rng.choice(VERBS)
        if outcome(config, verb):
            valid += 1
            assert from_dict(json.loads(json.dumps(dump(config)))) == config
    return valid


def test_fuzzed_configs_are_valid_or_refused(disk):
    assert 0 < fuzz(300, seed=0) < 300


@pytest.mark.slow
def test_many_fuzzed_configs_are_valid_or_refused(disk):
    assert fuzz(10_000, seed=1) > 500


JSON_POOL = [
    None,
    True,
    0,
    -1,
    3,
    2**70,
    0.5,
    1e400,
    "",
    "x",
    "none",
    [],
    [1],
    ["a"],
    [["kl_coef", 0]],
    [[]],
    {},
    {"x": 1},
    [{}],
    [{"name": 1}],
]


def fuzz_json(mutations: int, seed: int) -> int:
    """A saved config damaged by hand: values replaced, keys dropped or misspelt at any depth."""
    rng, valid = random.Random(seed), 0
    for _ in range(mutations):
        plain = json.loads(json.dumps(dump(WITH_OTHERS)))
        for _ in range(rng.choice([1, 1, 3])):
            at = plain
            while True:
                key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
                if not (isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8):
                    break
                at = at[key]
            act = rng.random()
            if act < 0.7:
                at[key] = rng.choice(JSON_POOL)
            elif isinstance(at, dict):
                value = at.pop(key)
                if act < 0.8:
                    at[key[:-1]] = value
        try:
            config = from_dict(plain)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            valid += outcome(config, rng.choice(VERBS))
    return valid


def test_damaged_json_is_valid_or_refused(disk):
    assert 0 < fuzz_json(300, seed=0) < 300


@pytest.mark.slow
def test_much_damaged_json_is_valid_or_refused(disk):
    assert fuzz_json(10_000, seed=1) > 300


def own_text(flag: str) -> list[str]:
    """The value that a config has already, as one would type it; nothing for what is no field."""
    value = WITH_OTHERS
    for name in flag.removeprefix("--").replace("-", "_").split("."):
        if isinstance(value, tuple):
            value = value[int(name)] if name.isdecimal() and int(name) < len(value) else None
        else:
            value = getattr(value, name, None)
    return [str(value)] if isinstance(value, (bool, int, float, str)) else []


def fuzz_flags(mutations: int, seed: int) -> int:
    rng, valid = random.Random(seed), 0
    flags = [f"--{path.replace('_', '-')}" for path, _, _ in LEAVES]
    values = [
        "0",
        "-1",
        "1.5",
        "none",
        "None",
        "true",
        "x",
        "",
        "k1",
        "nan",
        "1e400",
        "[",
        "=",
        "--",
        "-x",
        "\ud800",
        "9" * 5000,
        "a b",
    ]
    for _ in range(mutations):
        argv = []
        for _ in range(rng.choice([1, 2, 3])):
            flag = rng.choice(flags)
            if rng.random() < 0.2:
                flag = flag[: rng.randrange(len(flag))] + rng.choice(["", "x", ".", "="])
            given = rng.choices(values, k=rng.choice([0, 1, 1, 1, 2]))
            if (
                rng.random() < 0.2
            ):  # the field's present value: what gets past the types, to the rules
                given = own_text(flag)
            argv += [flag] + given
        try:
            config = parse(argv, WITH_OTHERS)
        except UserError as error:
            assert "\n" not in str(error), argv
        else:
            valid += outcome(config, rng.choice(VERBS))
    return valid


def test_fuzzed_flags_are_valid_or_refused(disk):
    assert fuzz_flags(40, seed=0) < 40


@pytest.mark.slow
def test_many_fuzzed_flags_are_valid_or_refused(disk):
    assert fuzz_flags(1_000, seed=1) > 20
