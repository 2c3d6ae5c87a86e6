"""The bench: what both sides read is the same, the arithmetic of its figures, and our side in miniature."""

from __future__ import annotations

import ast
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import __main__ as run
from bench import cases, columns, flops, roofline, table, worker

EVERY = cases.cpu_cases() + cases.gpu_cases()
OURS = [case for case in EVERY if "ours" in case.columns]


def case(key: str) -> cases.Case:
    return cases.find(key, cases.cpu_cases())


# What both sides read.


def real_sequences(layout) -> list[tuple[int, ...]]:
    """The texts of a layout: each segment behind its prompt's, prompts alone left out."""
    found = []
    for token, segment, prefix in zip(
        layout.token_BxL, layout.segment_BxL, layout.prefix_BxL, strict=True
    ):
        token, segment, prefix = map(np.asarray, (token, segment, prefix))
        prompts = set(prefix[prefix > 0])
        for s in sorted(set(segment[segment > 0]) - prompts):
            of_prompt = prefix[segment == s][0]
            before = token[segment == of_prompt] if of_prompt else token[:0]
            found.append((*before.tolist(), *token[segment == s].tolist()))
    return found


@pytest.mark.parametrize("form", ["sequences", "shared"])
def test_our_ranking_holds_the_texts_that_the_peers_pairs_hold(form):
    from bench import ours

    of_form = next(c for c in cases.cpu_cases() if c.form == form)
    batch = ours.comparison_batch(of_form)
    texts = real_sequences(batch.layout)
    chosen, rejected = cases.pairs(of_form)
    in_pairs = {tuple(row) for row in (*chosen.tolist(), *rejected.tolist())}
    assert len(texts) == of_form.work.rows * of_form.work.ways
    assert set(texts) == in_pairs
    # A score is read at the last token of its own response, and ranks agree with the pairs.
    token_NxKxL = cases.sequences(of_form)
    last = np.asarray(batch.layout.token_BxL)[batch.row_NxK, batch.last_NxK]
    np.testing.assert_array_equal(last, token_NxKxL[:, :, -1])
    rank_of = {
        tuple(token_NxKxL[n, k].tolist()): (n, batch.rank_NxK[n, k])
        for n in range(of_form.work.rows)
        for k in range(of_form.work.ways)
    }
    for better, worse in zip(chosen.tolist(), rejected.tolist(), strict=True):
        (n, high), (m, low) = rank_of[tuple(better)], rank_of[tuple(worse)]
        assert n == m and high < low


def test_the_shared_prompt_costs_its_tokens_once():
    from bench import ours

    shared = case("reward, shared prompt/small")
    layout = ours.comparison_batch(shared).layout
    w = shared.work
    assert (np.asarray(layout.segment_BxL) > 0).sum() == w.rows * (w.prompt + w.ways * w.response)
    assert len(cases.pairs(shared)[0]) == w.rows * w.ways * (w.ways - 1) // 2


def test_our_texts_and_prompts_are_the_peers():
    from bench import ours

    sft = case("sft/small")
    batch = ours.text_batch(sft)
    token_BxL, response_BxL = cases.texts(sft)
    np.testing.assert_array_equal(batch.layout.token_BxL, token_BxL)
    np.testing.assert_array_equal(np.asarray(batch.weight_BxL) > 0, response_BxL)
    assert response_BxL.sum() == sft.work.rows * sft.work.response
    for key in ("generate/small", "ppo/small"):
        np.testing.assert_array_equal(
            ours.prompt_batch(case(key)).token_BxP, cases.prompts(case(key))
        )


def test_no_input_holds_padding_or_an_end():
    for c in cases.cpu_cases():
        drawn = [cases.texts(c)[0], cases.prompts(c), *cases.rankings(c)[:2]]
        assert min(x.min() for x in drawn) >= cases.FIRST_ID
        assert max(x.max() for x in drawn) < c.shape.vocab_size


