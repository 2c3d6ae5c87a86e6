"""--profile: own times, gaps and the page, from made-up events and from a real trace."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from instructax.runtime import profile
from instructax.runtime.profile import Event


def event(start, end, name, program="jit_update", line="a"):
    return Event(line, float(start), float(end), name, program)


def test_what_lies_within_an_operation_is_not_its_own_time():
    own = profile.own_time(
        [
            event(0, 100, "fusion.1"),
            event(10, 40, "dot.2"),
            event(50, 60, "dot.2"),
            event(20, 25, "copy.1"),
        ]
    )
    assert own == {
        ("jit_update", "fusion.1"): 60,
        ("jit_update", "dot.2"): 35,
        ("jit_update", "copy.1"): 5,
    }


def test_lines_are_counted_apart_and_loops_not_at_all():
    events = [
        event(0, 100, "while.1"),
        event(0, 90, "dot.1", line="b"),
        event(0, 80, "dot.1", "jit_sample", line="c"),
    ]
    assert profile.own_time(events) == {("jit_update", "dot.1"): 90, ("jit_sample", "dot.1"): 80}


def test_gaps_are_where_no_line_is_busy():
    events = [
        event(0, 10, "a"),
        event(5, 20, "b", line="b"),
        event(30, 40, "c"),
        event(31, 32, "d"),
    ]
    assert profile.busy_time(events) == 30
    assert profile.busy_time([]) == 0


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dot.12", "matrix products"),
        ("ynn_fusion.3", "matrix products"),
        ("__cublas$gemm", "matrix products"),
        ("custom-call.1", "matrix products"),
        ("all-gather-start.2", "collectives"),
        ("reduce-scatter.1", "collectives"),
        ("input_scatter_fusion", "gathers and scatters"),
        ("dynamic-update-slice.4", "gathers and scatters"),
        ("copy_bitcast_fusion.27", "copies and transposes"),
        ("reduce-window.1", "reductions"),
        ("multiply_tanh_fusion", "elementwise"),
        ("fusion.7", "elementwise"),
    ],
)
def test_kinds(name, expected):
    assert profile.kind(name) == expected


def test_the_page_adds_up():
    """Three steps of 10 ms, of which 9 are busy: 6 in the update, 3 in the sampler."""
    ms = 1_000_000
    events = [
        event(0, 15 * ms, "dot.1"),
        event(15 * ms, 18 * ms, "copy.1"),
        event(20 * ms, 29 * ms, "dot.4", "jit_sample(123)"),
    ]
    text = profile.page("ppo: steps 3 to 5", events, 0.030)
    assert text.startswith("# ppo: steps 3 to 5\n\n10.0 ms a step. In 10.0% of it no operation ran")
    assert "|  | update | sample | all | share |" in text
    assert "| matrix products | 5.0 | 3.0 | 8.0 | 89% |" in text
    assert "| copies and transposes | 1.0 | 0.0 | 1.0 | 11% |" in text
    assert "| all | 6.0 | 3.0 | 9.0 | 100% |" in text
    assert "| share | 67% | 33% | 100% |" in text
    assert "| `dot.1` | update | 5.0 | 56% |" in text
    assert "no operation of a compiled program" in profile.page("sft", [], 1.0)


def test_a_real_trace_names_its_program(tmp_path, capsys):
    @jax.jit
    def product(x):
        return x @ x

    x = jnp.ones((64, 64))
    done = []

    def step(i):
        done.append(i)
        return {"loss": product(x).sum()}

    traced = profile.profiled(step, tmp_path / "profile", "sft", 7)
    for i in range(10, 17):
        assert traced(i)["loss"] == 64**3
    assert done == list(range(10, 17))
    text = (tmp_path / "profile" / profile.PAGE).read_text("utf-8")
    assert text.startswith("# sft: steps 13 to 15\n")
    assert "product" in text and "matrix products" in text
    assert "profile of 3 steps" in capsys.readouterr().out


def test_a_loop_too_short_is_left_alone(tmp_path, capsys):
    step = functools.partial(dict, loss=1.0)
    assert profile.profiled(step, tmp_path, "sft", profile.AFTER + profile.STEPS - 1) is step
    assert "too few" in capsys.readouterr().out
