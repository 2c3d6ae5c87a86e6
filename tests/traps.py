"""What the trap tests share: how a check proves itself, and four episodes on the bigram model.

A trap test holds a ``check`` of an implementation. The check passes for the package's own and must
fail for every deliberately wrong one: a check that no wrong variant fails would prove nothing. The
wrong ones are what published code was found to do. Where a trap is about wiring, the implementation
under check is put into the real step, which then runs on a small model.
"""

from __future__ import annotations

import contextlib
import functools

import bigram
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instructax.batches import PromptBatch, Responses
from instructax.config import ModelConfig, PpoConfig
from instructax.rl import generate
from instructax.steps import rollout


def rejects(check, right, *wrong):
    """``check`` passes for ``right`` and fails, by its own assertions, for each of ``wrong``."""
    check(right)
    assert len(wrong) >= 2
    for variant in wrong:
        with contextlib.suppress(AssertionError):
            check(variant)
            pytest.fail(f"the check lets {variant.__name__} pass")


# --- four episodes on the bigram model: what most of the checks below look at

# The pad is the end token, so that ids say nothing about lengths; one prompt holds an end token.
EOS = PAD = 2
STOP = 3
CUT, BY_EOS, BY_STOP = generate.CUT_BY_LENGTH, generate.ENDED_BY_EOS, generate.ENDED_BY_STOP
PROMPT_BxP = np.array([[4, 5, 6, 7], [PAD, PAD, PAD, 8], [PAD, 9, EOS, 4], [PAD, PAD, 5, 10]])
PROMPT_MASK_BxP = np.array([[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]], bool)
RESPONSE_BxT = np.array(
    [[5, 6, EOS, PAD, PAD], [7, 8, 9, 4, 5], [EOS, PAD, PAD, PAD, PAD], [6, STOP, PAD, PAD, PAD]]
)
RESPONSE_MASK_BxT = np.array(
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], bool
)
STOP_B = np.array([BY_EOS, CUT, BY_EOS, BY_STOP], np.int32)
TOKEN_BxL = np.concatenate([PROMPT_BxP, RESPONSE_BxT], axis=1).astype(np.int32)
MASK_BxL = np.concatenate([np.zeros_like(PROMPT_MASK_BxP), RESPONSE_MASK_BxT], axis=1)
LAST_B = np.array([6, 8, 4, 5])
PLAIN = PpoConfig(
    kl_coef=0.0, ptx_coef=0.0, gae_lambda=1.0, whiten_advantages=False, missing_eos="none"
)
POLICY, REFERENCE, VALUE, REWARD = (functools.partial(bigram.params, seed) for seed in range(4))
ANY_MODEL = ModelConfig()


def prompts_and_responses(order=slice(None)):
    prompts = PromptBatch(
        PROMPT_BxP[order].astype(np.int32),
        PROMPT_MASK_BxP[order],
        np.arange(4, dtype=np.int32)[order],
    )
    responses = Responses(
        RESPONSE_BxT[order].astype(np.int32),
        RESPONSE_MASK_BxT[order],
        np.zeros(RESPONSE_BxT.shape, np.float32)[order],
        STOP_B[order],
    )
    return prompts, responses


@contextlib.contextmanager
def on_bigram(**replaced):
    """The steps read the bigram model; ``replaced`` names of the scoring step are something else."""
    with pytest.MonkeyPatch.context() as patch:
        bigram.install(patch)
        for name, value in replaced.items():
            patch.setattr(rollout, name, value)
        yield patch


def scored(config: PpoConfig = PLAIN, kl_coef: float = 0.0, **replaced):
    """(rollout, metrics, per episode) of the four episodes, as NumPy arrays."""
    with on_bigram(**replaced):
        # Operation by operation: a program for each of the many variants would take longer.
        out = rollout.score_rollout(
            POLICY(), REFERENCE(), VALUE(), REWARD(), *prompts_and_responses(),
            jnp.float32(kl_coef), jax.random.key(0), config=config, model_config=ANY_MODEL,
            reward_config=ANY_MODEL, eos_id=EOS,
        )  # fmt: skip
    return jax.tree.map(np.asarray, out)


def rewards_of(returns_BxL: np.ndarray) -> np.ndarray:
    """At lambda = discount = 1 returns are sums of rewards to come: r_t = R_t - R_{t+1}."""
    to_come = np.pad(returns_BxL[:, 1:], ((0, 0), (0, 1)))
    return np.where(MASK_BxL, returns_BxL - to_come, 0.0)


def reward_model_scores() -> np.ndarray:
    """What the reward model says of the four: its value of the last token, EOS for another stop."""
    last = TOKEN_BxL[np.arange(4), LAST_B]
    return REWARD()["value"][np.where(STOP_B == BY_STOP, EOS, last)]