def test_keys_are_unique_and_every_comparison_has_both_sides():
    for of_device in (cases.cpu_cases(), cases.gpu_cases()):
        assert len({c.key for c in of_device}) == len(of_device)
        by_key = {c.key: c for c in of_device}
        for _, key, column, ours in table.comparisons(of_device):
            assert column in by_key[key].columns and "ours" in by_key[ours].columns
    with pytest.raises(ValueError, match="no case 'sft/huge'"):
        case("sft/huge")


# Figures.


def test_a_disturbed_round_counts_once():
    rounds = [[1.0, 1.0, 9.0], [2.0, 2.0], [50.0, 60.0, 70.0, 80.0]]
    assert table.median(rounds) == 2.0
    assert table.spread(rounds) == (65.0 - 1.0) / 2.0


def test_units_of_every_kind():
    units = {
        "sft/small": (8 * 256 / 2.0, "tokens/s"),
        "generate/small": (16 * 128 / 2.0, "tokens/s"),
        "reward, pairs/small": (1.0, "s a prompt"),
        "ppo/small": (2.0 / 16, "s an episode"),
    }
    for key, expected in units.items():
        assert table.per_unit(case(key), 2.0) == expected


def test_ratios_and_tables_of_made_up_seconds():
    of_size = [c for c in cases.cpu_cases() if c.size == "small"]
    found = {
        "sft/small": {"shipped": [[4.0], [6.0], [5.0]], "ours": [[2.0], [2.5], [3.0]]},
        "reward, pairs/small": {"tuned": [[30.0]]},
        "reward, K sequences/small": {"tuned": [[4.0]], "ours": [[6.0]]},
        "reward, shared prompt/small": {"ours": [[2.0]]},
    }
    assert table.ratio(found, "sft/small", "shipped", "sft/small") == 2.0
    assert table.ratio(found, "sft/small", "tuned", "sft/small") is None
    ratios = table.ratio_table(of_size, found)
    assert "reward, shared prompt, small: over peer tuned, reward, pairs | 15.00 |" in ratios
    assert "reward, shared prompt, small: over ours, reward, K sequences | 3.00 |" in ratios
    assert "sft, small: over peer as shipped | 2.00 |" in ratios
    assert f"ppo, small: over peer tuned | {table.NOT_MEASURED} |" in ratios
    text = table.main_table(of_size, found, {"sft/small": 1.25})
    row = next(line for line in text.splitlines() if line.startswith("| sft |"))
    assert row == (
        "| sft | small | tokens/s | 410 ± 20% | not measured | not measured | 819 ± 20% | 50% |"
    )
    assert (
        "| generate | small | tokens/s | not measured | not measured | - | not measured | - |"
        in text
    )


def test_the_table_of_where_seconds_go():
    rounds = [
        {"all": 3.0, "matrix products": t, "elementwise": 0.3, "between programs": 0.06}
        for t in (1.5, 1.2, 1.6)
    ]
    went = {"sft/small": {"ours": rounds, "tuned": [{"all": 1.2, "matrix products": 0.8}]}}
    found = {"sft/small": {"ours": [[2.0], [1.9], [2.1]], "tuned": [[1.0]]}}
    text = table.where_table(cases.cpu_cases(), found, went)
    assert text.splitlines()[2:] == [
        "| sft | small | peer tuned | 1 | 0.8 | 0.2 | - |",
        "| sft | small | ours | 2 | 1.5 | 0.5 | 2.0% |",
    ]


def test_the_gpu_table_says_what_was_not_measured_and_has_the_makers_peak():
    sft = cases.find("sft/1.3B", cases.gpu_cases())
    seconds = roofline.flops(sft) / (0.5 * run.PEAK_FLOPS)
    text = table.main_table(cases.gpu_cases(), {sft.key: {"ours": [[seconds]]}}, {}, run.PEAK_FLOPS)
    assert "ours of 989 TFLOP/s" in text
    row = next(line for line in text.splitlines() if line.startswith("| sft | 1.3B |"))
    assert row.endswith("| - | 50% |") and table.NOT_MEASURED in row


# The least work.


