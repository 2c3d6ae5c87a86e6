"""Verbs and exit codes."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from instructax.__main__ import VERBS, main
from instructax.config import Config, UserError, replace

CONFIG = """
from instructax.config import Config, ModelConfig

def config():
    return Config(name="from_file", model=ModelConfig(context_length=2048, vocab_size=32000))
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(CONFIG)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n')
    return "c.py"


@pytest.fixture
def stage(monkeypatch):
    """Puts a function in the place of a verb's stage."""

    def install(verb, run):
        module = types.ModuleType(f"instructax.{VERBS[verb][0]}")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def raising(error):
    def run(config, **more):
        raise error

    return run


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb_with_a_line(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for verb, (_, _, line) in VERBS.items():
        assert any(verb in row.split() and line in row for row in out.splitlines()), verb


@pytest.mark.parametrize("verb", VERBS)
def test_verb_calls_its_stage_with_the_config(verb, file, stage, capsys):
    calls = []
    stage(verb, lambda config, **more: calls.append((config, more)))
    data = [
        x
        for kind in ("pretrain", "demonstrations", "comparisons", "prompts")
        for x in (f"--data.{kind}", "text.jsonl")
    ]
    assert main([verb, "--config", file, "--seed", "7", *data]) == 0, capsys.readouterr().err
    config, more = calls[0]
    assert isinstance(config, Config)
    assert (config.name, config.seed) == ("from_file", 7)
    assert more == ({"init": True} if verb == "init" else {})


def test_report_needs_no_config(stage):
    calls = []
    stage("report", calls.append)
    assert main(["report", "--name", "other"]) == 0
    assert calls == [replace(Config(), name="other")]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["traim"], "no verb 'traim'; did you mean pretrain?"),
        (["xyzzyqq"], "verbs are run, tokenizer"),
        (["ppo", "--config"], "--config: names no file"),
        (["ppo", "--config="], "--config: names no file"),
        (["ppo", "--config", "--seed"], "--config: names no file"),
        (["ppo", "--config", "a.py", "--config=b.py"], "--config: is given twice"),
        (
            ["ppo", "--config", "missing.py"],
            "missing.py: cannot be read (No such file or directory)",
        ),
        (["ppo", "--config=c.py", "--ppo.ptx-coeff", "0"], "did you mean --ppo.ptx-coef?"),
        (
            ["ppo", "--config=c.py", "--ppo.ptx-coef", "abc"],
            "--ppo.ptx-coef: must be a number, got 'abc'",
        ),
        (
            ["ppo", "--config=c.py", "--ppo.minibatch-size", "65"],
            "does not divide batch_size = 512",
        ),
        (["ppo", "--config=c.py", "--ppo.prompt-length", "2000"], "context_length = 2048"),
        (
            [
                "ppo",
                "--config=c.py",
                "--data.prompts",
                "gone.jsonl",
                "--data.pretrain",
                "text.jsonl",
            ],
            "data.prompts[0] = 'gone.jsonl': is not there",
        ),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(argv, says, file, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("instructax: ")
    assert err.count("\n") == 1
    assert says in err


def test_exit_codes_of_a_stage(file, stage, capsys):
    argv = ["report", "--config", file]
    stage("report", raising(UserError("two\n  lines")))
    assert main(argv) == 2
    assert capsys.readouterr().err == "instructax: two lines\n"
    stage("report", raising(KeyboardInterrupt()))
    assert main(argv) == 130
    stage("report", raising(BrokenPipeError()))
    assert main(argv) == 141
    stage("report", raising(SystemExit(143)))
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 143
    stage(
        "report", raising(ZeroDivisionError())
    )  # our fault, not the user's: the traceback is wanted
    with pytest.raises(ZeroDivisionError):
        main(argv)


def test_help_of_a_verb_explains_fields(file, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ppo", "--config", file, "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "beta: weight of the KL penalty in the reward" in out
    assert "gamma: weight of the pretraining gradient" in out
    # Sections that are none are explained too.
    assert "--reward.model.num-layers" in out
    assert "--data.world." in out


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "instructax"]
    done = subprocess.run(
        [*command, "traim"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "instructax: no verb 'traim'; did you mean pretrain?\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "instructax", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
