"""`instructax data` on files: what it writes, and that its report counts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from instructax.__main__ import main

CONFIG = """
from instructax.config import Config, ModelConfig

def config():
    return Config(model=ModelConfig(context_length=2048, vocab_size=32000))
"""


def few_shot(n: int, count: int, **fields) -> dict:
    examples = [{"query": f"query {n}.{k}", "response": f"answer {n}.{k}"} for k in range(count)]
    return {"prompt": f"Instruction number {n}.", "few_shot": examples, **fields}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.fixture
def data(tmp_path, monkeypatch, capsys):
    """(files) -> (curation.json, set name -> records) of `instructax data`."""
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(CONFIG)

    def run(**files: list[dict]):
        flags = []
        for name, rows in files.items():
            flags += [f"--data.{name.replace('_', '-')}", write(tmp_path / f"{name}.in", rows)]
        code = main(["data", "--config", "c.py", "--data.validation-fraction", "0.3", *flags])
        assert code == 0, capsys.readouterr().err
        folder = Path("runs/run/data")
        sets = {
            path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for path in folder.glob("*.jsonl")
        }
        return json.loads((folder / "curation.json").read_text("utf-8")), sets

    return run


def test_few_shot_demonstrations_become_examples_that_share_a_split(data):
    plain = [{"prompt": f"plain {n}", "response": "r"} for n in range(20)]
    private = few_shot(99, 3)
    private["few_shot"][0]["query"] = "my card is 4111 1111 1111 1111"
    repeated = few_shot(0, 4)
    curation, sets = data(
        demonstrations=[*plain, *(few_shot(n, 4) for n in range(30)), private, repeated]
    )
    both = [sets["demonstrations"], sets["demonstrations_validation"]]
    expanded = [[r for r in rows if r.get("source") == "few_shot"] for rows in both]
    assert sum(map(len, both)) == 20 + 30 * 4 and sum(map(len, expanded)) == 30 * 4
    assert all(expanded) and not any("few_shot" in r for rows in both for r in rows)
    # An example's answer stands in the shots of the other three: none may lie in the other split.
    instructions = [{r["prompt"].split("\n")[0] for r in rows} for rows in expanded]
    assert not instructions[0] & instructions[1]
    for record in expanded[0]:
        assert record["response"] not in record["prompt"] and record["prompt"].count("answer") == 3
    for name, rows in zip(("demonstrations", "demonstrations_validation"), expanded, strict=True):
        counts = curation["few_shot"][name]["counts"]
        assert counts == {"records": len(rows) // 4, "examples": len(rows)}
    removed = {step["step"]: step["removed"] for step in curation["demonstrations"]}
    assert removed["remove_personal_data"] == 1 and removed["deduplicate"] == 1
    # Prompts that the run was not given are those of the demonstrations.
    assert [r["prompt"] for r in sets["prompts"]] == [r["prompt"] for r in sets["demonstrations"]]


def test_few_shot_prompts_count_once_for_their_user_and_expand_in_every_set(data):
    sent = [few_shot(n, 3, user_id="heavy") for n in range(210)]
    others = [{"prompt": f"plain {n}", "user_id": f"u{n}"} for n in range(40)]
    judged = [few_shot(500, 2, source="api"), {"prompt": "plain judged"}]
    curation, sets = data(prompts=[*sent, *others], prompts_evaluation=judged)
    both = [*sets["prompts"], *sets["prompts_validation"]]
    assert len(both) == 200 * 3 + 40
    assert sum(p["counts"]["records"] for p in curation["few_shot"].values()) == 201
    assert [r["prompt"][-12:] for r in sets["prompts_evaluation"]] == [
        "query 500.0\n", "query 500.1\n", "plain judged",
    ]  # fmt: skip
    assert {r.get("source") for r in sets["prompts_evaluation"]} == {"api", None}


def test_data_without_few_shot_says_nothing_of_it(data):
    curation, _ = data(prompts=[{"prompt": f"plain {n}"} for n in range(30)])
    assert "few_shot" not in curation


def test_a_bad_few_shot_record_is_refused_with_its_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(CONFIG)
    file = write(tmp_path / "p.jsonl", [{"prompt": "good"}, few_shot(0, 1)])
    assert main(["data", "--config", "c.py", "--data.prompts", file]) == 2
    assert f"{file}:2: few_shot holds 1 example" in capsys.readouterr().err
