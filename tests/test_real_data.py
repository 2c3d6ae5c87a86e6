"""The recipe on real data from the command line, in miniature: conversion, tokenizer, and three stages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instructax.__main__ import main
from instructax.data import convert

CONFIG = Path(__file__).parent.parent / "configs" / "real_data.py"
SMALL = (
    *("--tokenizer.vocab-size", "1024", "--model.vocab-size", "1024", "--model.num-layers", "1"),
    *("--model.d-model", "32", "--model.num-heads", "2", "--model.context-length", "320"),
    *("--data.max-prompt-tokens", "240", "--data.max-response-tokens", "80"),
    *("--pretrain.steps", "6", "--pretrain.batch-size", "4", "--pretrain.row-length", "64"),
    *("--pretrain.evaluate-every", "6", "--pretrain.checkpoint-every", "6"),
    *("--pretrain.optimizer.warmup-steps", "1"),
    *("--sft.epochs", "1", "--sft.row-length", "320", "--reward.epochs", "1"),
    *(
        "--reward.row-length",
        "1536",
    ),
)


def curve(stage, name):
    lines = (Path("runs/real_data") / stage / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row[name] for row in map(json.loads, lines) if name in row]


def lines(name):
    return Path(f"runs/real_data/data/{name}.jsonl").read_text("utf-8").splitlines()


@pytest.mark.slow
def test_every_stage_on_real_data(real_data, tmp_path, monkeypatch, capsys):
    # One short book is enough here, and the held-out one is cut.
    prose = tmp_path / "data" / "pretrain_prose"
    prose.mkdir(parents=True)
    for name in ("Pride-and-Prejudice_1342.txt", "Alice-s-Adventures-in-Wonderland_11.txt"):
        text = (real_data / "pretrain_prose" / name).read_text("utf-8")
        (prose / name).write_text(text[:20_000], "utf-8")
    # A text in another encoding is set aside and counted, not lost in silence.
    latin = (real_data / "pretrain_prose" / "inaugural.txt").read_bytes()
    (prose / "inaugural.txt").write_bytes(latin)
    monkeypatch.setenv("INSTRUCTAX_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    records = "runs/real_data/records"
    for kind, source, name in (
        ("self_instruct", "self_instruct/seed_tasks.jsonl", "demonstrations"),
        ("open_assistant", "oasst_trees/en_100_tree.jsonl", "comparisons"),
    ):
        few = tmp_path / "data" / f"{kind}.jsonl"
        few.write_bytes(b"".join((real_data / source).read_bytes().splitlines(True)[:60]))
        assert convert.main([kind, str(few), f"{records}/{name}.jsonl"]) == 0
    for verb in ("tokenizer", "pretrain", "sft", "reward"):
        code = main([verb, "--config", str(CONFIG), *SMALL])
        assert code == 0, (verb, capsys.readouterr().err)

    curation = json.loads(Path("runs/real_data/data/curation.json").read_text("utf-8"))
    assert curation["quarantined"]["pretrain"] == {str(prose / "inaugural.txt"): 1}
    assert curve("pretrain", "loss/nll")[-1] < curve("pretrain", "loss/nll")[0]
    assert len(curve("sft", "eval/nll")) == 1
    assert json.loads(Path("runs/real_data/sft/chosen.json").read_text())["by"] == "loss"
    figures = json.loads(Path("runs/real_data/reward/validation.json").read_text("utf-8"))
    assert 0 <= figures["accuracy"] <= 1 and figures["pairs"] >= 10
    assert max(map(int, figures["accuracy_by_k"])) >= 3
    assert figures["demonstrations"] == pytest.approx(0, abs=1e-3)
    # No conversation stands on both sides of the split.
    sides = [
        {json.loads(line)["user_id"] for line in lines(name)}
        for name in ("comparisons", "comparisons_validation")
    ]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_the_config_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.delenv("INSTRUCTAX_DATA", raising=False)
    assert main(["pretrain", "--config", str(CONFIG)]) == 2
    assert "INSTRUCTAX_DATA is not set" in capsys.readouterr().err
