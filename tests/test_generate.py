"""The sampler: what a response depends on, when it ends, and what the record says."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from instructax.batches import PromptBatch, padded_layout
from instructax.models import functional as model
from instructax.rl.generate import CUT_BY_LENGTH, ENDED_BY_EOS, ENDED_BY_STOP, generate
from instructax.steps.rollout import episode_layout, sample_responses

LENGTH, WIDTH = 7, 6
LENGTHS = (6, 3, 1, 4)


@functools.cache
def sampler(temperature: float = 1.0, eos_id: int = tiny.EOS, stop_ids: tuple[int, ...] = ()):
    return jax.jit(
        functools.partial(
            sample_responses,
            model_config=tiny.MODEL,
            response_length=LENGTH,
            temperature=temperature,
            eos_id=eos_id,
            pad_id=tiny.PAD,
            stop_ids=stop_ids,
        )
    )


@pytest.fixture(scope="module")
def params():
    return tiny.params()


KEY = jax.random.key(3)


@pytest.mark.laws
def test_greedy_by_cache_is_the_argmax_of_the_uncached_model(params):
    """The likeliest token has the largest log-probability among all that could stand there."""
    prompts = tiny.prompts(LENGTHS, WIDTH)
    responses = sampler(0.0, eos_id=-1)(params, KEY, prompts)
    layout, _ = episode_layout(prompts, responses)
    token = np.asarray(layout.token_BxL)
    real = np.asarray(layout.segment_BxL) > 0
    logprobs = jax.jit(
        lambda params, token, real: model.token_logprobs(
            params, tiny.MODEL, padded_layout(token, real)
        )
    )
    for t in range(LENGTH):
        tried = np.repeat(token, tiny.VOCAB, axis=0)
        tried[:, WIDTH + t] = np.tile(np.arange(tiny.VOCAB), len(LENGTHS))
        logp = logprobs(params, tried, np.repeat(real, tiny.VOCAB, axis=0))[:, WIDTH + t]
        best = np.asarray(logp).reshape(len(LENGTHS), tiny.VOCAB).argmax(1)
        np.testing.assert_array_equal(responses.token_BxT[:, t], best)
    np.testing.assert_array_equal(responses.stop_B, CUT_BY_LENGTH)


def test_a_response_depends_on_its_episode_alone(params):
    """Not on the slot, the other rows or the bucket that its prompt was padded to (trap T19)."""
    prompts = tiny.prompts(LENGTHS, WIDTH)
    whole = sampler()(params, KEY, prompts)
    assert len({tuple(row) for row in np.asarray(whole.token_BxT)}) == len(LENGTHS)
    for rows in ([2, 0, 3, 1], [3, 1], [2]):
        part = sampler()(params, KEY, tiny.rows_of(prompts, rows))
        np.testing.assert_array_equal(part.token_BxT, whole.token_BxT[np.asarray(rows)])
        np.testing.assert_array_equal(part.stop_B, whole.stop_B[np.asarray(rows)])
    wider = sampler()(params, KEY, tiny.prompts(LENGTHS, WIDTH + 3))
    np.testing.assert_array_equal(wider.token_BxT, whole.token_BxT)
    np.testing.assert_allclose(wider.logp_BxT, whole.logp_BxT, atol=1e-5)
    other = PromptBatch(prompts.token_BxP, prompts.mask_BxP, prompts.episode_B + 100)
    assert np.any(sampler()(params, KEY, other).token_BxT != whole.token_BxT)


@pytest.mark.laws
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_the_samplers_logp_is_the_training_programs(params, temperature):
    prompts = tiny.prompts(LENGTHS, WIDTH)
    responses = sampler(temperature)(params, KEY, prompts)
    layout, mask = episode_layout(prompts, responses)
    rescored = jax.jit(
        functools.partial(model.token_logprobs, model_config=tiny.MODEL, temperature=temperature)
    )(params, layout=layout)[:, WIDTH:]
    mask = np.asarray(mask)[:, WIDTH:]
    np.testing.assert_allclose(responses.logp_BxT, np.where(mask, rescored, 0.0), atol=1e-5)
    assert np.all(np.asarray(responses.logp_BxT)[mask] < 0)


# A model of which every next token is known: episode e, decode call after decode call.
SCRIPT = np.asarray(
    [
        [5, 6, 7, 8],  # cut by length
        [5, 2, 7, 8],  # EOS at 1
        [9, 6, 7, 8],  # stop token at 0
        [5, 6, 7, 2],  # EOS as the very last
    ]
)


def scripted(script, **options):
    """(responses, number of decode calls) of a sampler whose logits put everything on the script."""
    rows = script.shape[0]
    prompts = PromptBatch(
        np.ones((rows, 1), np.int32), np.ones((rows, 1), bool), np.arange(rows, dtype=np.int32)
    )
    calls = []

    def logits(t):
        return 1e4 * jax.nn.one_hot(jnp.asarray(script)[:, t], 10)

    def prefill(token, mask):
        return logits(0), jnp.zeros((), jnp.int32)

    def decode(token, carry):
        jax.debug.callback(lambda c: calls.append(int(c)), carry)
        return logits(carry + 1), carry + 1

    responses = generate(
        KEY, prompts, prefill, decode, response_length=script.shape[1], temperature=1.0,
        eos_id=2, pad_id=0, vocab_size=10, **options,
    )  # fmt: skip
    jax.effects_barrier()
    return responses, len(calls)


def test_a_response_ends_by_length_eos_or_stop_token_and_the_record_says_which():
    responses, calls = scripted(SCRIPT, stop_ids=(9,))
    np.testing.assert_array_equal(
        responses.stop_B, [CUT_BY_LENGTH, ENDED_BY_EOS, ENDED_BY_STOP, ENDED_BY_EOS]
    )
    np.testing.assert_array_equal(
        responses.token_BxT, [[5, 6, 7, 8], [5, 2, 0, 0], [9, 0, 0, 0], [5, 6, 7, 2]]
    )
    np.testing.assert_array_equal(responses.mask_BxT.sum(1), [4, 2, 1, 4])
    assert np.all(np.asarray(responses.logp_BxT)[~np.asarray(responses.mask_BxT)] == 0.0)
    assert calls == 3


def test_without_the_stop_token_the_response_goes_on():
    responses, _ = scripted(SCRIPT)
    assert int(responses.stop_B[2]) == CUT_BY_LENGTH and int(responses.token_BxT[2, 1]) == 6


@pytest.mark.parametrize("rows, calls", [([1], 1), ([2], 0), ([1, 2], 1), ([0, 1], 3)])
def test_decoding_ends_with_the_last_unfinished_row(rows, calls):
    assert scripted(SCRIPT[rows], stop_ids=(9,))[1] == calls


def test_a_pad_that_is_eos_is_kept_apart_by_the_mask():
    """The lengths come from the mask, never from ids (trap T3)."""
    prompts = PromptBatch(np.ones((1, 1), np.int32), np.ones((1, 1), bool), np.zeros(1, np.int32))
    eos = 1e4 * jax.nn.one_hot(jnp.asarray([2]), 10)
    responses = generate(
        KEY, prompts, lambda token, mask: (eos, 0), lambda token, carry: (eos, carry),
        response_length=3, temperature=1.0, eos_id=2, pad_id=2, vocab_size=10,
    )  # fmt: skip
    np.testing.assert_array_equal(responses.token_BxT, [[2, 2, 2]])
    np.testing.assert_array_equal(responses.mask_BxT, [[True, False, False]])


@pytest.mark.parametrize(
    "error, message, change",
    [
        (TypeError, "key must be a typed random key", {"key": jax.random.PRNGKey(0)}),
        (ValueError, "key must have rank 1", {"key": jax.random.split(KEY, (1, 2))}),
        (TypeError, "episode_B must be integer, got float32", {"episode": np.zeros(1, np.float32)}),
        (ValueError, "episode_B must have rank 1", {"episode": np.zeros((1, 1), np.int32)}),
        (TypeError, "logits_BxV must be floating, got int32", {"logits": np.zeros((1, 9), int)}),
        (ValueError, "logits_BxV must have rank 2", {"logits": np.zeros(9, np.float32)}),
        (ValueError, "key_B has 1 rows, but logits_BxV has 2", {"logits": np.zeros((2, 9), "f4")}),
        (ValueError, "valid_vocab must be in", {"logits": np.zeros((1, 7), np.float32)}),
        (TypeError, "temperature must be a real number, got str", {"temperature": "1"}),
        (ValueError, "response_length must be at least 1, got 0", {"length": 0}),
    ],
)
def test_what_it_is_given_is_refused_by_name(error, message, change):
    good = {"key": KEY, "episode": np.zeros(1, np.int32), "temperature": 1.0, "length": 2,
            "logits": np.zeros((1, 9), np.float32)}  # fmt: skip
    given = {**good, **change}
    prompts = PromptBatch(np.ones((1, 1), np.int32), np.ones((1, 1), bool), given["episode"])
    with pytest.raises(error, match=f"^{message}"):
        generate(
            given["key"], prompts,
            lambda token, mask: (jnp.asarray(given["logits"]), 0),
            lambda token, carry: (jnp.asarray(given["logits"]), carry),
            response_length=given["length"], temperature=given["temperature"],
            eos_id=2, pad_id=0, vocab_size=9,
        )  # fmt: skip
