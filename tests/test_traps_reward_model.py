"""Traps T1 to T5: ranking loss, shift, read-out, head and inputs. See docs/traps.md."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny
from traps import (
    ANY_MODEL,
    EOS,
    PAD,
    REWARD,
    TOKEN_BxL,
    on_bigram,
    prompts_and_responses,
    rejects,
    reward_model_scores,
)

from instructax import masking
from instructax.batches import Layout, Responses, padded_layout
from instructax.data.comparisons import ComparisonExamples, stream
from instructax.losses.ranking import pairwise_logistic_loss
from instructax.models import functional as model
from instructax.steps import rollout

pytestmark = pytest.mark.traps


# --- T1


def test_t01_ranking_loss_averages_pairs_within_a_prompt_and_drops_ties():
    rng = np.random.default_rng(0)
    score = rng.normal(size=(5, 4)).astype(np.float32)
    rank = np.array([[1, 2, 3, 4], [2, 1, 2, 3], [5, 5, 9, 0], [1, 1, 1, 0], [3, 1, 0, 0]])
    valid = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]], bool)

    def check(loss):
        expected = oracles.pairwise_logistic_loss(score, rank, valid)
        np.testing.assert_allclose(loss(score, rank, valid), expected, rtol=1e-5)

    def right(score, rank, valid):
        return pairwise_logistic_loss(score, rank, valid)[0]

    def terms(score, preferred):
        margin = score[:, :, None] - score[:, None, :]
        return np.where(preferred, np.log1p(np.exp(-margin)), 0.0)

    def preferences(rank, valid):
        both = valid[:, :, None] & valid[:, None, :]
        return (rank[:, :, None] < rank[:, None, :]) & both

    def all_pairs_of_the_batch_alike(score, rank, valid):
        preferred = preferences(rank, valid)
        return terms(score, preferred).sum() / preferred.sum()

    def ties_are_pairs(score, rank, valid):
        order = np.arange(4)[None, :, None] < np.arange(4)[None, None, :]
        tie = (rank[:, :, None] == rank[:, None, :]) & order
        preferred = preferences(rank, valid) | (tie & valid[:, :, None] & valid[:, None, :])
        n = np.maximum(preferred.sum((1, 2)), 1)
        return (terms(score, preferred).sum((1, 2)) / n)[preferred.any((1, 2))].mean()

    def divided_by_all_pairs_though_ties_are_dropped(score, rank, valid):
        k = valid.sum(1)
        preferred = preferences(rank, valid)
        per_prompt = terms(score, preferred).sum((1, 2)) / (k * (k - 1) / 2)
        return per_prompt[preferred.any((1, 2))].mean()

    def prompts_without_a_pair_count(score, rank, valid):
        preferred = preferences(rank, valid)
        n = np.maximum(preferred.sum((1, 2)), 1)
        return (terms(score, preferred).sum((1, 2)) / n).mean()

    def padding_is_ranked(score, rank, valid):
        return right(score, rank, np.ones_like(valid))

    def higher_ranks_win(score, rank, valid):
        return right(score, -rank, valid)

    rejects(
        check,
        right,
        all_pairs_of_the_batch_alike,
        ties_are_pairs,
        divided_by_all_pairs_though_ties_are_dropped,
        prompts_without_a_pair_count,
        padding_is_ranked,
        higher_ranks_win,
    )


def test_t01_all_pairs_of_a_prompt_are_one_batch_element_read_once():
    rng = np.random.default_rng(1)
    lengths = [(3, (2, 4, 1)), (2, (3, 3)), (4, (1, 2, 3, 2)), (1, (2, 2))]
    examples = ComparisonExamples(
        prompts=[rng.integers(3, 10**6, n, dtype=np.int32) for n, _ in lengths],
        responses=[[rng.integers(3, 10**6, m, dtype=np.int32) for m in ms] for _, ms in lengths],
        ranks=[np.arange(len(ms), dtype=np.int32) for _, ms in lengths],
        record_index_n=np.arange(len(lengths)),
        dropped={},
        pad_id=0,
    )

    def check(prepared):
        batches = stream(prepared(examples), batch_size=2, row_length=16, max_responses=4, seed=0)
        read, pairs, batches_of = [], 0, {}
        for step in range(batches.steps_per_epoch()):
            batch = batches(step)
            read += np.asarray(batch.layout.token_BxL)[batch.layout.segment_BxL > 0].tolist()
            pairs += int(pairwise_logistic_loss(np.zeros((2, 4), np.float32), batch.rank_NxK,
                                                batch.valid_NxK)[1]["pairs"])  # fmt: skip
            for n, prompt in enumerate(examples.prompts):
                if prompt[0] in batch.layout.token_BxL:
                    batches_of.setdefault(n, set()).add(step)
        tokens = [t for p, rs in zip(examples.prompts, examples.responses, strict=True)
                  for part in (p, *rs) for t in part.tolist()]  # fmt: skip
        assert sorted(read) == sorted(tokens), "every prompt and response is read exactly once"
        assert pairs == 3 + 1 + 6 + 1
        assert all(len(steps) == 1 for steps in batches_of.values())

    def as_they_are(examples):
        return examples

    def split(examples, pairs_of):
        index = [(n, pair) for n, ranks in enumerate(examples.ranks) for pair in pairs_of(ranks)]
        return dataclasses.replace(
            examples,
            prompts=[examples.prompts[n] for n, _ in index],
            responses=[[examples.responses[n][k] for k in pair] for n, pair in index],
            ranks=[np.arange(2, dtype=np.int32) for _ in index],
            record_index_n=np.arange(len(index)),
        )

    def every_pair_a_record(examples):
        return split(examples, lambda ranks: itertools.combinations(range(len(ranks)), 2))

    def the_best_against_each_other_one(examples):
        return split(examples, lambda ranks: [(0, k) for k in range(1, len(ranks))])

    def best_and_worst_alone(examples):
        return split(examples, lambda ranks: [(0, len(ranks) - 1)])

    rejects(
        check,
        as_they_are,
        every_pair_a_record,
        the_best_against_each_other_one,
        best_and_worst_alone,
    )


# --- T2, T3, T4


@functools.cache
def tiny_scalars():
    return jax.jit(
        lambda params, token_BxL, mask_BxL: model.scalars(
            params, tiny.MODEL, padded_layout(token_BxL, mask_BxL)
        )
    )


def test_t02_demonstrations_average_zero_by_a_shift_kept_in_the_parameters():
    params = tiny.params(5, "scalar")
    token, length = tiny.tokens(6, 10, seed=2), np.array([10, 3, 7, 5, 9, 4])
    mask = np.arange(10)[None] < length[:, None]

    def demonstration_scores(params):
        return np.asarray(tiny_scalars()(params, token, mask))[np.arange(6), length - 1]

    before = demonstration_scores(params)
    assert abs(before.mean()) > 0.05

    def check(centred):
        after = demonstration_scores(centred(params))
        np.testing.assert_allclose(after.mean(), 0.0, atol=1e-5)
        np.testing.assert_allclose(after - after.mean(), before - before.mean(), atol=1e-5)

    def right(params):
        return model.shift_scalars(params, -float(before.mean()))

    def sign_turned(params):
        return model.shift_scalars(params, float(before.mean()))

    def kept_beside_the_parameters(params):
        return params

    def over_all_tokens(params):
        every = np.asarray(tiny_scalars()(params, token, mask))[mask]
        return model.shift_scalars(params, -float(every.mean()))

    def divided_by_the_deviation_too(params):
        head = jax.tree.map(lambda x: x / before.std(), params["value_head"])
        scaled = params | {"value_head": head}
        return model.shift_scalars(scaled, -float(before.mean() / before.std()))

    rejects(
        check,
        right,
        sign_turned,
        kept_beside_the_parameters,
        over_all_tokens,
        divided_by_the_deviation_too,
    )


def test_t03_score_is_read_at_the_last_real_token_where_pad_is_eos():
    expected = reward_model_scores()

    def check(last_token_index):
        with on_bigram() as patch:
            patch.setattr(masking, "last_token_index", last_token_index)
            score = rollout.response_scores(
                REWARD(), ANY_MODEL, *prompts_and_responses(), eos_id=EOS
            )
        np.testing.assert_allclose(score, expected, rtol=1e-6)

    def first_pad_minus_one(mask_BxL):
        response = TOKEN_BxL[:, 4:]
        first = np.where((response == PAD).any(1), (response == PAD).argmax(1), 5)
        return jnp.asarray(4 + first - 1)

    def last_slot_of_the_buffer(mask_BxL):
        return jnp.full(4, mask_BxL.shape[1] - 1)

    def number_of_tokens_minus_one(mask_BxL):
        return mask_BxL.sum(axis=1) - 1

    def last_id_that_is_not_pad(mask_BxL):
        return jnp.asarray(8 - (TOKEN_BxL[:, ::-1] != PAD).argmax(1))

    rejects(
        check,
        masking.last_token_index,
        first_pad_minus_one,
        last_slot_of_the_buffer,
        number_of_tokens_minus_one,
        last_id_that_is_not_pad,
    )


def test_t04_fresh_scalar_head_has_variance_one_over_d_plus_one_and_no_bias():
    width, heads = 3, 6000
    config = dataclasses.replace(tiny.MODEL, d_model=width, num_heads=1)

    def check(head):
        drawn = jax.vmap(head)(jax.random.split(jax.random.key(0), heads))
        assert np.all(np.asarray(drawn["bias"]) == 0.0)
        kernel = np.asarray(drawn["kernel"], np.float64)
        # 18,000 draws: the variance is known to 1.1%; 1/d would be 33% off.
        assert abs(kernel.var() * (width + 1) - 1) < 0.05
        assert abs(kernel.mean()) < 0.02

    def right(key):
        return model.replace_head(key, {"embed": jnp.zeros(())}, config)["value_head"]

    def drawn_with(std, bias=0.0):
        def head(key):
            return {
                "kernel": std * jax.random.normal(key, (width, 1)),
                "bias": bias * jax.random.normal(key, (1,)),
            }

        return head

    def variance_one_over_d(key):
        return drawn_with(width**-0.5)(key)

    def deviation_one_over_d_plus_one(key):
        return drawn_with(1 / (width + 1))(key)

    def deviation_of_an_embedding(key):
        return drawn_with(0.02)(key)

    def random_bias(key):
        return drawn_with((width + 1) ** -0.5, bias=1.0)(key)

    rejects(
        check,
        right,
        variance_one_over_d,
        deviation_one_over_d_plus_one,
        deviation_of_an_embedding,
        random_bias,
    )


# --- T5


@functools.cache
def tiny_logprobs_and_scalars():
    def both(lm, scalar, layout):
        logp = model.token_logprobs(lm, tiny.MODEL, layout)
        return logp, model.scalars(scalar, tiny.MODEL, layout)

    return jax.jit(both)


def test_t05_padding_on_either_side_changes_no_logprob_value_or_score():
    text = tiny.tokens(1, 6, seed=4)[0]
    text[3] = tiny.PAD  # ids do not say what is padding
    token, mask = np.full((3, 10), tiny.PAD, np.int32), np.zeros((3, 10), bool)
    for row, left in enumerate((0, 4, 2)):
        token[row, left : left + 6], mask[row, left : left + 6] = text, True

    def read(layout):
        layout = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), layout)
        lm, scalar = tiny.params(), tiny.params(1, "scalar")
        return [np.asarray(x) for x in tiny_logprobs_and_scalars()(lm, scalar, layout)]

    # Rows without any padding, of which causality makes the first six slots the text alone.
    full = np.tile(np.concatenate([text, text[:4]]), (3, 1))
    slots = np.tile(np.arange(10), (3, 1))
    alone = [x[0, :6] for x in read(Layout(full, slots, np.ones_like(full), np.zeros_like(full)))]

    def check(layout_of):
        for array, expected in zip(read(layout_of(token, mask)), alone, strict=True):
            for row in range(3):
                np.testing.assert_allclose(array[row][mask[row]], expected, atol=3e-6)
            assert np.all(array[~mask] == 0.0)

    def zeros():
        return np.zeros_like(token)

    def positions_count_slots(token, mask):
        return Layout(token, slots, mask.astype(int), zeros())

    def padding_is_seen(token, mask):
        plain = padded_layout(token, mask)
        return Layout(token, plain.position_BxL, np.ones_like(token), zeros())

    def every_pad_id_is_padding(token, mask):
        return padded_layout(token, token != tiny.PAD)

    def positions_count_pads_on_the_right_too(token, mask):
        before = (~mask).sum(1, keepdims=True)
        position = np.where(mask, np.arange(10)[None] - before, 0)
        return Layout(token, np.maximum(position, 0), mask.astype(int), zeros())

    rejects(
        check,
        padded_layout,
        positions_count_slots,
        padding_is_seen,
        every_pad_id_is_padding,
        positions_count_pads_on_the_right_too,
    )


def test_t05_reward_and_value_read_the_prompt_as_well():
    prompts = tiny.prompts((3, 4), 4)
    response = Responses(
        tiny.tokens(2, 3, seed=9), np.ones((2, 3), bool), np.zeros((2, 3)), np.zeros(2, np.int32)
    )
    first = np.asarray([1, 0])  # the first real slot of either prompt
    other = prompts.token_BxP.copy()
    other[np.arange(2), first] = 3 + (other[np.arange(2), first] - 2) % (tiny.VOCAB - 3)
    scalar = tiny.params(1, "scalar")

    def check(layout_of):
        def read(token_BxP):
            layout, _ = layout_of(dataclasses.replace(prompts, token_BxP=token_BxP), response)
            layout = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), layout)
            return np.asarray(tiny_logprobs_and_scalars()(tiny.params(), scalar, layout)[1])

        moved = np.abs(read(other) - read(prompts.token_BxP))
        assert np.all(moved[:, 3:] > 1e-5), "values before and after every response token"

    def response_alone(prompts, response):
        layout, mask = rollout.episode_layout(prompts, response)
        return dataclasses.replace(layout, segment_BxL=mask.astype(jnp.int32)), mask

    def response_in_a_segment_without_its_prompt(prompts, response):
        layout, mask = rollout.episode_layout(prompts, response)
        return dataclasses.replace(layout, segment_BxL=layout.segment_BxL + mask), mask

    def last_token_of_the_prompt_alone(prompts, response):
        layout, mask = rollout.episode_layout(prompts, response)
        keep = jnp.arange(7)[None] >= 3
        return dataclasses.replace(layout, segment_BxL=layout.segment_BxL * keep), mask

    rejects(
        check,
        rollout.episode_layout,
        response_alone,
        response_in_a_segment_without_its_prompt,
        last_token_of_the_prompt_alone,
    )