@pytest.mark.slow
@pytest.mark.parametrize("form", flops.FORMS)
def test_compiled_phases_compute_little_more_than_they_must(form):
    """Whatever the hardware: products in the compiled text, loops as often as they run."""
    small = next(c for c in cases.cpu_cases() if c.name == form and c.size == "small")
    for name, lowered, turns, least in flops.phases(small):
        assert 0.97 < flops.compiled_flops(lowered, turns) / least < 1.15, name


def test_least_flops_by_hand():
    """One layer of width 2, one head, vocabulary 8: what a token is multiplied with, by hand."""
    shape = cases.Shape(1, 2, 1, 8, 16)
    weights = 4 * 2 * 2 + 2 * 2 * 8  # q, k, v, out and the two of the MLP
    seen = 1 + 2 + 3  # a prompt of 2, a response of 1
    forward = 3 * 2 * weights + seen * 4 * 2 + 1 * 2 * 2 * 8
    sft = cases.Case("sft", "", shape, cases.Work("sft", 1, 2, 1), ("ours",))
    assert roofline.flops(sft) == 3 * forward
    generate = cases.Case("g", "", shape, cases.Work("generate", 1, 2, 1), ("ours",))
    assert roofline.flops(generate) == forward
    twice = cases.Case("g", "", shape, cases.Work("generate", 2, 2, 1), ("ours",))
    assert roofline.flops(twice) == 2 * forward


def test_a_shared_prompt_is_counted_once():
    shape = cases.SMALL
    one, nine = (
        roofline.flops(cases.Case("r", "", shape, cases.Work("reward", 1, 128, 64, ways=k), ()))
        for k in (1, 9)
    )
    prompt = roofline.flops(cases.Case("r", "", shape, cases.Work("reward", 1, 128, 0), ()))
    assert math.isclose(nine - prompt, 9 * (one - prompt))


def test_other_ways_cost_what_they_repeat():
    """Without a prompt nothing is shared; pairs take each response K - 1 times; equal lengths wait for nobody."""
    alone = cases.Case("r", "", cases.SMALL, cases.Work("reward", 1, 0, 64, ways=9), ())
    assert roofline.other_ways(alone) == pytest.approx({"K sequences": 1.0, "pairs": 8.0})
    assert roofline.other_ways(case("generate/small")) == {}
    mixed = case("generate, mixed lengths/small")
    by_hand = cases.lengths(mixed).reshape(-1, mixed.work.slots).max(axis=1, keepdims=True)
    waited = by_hand.repeat(mixed.work.slots) / cases.lengths(mixed).mean()
    (found,) = roofline.other_ways(mixed).values()
    assert 1.0 < found < waited.mean()  # both sides read the prompts, once


def test_decoding_is_bound_by_what_is_slower():
    c = case("generate/small")
    assert roofline.seconds(c, 1.0, 1e30) == roofline.flops(c)
    assert roofline.seconds(c, 1e30, 1.0) == roofline.decoded_bytes(c)
    weights = roofline.decoded_bytes(c) - c.work.response * c.work.rows * 2 * 4 * 256 * 4 * 128
    assert weights == 128 * 4 * (4 * 12 * 256**2 + 8192 * 256)


def test_mixed_lengths_decode_with_full_slots():
    c = case("generate, mixed lengths/small")
    length_B = cases.lengths(c)
    assert length_B.shape == (128,) and length_B.min() >= 1 and length_B.max() == 128
    assert 24 < length_B.mean() < 40
    assert table.per_unit(c, 2.0) == (length_B.sum() / 2, "tokens/s")
    weights, cache = 4 * (4 * 12 * 256**2 + 8192 * 256), 2 * 4 * 256 * 4
    seen = sum(sum(range(64, 64 + n)) + n / 2 for n in length_B.tolist())
    assert roofline.decoded_bytes(c) == length_B.sum() / 16 * weights + seen * cache


# Columns.


