"""What is timed: shapes, sizes of work and the token ids, drawn once for every side. NumPy alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A model of GPT-2's shape; ``remat`` is our side's."""

    num_layers: int
    d_model: int
    num_heads: int
    vocab_size: int = 8192
    context_length: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "wide", "block"] = "none"


@dataclass(frozen=True)
class Work:
    """One timed unit. Which lengths a kind reads is said at the functions below.

    kind: sft, one step on ``rows`` texts of ``prompt`` + ``response`` tokens; reward, one step on
    ``rows`` prompts with ``ways`` ranked responses each; generate, one response to each of ``rows``
    prompts, none ends early; ppo, one iteration of ``rows`` episodes and ``epochs`` updates on them.
    With a ``mean``, responses end where :func:`lengths` says and not at ``response``, and ``slots`` of
    them are under way at a time.
    """

    kind: Literal["sft", "reward", "generate", "ppo"]
    rows: int
    prompt: int
    response: int
    ways: int = 1
    epochs: int = 1
    mean: int | None = None
    slots: int | None = None


@dataclass(frozen=True)
class Case:
    """A row of the table: work on a shape, done in one ``form``, by the columns that have that form.

    ``form`` tells apart the three ways to train on a ranking: its pairs one by one, K sequences,
    or K responses behind one copy of their prompt. ``recompute``: the peers recompute activations in
    the backward pass, without which the work would not fit a GPU.
    """

    name: str
    size: str
    shape: Shape
    work: Work
    columns: tuple[str, ...]
    form: Literal["", "pairs", "sequences", "shared"] = ""
    recompute: bool = False

    @property
    def key(self) -> str:
        return f"{self.name}/{self.size}"


PEERS = ("shipped", "tuned")
SMALL, MEDIUM = Shape(4, 256, 4), Shape(8, 512, 8)
GPT_125M = Shape(12, 768, 12, 50257, 2048, "bfloat16", "block")
GPT_1_3B = Shape(24, 2048, 16, 50257, 2048, "bfloat16", "block")


def _reward(
    size: str, shape: Shape, work: Work, peers: tuple[str, ...], recompute: bool = False
) -> tuple[Case, ...]:
    return (
        Case("reward, pairs", size, shape, work, peers, "pairs", recompute),
        Case("reward, K sequences", size, shape, work, (*peers, "ours"), "sequences", recompute),
        Case("reward, shared prompt", size, shape, work, ("ours",), "shared"),
    )


def cpu_cases() -> tuple[Case, ...]:
    found: tuple[Case, ...] = ()
    for size, shape in (("small", SMALL), ("medium", MEDIUM)):
        found += (
            Case(
                "sft",
                size,
                shape,
                Work("sft", 8, 128, 128),
                ("shipped", "tuned", "compiled", "ours"),
            ),
            *_reward(size, shape, Work("reward", 2, 128, 64, ways=9), PEERS),
            Case("generate", size, shape, Work("generate", 16, 64, 128), (*PEERS, "ours")),
            Case(
                "generate, mixed lengths",
                size,
                shape,
                Work("generate", 128, 64, 128, mean=32, slots=16),
                (*PEERS, "ours"),
            ),
            Case("ppo", size, shape, Work("ppo", 16, 64, 64, epochs=4), (*PEERS, "ours")),
        )
    return found


def gpu_cases() -> tuple[Case, ...]:
    """One GPU, bfloat16 compute with float32 parameters in training; allocators are CUDA's, so no tuning."""
    both, compiled = ("shipped", "ours"), ("shipped", "compiled", "ours")
    sft = Work("sft", 16, 1024, 1024)
    return (
        Case("sft", "125M", GPT_125M, sft, compiled),
        Case("sft", "1.3B", GPT_1_3B, replace(sft, rows=8), compiled),
        *_reward("1.3B", GPT_1_3B, Work("reward", 4, 512, 256, ways=9), ("shipped",), True),
        Case("generate, batch 64", "1.3B", GPT_1_3B, Work("generate", 64, 512, 256), both),
        Case("generate, batch 256", "1.3B", GPT_1_3B, Work("generate", 256, 512, 256), both),
        Case("ppo", "125M", GPT_125M, Work("ppo", 64, 512, 256, epochs=4), both),
    )


def miniature(case: Case) -> Case:
    """The same case so small that a CPU runs it in a second: for the tests, and to try the bench."""
    s, w = case.shape, case.work
    shape = Shape(2, 32, 2, 97, 64, s.dtype, s.remat)
    work = replace(w, rows=min(w.rows, 4), prompt=8, response=8, ways=min(w.ways, 3))
    if w.mean is not None:
        work = replace(work, mean=4, slots=2)
    return replace(case, shape=shape, work=work)


# Ids below this are left to special tokens: none is drawn, so that no side meets padding or an end.
FIRST_ID = 4


def _draw(case: Case, stream: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng((20260101, stream))
    return rng.integers(FIRST_ID, case.shape.vocab_size, shape).astype(np.int32)


def texts(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(token_BxL, response_BxL): prompts with responses, and which tokens the loss is over."""
    w = case.work
    token_BxL = _draw(case, 0, (w.rows, w.prompt + w.response))
    response_L = np.arange(w.prompt + w.response) >= w.prompt
    return token_BxL, np.broadcast_to(response_L, token_BxL.shape)


def rankings(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prompt_NxP, response_NxKxT, rank_NxK): every prompt's responses, ranked without a tie."""
    w = case.work
    rank_NxK = np.stack([np.random.default_rng(n).permutation(w.ways) for n in range(w.rows)])
    return (
        _draw(case, 1, (w.rows, w.prompt)),
        _draw(case, 2, (w.rows, w.ways, w.response)),
        rank_NxK.astype(np.int32),
    )


def sequences(case: Case) -> np.ndarray:
    """token_NxKxL of a ranking's responses, each behind a copy of its prompt."""
    prompt_NxP, response_NxKxT, _ = rankings(case)
    prompt_NxKxP = np.repeat(prompt_NxP[:, None], response_NxKxT.shape[1], axis=1)
    return np.concatenate([prompt_NxKxP, response_NxKxT], axis=2)


def pairs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(chosen_MxL, rejected_MxL): the K(K-1)/2 pairs of every ranking, each with two copies of the prompt."""
    token_NxKxL, (*_, rank_NxK) = sequences(case), rankings(case)
    chosen, rejected = [], []
    for n, rank_K in enumerate(rank_NxK):
        for better, worse in itertools.combinations(np.argsort(rank_K), 2):
            chosen.append(token_NxKxL[n, better])
            rejected.append(token_NxKxL[n, worse])
    return np.stack(chosen), np.stack(rejected)


def prompts(case: Case) -> np.ndarray:
    """token_BxP, all of one length."""
    return _draw(case, 3, (case.work.rows, case.work.prompt))


def lengths(case: Case) -> np.ndarray:
    """Tokens of each of the responses that are generated: all ``response``, or geometric with a mean and so many at most."""
    w = case.work
    if w.mean is None:
        return np.full(w.rows, w.response)
    return geometric(np.random.default_rng((20260101, 4)), w.rows, w.mean, w.response)


def geometric(rng: np.random.Generator, rows: int, mean: int, longest: int) -> np.ndarray:
    """Lengths of a mean, before those above ``longest`` are cut to it."""
    return np.minimum(rng.geometric(1 / mean, rows), longest)


def find(key: str, cases: tuple[Case, ...]) -> Case:
    for case in cases:
        if case.key == key:
            return case
    raise ValueError(f"no case {key!r}, there are {[case.key for case in cases]}")
