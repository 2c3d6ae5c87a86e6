"""Rows are valid JSON, one a step, also after a kill."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from instructax.runtime.metrics import MetricsWriter, append_samples


def rows(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_rows_hold_plain_numbers_and_names_of_what_is_not_finite(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(
            1,
            {
                "loss": jnp.float32(0.5),
                "half": jnp.bfloat16(1.5),
                "count": np.int64(3),
                "nan": jnp.nan,
                "up": np.inf,
                "down": jnp.float32(-np.inf),
            },
        )
        (row,) = rows(tmp_path / "metrics.jsonl")  # flushed before the writer is closed
    assert row.pop("time") > 1e9
    assert row == {
        "step": 1,
        "loss": 0.5,
        "half": 1.5,
        "count": 3,
        "nan": "nan",
        "up": "inf",
        "down": "-inf",
    }
    assert list((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("metrics", "error"),
    [({"loss": jnp.zeros(2)}, ValueError), ({"loss": "low"}, TypeError), ({"step": 1}, ValueError)],
)
def test_what_is_not_a_scalar_is_refused_by_name(tmp_path, metrics, error):
    with MetricsWriter(tmp_path) as writer, pytest.raises(error, match=next(iter(metrics))):
        writer.write(1, metrics)


def test_resume_cuts_the_rows_of_the_killed_run(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": float(step)})
    append_samples(tmp_path, [{"step": s, "response": "é\n"} for s in (2, 2, 4)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a line that a kill cut short
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in rows(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert rows(tmp_path / "samples.jsonl") == [{"step": 2, "response": "é\n"}] * 2


def test_resume_from_nothing_starts_afresh_and_none_keeps_all(tmp_path):
    for resume, expected in ((None, [0]), (None, [0, 0]), (-1, [0])):
        with MetricsWriter(tmp_path, resume_step=resume) as writer:
            writer.write(0, {"loss": 1.0})
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == expected


def test_samples_take_arrays_and_need_a_step(tmp_path):
    append_samples(tmp_path, [{"step": 1, "score": jnp.float32(np.nan), "kl": np.float32(0.5)}])
    assert rows(tmp_path / "samples.jsonl") == [{"step": 1, "score": "nan", "kl": 0.5}]
    with pytest.raises(ValueError, match="step"):
        append_samples(tmp_path, [{"score": 1.0}])