def test_our_column_has_the_launchers_flags_and_theirs_do_not():
    made = columns.make(Path("python"), "gpu", ROOT)
    assert made["ours"].environment["XLA_FLAGS"].count("--xla") > 1
    assert "XLA_FLAGS" not in made["shipped"].environment
    flags = columns.flags("cpu")
    assert flags["JAX_PLATFORMS"] == "cpu"
    assert flags["GLIBC_TUNABLES"].startswith(columns.KEPT_PAGES)


def test_the_peers_modules_stay_out_of_the_projects_environment():
    """Only peer_*.py import the peers; everything else runs without them."""
    for path in (ROOT / "bench").glob("*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
            )
        }
        peers = imported & {"torch", "transformers", "trl"}
        assert bool(peers) == path.name.startswith("peer_"), path.name


# In miniature.


@pytest.mark.parametrize("key", ["sft/small", "reward, shared prompt/small"])
def test_our_side_trains(key):
    measure, versions = worker.prepare(cases.miniature(case(key)), "ours", "cpu")
    assert len(measure(2)) == 2 and "jax" in versions


@pytest.mark.slow
@pytest.mark.parametrize("chosen", OURS, ids=lambda c: c.key)
def test_our_side_of_every_case_in_miniature(chosen):
    """The GPU's cases too: their code, with their dtype, in small."""
    from bench import ours

    small = cases.miniature(chosen)
    once = ours.build(small)
    first, second = once(), once()
    if small.work.kind in ("sft", "reward"):
        assert float(second["loss/loss"]) < float(first["loss/loss"])
    elif small.work.kind == "generate":
        length_B, stop_B = np.asarray(first.mask_BxT).sum(axis=1), np.asarray(first.stop_B)
        np.testing.assert_array_equal(length_B, cases.lengths(small))
        assert small.work.mean is not None or (stop_B == 0).all()
    else:
        assert float(first["response_length/mean"]) == small.work.response
        assert float(first["val/first_ratio_deviation"]) < (1e-2 if "M" in chosen.size else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_whole_run_in_miniature(device, tmp_path, capsys):
    """Our columns alone, so that the peers need not be installed."""
    run.main(
        ["--device", device, "--miniature", "--columns", "ours", "--only", "sft"]
        + ["--rounds", "2", "--units", "1", "--output", str(tmp_path)]
        + (["--where"] if device == "cpu" else [])
    )
    report = json.loads((tmp_path / f"{device}.json").read_text("utf-8"))
    keys = {c.key for c in EVERY if "sft" in c.key} & set(report["cases"])
    assert len(keys) == 2
    assert all(len(r["ours"]) == 2 for r in report["cases"].values())
    assert report["versions"]["jax"] and not report["rates"]
    said = capsys.readouterr().out
    assert said == (tmp_path / f"{device}.md").read_text("utf-8") + "\n"
    assert "over peer as shipped | not measured |" in said
    for of_case in report["where"].values():
        went, _ = of_case["ours"]
        kinds = {kind: t for kind, t in went.items() if kind not in ("all", "between programs")}
        assert 0 < went["matrix products"] < sum(kinds.values())
        assert sum(kinds.values()) < 2 * went["all"]
        assert 0 <= went["between programs"] < went["all"]
    assert set(report["where"]) == (keys if device == "cpu" else set())


def test_a_peer_that_cannot_run_is_said_to_and_our_side_must(tmp_path, capsys, monkeypatch):
    """Peers here are a Python that ends at once."""
    none = tmp_path / "python"
    none.write_text("#!/bin/sh\necho no torch here >&2\nexit 1\n")
    none.chmod(0o755)
    arguments = [
        "--miniature",
        "--only",
        "ppo/small",
        "--output",
        str(tmp_path),
        "--peers",
        str(none),
    ]
    run.main([*arguments, "--columns", "shipped", "tuned"])
    out = capsys.readouterr()
    assert "no torch here" in out.err and "over peer tuned | not measured |" in out.out
    monkeypatch.setattr(sys, "executable", str(none))
    with pytest.raises(run.EndedEarly, match="no torch here"):
        run.main([*arguments, "--columns", "ours"])
