"""The vocabulary of settings: documented, frozen, and refusing what it does not know."""

from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path

import pytest

from instructax import config as config_module
from instructax.config import Arm, Config, ModelConfig, OptimizerConfig, PpoConfig, replace
from instructax.validation import alternatives, hints, validate

SOURCE = Path(config_module.__file__)
CLASSES = {
    node.name: node
    for node in ast.parse(SOURCE.read_text("utf-8")).body
    if isinstance(node, ast.ClassDef)
    and dataclasses.is_dataclass(getattr(config_module, node.name))
}


def undocumented(node: ast.ClassDef) -> list[str]:
    """Fields without a string behind them; a section is explained by its class."""
    found = []
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign):
            continue
        text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if not text and ast.unparse(field.annotation) not in CLASSES:
            found.append(ast.unparse(field.target))
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_every_field_is_explained(name):
    assert ast.get_docstring(CLASSES[name]), f"{name} has no docstring"
    assert not undocumented(CLASSES[name]), f"add a docstring below these fields of {name}"


@pytest.mark.parametrize("name", CLASSES)
def test_none_means_one_thing_on_the_command_line(name):
    """A field that may be None has no value named "none": ``--field none`` could not say which."""
    for field, hint in hints(getattr(config_module, name)).items():
        named = [value for member in alternatives(hint) for value in typing.get_args(member)]
        assert not (type(None) in alternatives(hint) and "none" in named), f"{name}.{field}"


def test_undocumented_fields_are_found():
    node = ast.parse(
        "class A:\n    'a'\n    x: int = 1\n    y: int = 2\n    'y'\n    z: int = 3"
    ).body[0]
    assert isinstance(node, ast.ClassDef)
    assert undocumented(node) == ["x", "z"]


def test_default_config_is_valid():
    validate(Config())


def test_configs_are_frozen_and_hashable():
    # Steps take them as static arguments of jit.
    assert hash(Config()) == hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().ppo.kl_coef = 0.0  # type: ignore[misc]


def test_replace_changes_what_it_names_and_refuses_the_rest():
    assert replace(PpoConfig(), kl_coef=0.0).kl_coef == 0.0
    with pytest.raises(ValueError, match="PpoConfig has no field 'kl_coeff'"):
        replace(PpoConfig(), kl_coeff=0.0)


def test_derived_widths():
    model = ModelConfig(d_model=48, num_heads=4, vocab_size=130, vocab_multiple=64)
    assert (model.head_width, model.kv_heads, model.mlp_width, model.padded_vocab_size) == (
        12,
        4,
        192,
        192,
    )
    model = replace(model, d_head=8, num_kv_heads=2, d_ff=100, vocab_size=128)
    assert (model.head_width, model.kv_heads, model.mlp_width, model.padded_vocab_size) == (
        8,
        2,
        100,
        128,
    )


def test_defaults_of_the_paper():
    # Ouyang et al. 2022, section 3.5 and appendix C.
    config = Config()
    ppo = config.ppo
    assert (ppo.kl_coef, ppo.ptx_coef, ppo.episodes, ppo.batch_size, ppo.minibatch_size) == (
        0.02,
        27.8,
        256_000,
        512,
        64,
    )
    assert (
        ppo.inner_epochs,
        ppo.clip_range,
        ppo.discount,
        ppo.ema_decay,
        ppo.ptx_examples_per_episode,
    ) == (1, 0.2, 1.0, 0.992, 8)
    assert (ppo.kl_estimator, ppo.kl_controller, ppo.temperature) == ("k1", "fixed", 1.0)
    assert (config.sft.epochs, config.sft.dropout, config.sft.optimizer.learning_rate) == (
        16,
        0.2,
        9.65e-6,
    )
    assert (config.init.epochs, config.init.pretrain_mix, config.init.optimizer.learning_rate) == (
        2,
        0.1,
        5e-6,
    )
    assert (
        config.reward.epochs,
        config.reward.batch_size,
        config.reward.optimizer.learning_rate,
    ) == (1, 64, 9e-6)
    assert (OptimizerConfig().b1, OptimizerConfig().b2) == (0.9, 0.95)
    assert Arm().changes == ()
