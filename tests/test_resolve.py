"""Loading, overriding, writing down: what went in comes out, what is wrong is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from instructax.config import (
    Arm,
    Config,
    DataConfig,
    ModelConfig,
    PpoConfig,
    RewardConfig,
    UserError,
    WorldConfig,
    replace,
)
from instructax.resolve import _one_line, apply_arm, diff, dump, from_dict, load_config, parse

RICH = Config(
    name="rich",
    data=DataConfig(world=WorldConfig(seed=3), names=("Ada", "Bo")),
    model=ModelConfig(attention_pattern=("dense", "banded")),
    reward=RewardConfig(model=ModelConfig(num_layers=2)),
    ppo=PpoConfig(value_clip_range=None, stop_texts=("\n",)),
    arms=(
        Arm(),
        Arm("ppo", (("ptx_coef", 0.0), ("whiten_rewards", True), ("value_clip_range", None))),
    ),
)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- files -----------------------------------------------------------------------------------


def write(tmp_path, text, name="c.py"):
    file = tmp_path / name
    file.write_text(text)
    return file


def test_load_config_runs_the_file(tmp_path):
    base = write(
        tmp_path,
        "from instructax.config import Config\ndef config():\n    return Config(name='base')\n",
        "base.py",
    )
    text = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\nfrom pathlib import Path\n"
        "from instructax.config import replace\nfrom instructax.resolve import load_config\n"
        "@dataclass\nclass Sizes:\n    seed: int = 5\n"
        "def config():\n    return replace(load_config(Path(__file__).with_name('base.py')), seed=Sizes().seed)\n"
    )
    assert load_config(write(tmp_path, text)) == Config(name="base", seed=5)
    assert load_config(str(base)).name == "base"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "c.py: has no function config()"),
        ("config = 3", "c.py: has no function config()"),
        ("def config(:\n", "c.py:1: "),
        ("x = 1\0", "c.py"),
        (
            "def config():\n    x = 1\n    return 1 / 0\n",
            "c.py:3: ZeroDivisionError: division by zero",
        ),
        ("import no_such_module_at_all", "c.py:1: ModuleNotFoundError"),
        ("def config(x):\n    return x\n", "TypeError"),
        ("raise SystemExit(3)", "c.py:1: SystemExit: 3"),
        ("def config():\n    return None\n", "config() returned None, not a Config"),
        ("def config():\n    return {'seed': 1}\n", "config() returned {'seed': 1}, not a Config"),
        ("from instructax.config import *\ndef config():\n    return Config(sed=1)\n", "'sed'"),
        (
            "from instructax.resolve import load_config\ndef config():\n    return load_config('gone.py')\n",
            "gone.py: cannot be read",
        ),
    ],
)
def test_load_config_refuses(text, says, tmp_path):
    assert says in refusal(load_config, write(tmp_path, text))


def test_load_config_refuses_what_is_no_file(tmp_path):
    assert "No such file" in refusal(load_config, tmp_path / "gone.py")
    assert "Is a directory" in refusal(load_config, tmp_path)
    assert "cannot be read" in refusal(load_config, "a\0b")


# --- flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "path", "value"),
    [
        ("--ppo.ptx-coef 0", "ppo.ptx_coef", 0.0),
        ("--ppo.ptx_coef=0", "ppo.ptx_coef", 0.0),
        ("--ppo.value-clip-range none", "ppo.value_clip_range", None),
        ("--ppo.value-clip-range=None", "ppo.value_clip_range", None),
        ("--ppo.value-clip-range .3", "ppo.value_clip_range", 0.3),
        ("--ppo.missing-eos none", "ppo.missing_eos", "none"),
        ("--sft.remat none", "sft.remat", "none"),
        ("--ppo.missing-eos-value -1", "ppo.missing_eos_value", -1.0),
        ("--mesh.data -1", "mesh.data", -1),
        ("--ppo.whiten-rewards", "ppo.whiten_rewards", True),
        ("--ppo.no-whiten-advantages", "ppo.whiten_advantages", False),
        ("--ppo.policy-optimizer.max-grad-norm 1", "ppo.policy_optimizer.max_grad_norm", 1.0),
        ("--model.attention-pattern dense banded", "model.attention_pattern", ("dense", "banded")),
        ("--data.prompts a.jsonl b.jsonl", "data.prompts", ("a.jsonl", "b.jsonl")),
        ("--data.names", "data.names", ()),
        ("--sample.top-k 3", "sample.top_k", 3),
        ("--name none", "name", "none"),
        ("--arms.0.name x", "arms", (Arm("x"),)),
        (
            "--arms.0.changes batch_size 8 kl_coef 1 whiten_rewards true value_clip_range none kl_estimator k3",
            "arms",
            (
                Arm(
                    "ppo_ptx",
                    (
                        ("batch_size", 8),
                        ("kl_coef", 1.0),
                        ("whiten_rewards", True),
                        ("value_clip_range", None),
                        ("kl_estimator", "k3"),
                    ),
                ),
            ),
        ),
        ("--data.world.seed 4", "data.world", WorldConfig(seed=4)),
        ("--data.world none", "data.world", None),
    ],
)
def test_flag_sets_one_field_with_its_type(argv, path, value):
    got = config = parse(argv.split(), Config())
    for name in path.split("."):
        got = getattr(got, name)
    assert got == value
    assert type(got) is type(value)
    assert [
        p for p in diff(config, Config()) if not path.startswith(p) and not p.startswith(path)
    ] == []


def test_no_flags_change_nothing():
    assert parse([], RICH) == RICH


def test_an_opened_section_starts_from_the_policy():
    config = parse(["--reward.model.num-layers", "2", "--model.d-model", "96"], Config())
    assert config.reward.model == ModelConfig(num_layers=2, d_model=96, context_length=2048)
    assert config.model == ModelConfig(d_model=96, context_length=2048)
    # One that is there is kept, but for the flag; none closes it.
    assert parse(["--reward.model.d-model", "96"], RICH).reward.model == ModelConfig(
        num_layers=2, d_model=96
    )
    assert parse(["--reward.model", "none"], RICH).reward.model is None
    closed_and_opened = parse(["--data.world", "none", "--data.world.seed", "1"], RICH)
    assert closed_and_opened.data.world == WorldConfig(seed=1)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--ppo.ptx-coeff 0", "--ppo.ptx-coeff: no such field; did you mean --ppo.ptx-coef?"),
        ("--ppo.ptx_coeff=0", "did you mean --ppo.ptx-coef?"),
        ("--kl-coef 0", "did you mean --ppo.kl-coef?"),
        ("--sft.kl-coef 0", "did you mean --ppo.kl-coef?"),
        ("--gae-lamda 0", "did you mean --ppo.gae-lambda?"),
        ("--reward.modle.num-layers 1", "num-layers?"),
        ("--qqqq 0", "--help lists all fields"),
        ("--", "--: no such field"),
        ("-x", "-x: belongs to no flag"),
        ("stray", "stray: belongs to no flag"),
        ("--ppo.kl-coef 1 2", "2: belongs to no flag"),
        ("--ppo.whiten-rewards false", "--section.no-field"),
        ("--ppo.whiten-rewards=false", "--ppo.whiten-rewards: takes no value"),
        ("--ppo.ptx-coef abc", "--ppo.ptx-coef: must be a number, got 'abc'"),
        ("--ppo.ptx-coef", "--ppo.ptx-coef: must be a number, got nothing"),
        ("--ppo.ptx-coef --seed 1", "--ppo.ptx-coef: must be a number, got nothing"),
        ("--ppo.ptx-coef none", "--ppo.ptx-coef: must be a number, got 'none'"),
        ("--ppo.batch-size 1.5", "--ppo.batch-size: must be an integer, got '1.5'"),
        ("--ppo.value-clip-range x", "--ppo.value-clip-range: must be none or a number, got 'x'"),
        (
            "--ppo.kl-estimator k9",
            "--ppo.kl-estimator: must be one of 'k1', 'k2', 'k3', 'abs', 'max0', got 'k9'",
        ),
        ("--model.attention-pattern dense bended", "--model.attention-pattern: must be a tuple"),
        ("--arms.0.changes kl_coef", "--arms.0.changes: must be"),
        ("--arms.7.name a", "--arms.7.name: no such field"),
        ("--reward.model 3", "--reward.model: no such field"),
    ],
)
def test_bad_flags_are_refused_in_one_line(argv, says, capsys):
    assert says in refusal(parse, argv.split(), Config())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "bad", [{"ppo": None}, {"arms": ("ppo",)}, {"arms": (Arm("a", ("b",)),)}, {"seed": -1}]
)
def test_flags_over_a_bad_default_are_refused(bad):
    assert "must be" in refusal(parse, ["--name", "x"], replace(Config(), **bad))


def test_an_error_that_names_no_flag_is_flattened():
    box = "\x1b[31m╭─ Odd ────╮\x1b[0m\n│ first     │\n│ second    │\n╰───────────╯\n"
    assert _one_line(box, [], {}) == "Odd first second"


def test_tyro_is_not_imported_with_the_module():
    code = "import sys, instructax.resolve; print('tyro' in sys.modules or 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- JSON ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [Config(), RICH], ids=["default", "rich"])
def test_dump_and_from_dict_are_inverse_through_json(config):
    again = from_dict(json.loads(json.dumps(dump(config), allow_nan=False)))
    assert again == config
    assert repr(again) == repr(config)  # 1 and 1.0 and True are equal, but not the same


def test_from_dict_fills_in_defaults():
    assert from_dict({}) == Config()
    assert from_dict({"ppo": {"kl_coef": 0.5}}) == replace(Config(), ppo=PpoConfig(kl_coef=0.5))


@pytest.mark.parametrize(
    ("plain", "says"),
    [
        ([], "config = []: must be an object"),
        ({"sed": 1}, "sed: no such field; did you mean 'seed'?"),
        ({"ppo": {"klcoef": 1}}, "ppo.klcoef: no such field; did you mean 'kl_coef'?"),
        ({"arms": [{"nam": 1}]}, "arms.0.nam: no such field; did you mean 'name'?"),
        ({"reward": {"model": {"x": 1}}}, "reward.model.x: no such field"),
    ],
)
def test_from_dict_refuses_unknown_fields(plain, says):
    assert says in refusal(from_dict, plain)


def test_from_dict_leaves_a_pair_of_three_to_the_validator():
    assert from_dict({"arms": [{"changes": [["a", 1, 2]]}]}).arms == (Arm(changes=(("a", 1, 2),)),)  # type: ignore[arg-type]


def test_diff_names_what_changed():
    assert diff(RICH, RICH) == []
    other = replace(
        RICH, ppo=replace(RICH.ppo, kl_coef=1.0), reward=RewardConfig(), arms=RICH.arms[:1]
    )
    assert diff(RICH, other) == diff(other, RICH) == ["reward.model", "ppo.kl_coef", "arms"]
    inner = replace(RICH, reward=RewardConfig(model=ModelConfig(num_layers=3)))
    assert diff(RICH, inner) == ["reward.model.num_layers"]


def test_apply_arm_changes_ppo_alone():
    config = apply_arm(RICH, RICH.arms[1])
    assert diff(RICH, config) == ["ppo.ptx_coef", "ppo.whiten_rewards"]
    assert (config.ppo.ptx_coef, config.ppo.whiten_rewards) == (0.0, True)
    assert apply_arm(RICH, Arm()) == RICH
    text = refusal(apply_arm, RICH, Arm("a", (("klcoef", 0.0),)))
    assert "arm a: klcoef is no field of PpoConfig; did you mean 'kl_coef'?" in text
