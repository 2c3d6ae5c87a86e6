"""An iteration's first two programs: sample responses, then score them into a frozen Rollout."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from instructax import masking
from instructax.batches import (
    Layout,
    PromptBatch,
    Responses,
    Rollout,
    padded_layout,
    predecessor,
)
from instructax.config import ModelConfig, PpoConfig
from instructax.models import functional as model
from instructax.rl.gae import generalized_advantage
from instructax.rl.generate import CUT_BY_LENGTH, ENDED_BY_STOP, Drawing, generate
from instructax.rl.kl import per_token_kl
from instructax.rl.packing import on_rows, read_prompts
from instructax.rl.rewards import apply_missing_eos, shaped_reward
from instructax.steps.slots import sample_in_slots

Array = Any
Params = Any


def sample_responses(
    params: Params,
    key: Array,
    prompts: PromptBatch,
    source_UxRxL: Array | None = None,
    *,
    model_config: ModelConfig,
    response_length: int,
    temperature: float,
    eos_id: int,
    pad_id: int,
    stop_ids: tuple[int, ...] = (),
    top_k: int | None = None,
    top_p: float | None = None,
    slots: int | None = None,
    cache_dtype: str | None = None,
) -> Responses:
    """Responses from the policy, by cached decoding with the rollout copy; the same in every form.

    Args:
      key: one key for a response a prompt; n keys for n, prompt by prompt, of which each prompt is
        read once (:func:`instructax.rl.generate.samples`).
      source_UxRxL: the rows in which prompts are read (:func:`instructax.rl.packing.prompt_rows`,
        with groups of :func:`instructax.steps.slots.group_size` where there are slots); None pays
        for their padding.
      slots: rows that decode at a time, those of all batch shards together; None, or as many as there
        are responses, gives every response its own.
      cache_dtype: of keys and values; None is the compute dtype.
    """
    copy = model.rollout_copy(params, model_config)
    copies = key.shape[0] if key.shape else 1
    if slots is not None and slots < prompts.episode_B.shape[0] * copies:
        return sample_in_slots(
            copy,
            key,
            prompts,
            source_UxRxL,
            model_config=model_config,
            slots=slots,
            response_length=response_length,
            pad_id=pad_id,
            drawing=Drawing(temperature, eos_id, model_config.vocab_size, stop_ids, top_k, top_p),
            cache_dtype=cache_dtype,
        )
    length = prompts.token_BxP.shape[1] + response_length

    def prefill(token_MxP, mask_MxP):
        if source_UxRxL is not None:
            layout, home_BxP = read_prompts(token_MxP, mask_MxP, source_UxRxL, copies)
            return model.prefill_packed(
                copy, model_config, layout, home_BxP, length, cache_dtype, source_UxRxL.shape[0]
            )
        logits_MxV, cache = model.prefill(
            copy, model_config, token_MxP, mask_MxP, length, cache_dtype
        )
        if copies == 1:
            return logits_MxV, cache
        return jnp.repeat(logits_MxV, copies, axis=0), model.repeat_rows(cache, copies)

    def decode(token_B, cache):
        return model.decode(copy, model_config, token_B, cache)

    return generate(
        key,
        prompts,
        prefill,
        decode,
        response_length=response_length,
        temperature=temperature,
        eos_id=eos_id,
        pad_id=pad_id,
        vocab_size=model_config.vocab_size,
        stop_ids=stop_ids,
        top_k=top_k,
        top_p=top_p,
    )


def episode_layout(prompts: PromptBatch, responses: Responses) -> tuple[Layout, Array]:
    """(layout of prompt + response rows, mask_BxL of the response tokens)."""
    token_BxL = jnp.concatenate([prompts.token_BxP, responses.token_BxT], axis=1)
    real_BxL = jnp.concatenate([prompts.mask_BxP, responses.mask_BxT], axis=1)
    response_BxL = jnp.concatenate([jnp.zeros_like(prompts.mask_BxP), responses.mask_BxT], axis=1)
    return padded_layout(token_BxL, real_BxL), response_BxL


def response_scores(
    params: Params,
    model_config: ModelConfig,
    prompts: PromptBatch,
    responses: Responses,
    *,
    eos_id: int,
    source_RxL: Array | None = None,
) -> Array:
    """score_B of the reward model, read at the last real response token (trap T3).

    A finished response ends in EOS, in reward training and here alike: where another stop token
    ended it, the reward model reads EOS in that token's place.
    """
    layout, response_BxL = episode_layout(prompts, responses)
    last_B = masking.last_token_index(response_BxL)
    is_last_BxL = jnp.arange(response_BxL.shape[1])[None, :] == last_B[:, None]
    stopped_Bx1 = (responses.stop_B == ENDED_BY_STOP)[:, None]
    token_BxL = jnp.where(is_last_BxL & stopped_Bx1, eos_id, layout.token_BxL)
    layout = dataclasses.replace(layout, token_BxL=token_BxL)
    value_BxL = on_rows(lambda rows: model.scalars(params, model_config, rows), layout, source_RxL)
    return jnp.take_along_axis(value_BxL, last_B[:, None], axis=1)[:, 0]


def values_before(params: Params, model_config: ModelConfig, layout: Layout) -> Array:
    """value_BxL before each token: the scalar read at its predecessor."""
    index_BxL, exists_BxL = predecessor(layout)
    value_BxL = model.scalars(params, model_config, layout)
    return jnp.where(exists_BxL, jnp.take_along_axis(value_BxL, index_BxL, axis=1), 0.0)


def score_rollout(
    policy: Params,
    reference: Params,
    value: Params,
    reward: Params,
    prompts: PromptBatch,
    responses: Responses,
    kl_coef: Array,
    key: Array,
    source_RxL: Array | None = None,
    scored_RxM: Array | None = None,
    *,
    config: PpoConfig,
    model_config: ModelConfig,
    reward_config: ModelConfig,
    eos_id: int,
    reward_gain: Array | float = 1.0,
    reward_bias: Array | float = 0.0,
) -> tuple[Rollout, dict[str, Array], dict[str, Array]]:
    """Everything that PPO freezes about an iteration's episodes (InstructGPT section 3.5; traps T8-T14).

    Per episode: score = gain * RM + bias, missing-EOS rule, reward_t = -beta * kl_t plus the score
    at the last real token, values before each token, GAE, returns, whitened advantages.

    Args:
      source_RxL: the rows on which the networks read the episodes (:mod:`instructax.rl.packing`);
        None reads a padded row an episode. The results are the same.
      scored_RxM: the slots of those rows with a response (:func:`instructax.rl.packing.scored_rows`);
        None computes the logits of every slot.

    Returns:
      (rollout, metrics, per-episode {"score", "kl", "length"} arrays for the samples file).
    """
    layout, mask_BxL = episode_layout(prompts, responses)
    raw_B = response_scores(
        reward, reward_config, prompts, responses, eos_id=eos_id, source_RxL=source_RxL
    )
    raw_B = reward_gain * raw_B + reward_bias
    if config.score_control == "shuffled":
        raw_B = jax.random.permutation(key, raw_B)
    finished_B = responses.stop_B != CUT_BY_LENGTH
    score_B = apply_missing_eos(raw_B, finished_B, config.missing_eos, missing_eos_value(config))

    def networks(rows: Layout) -> tuple[dict[str, Array], Array, Array]:
        how: dict[str, Any] = {"temperature": config.temperature}
        # Not passed as None, so that a model without this choice can stand in for ours.
        if scored_RxM is not None:
            how["scored_BxM"] = scored_RxM
        return (
            model.token_statistics(policy, model_config, rows, **how),
            model.token_logprobs(reference, model_config, rows, **how),
            values_before(value, reward_config, rows),
        )

    statistics, ref_logp_BxL, value_BxL = on_rows(networks, layout, source_RxL)
    rescored_BxL = statistics["logp"]
    sampled_BxL = jnp.pad(responses.logp_BxT, ((0, 0), (prompts.token_BxP.shape[1], 0)))
    old_logp_BxL = rescored_BxL if config.old_logp_from == "rescore" else sampled_BxL
    old_logp_BxL = jnp.where(mask_BxL, old_logp_BxL, 0.0)

    kl_BxL = per_token_kl(old_logp_BxL, ref_logp_BxL, mask_BxL, config.kl_estimator)
    k1_B = per_token_kl(old_logp_BxL, ref_logp_BxL, mask_BxL, "k1").sum(axis=1)
    reward_BxL = shaped_reward(score_B, kl_BxL, mask_BxL, kl_coef)
    unwhitened_B = reward_BxL.sum(axis=1)
    if config.whiten_rewards:
        reward_BxL = masking.whiten(reward_BxL, mask_BxL, shift_mean=False)
    value_BxL = jnp.where(mask_BxL, value_BxL, 0.0)
    advantage_BxL, return_BxL = generalized_advantage(
        reward_BxL, value_BxL, mask_BxL, config.discount, config.gae_lambda
    )
    if config.whiten_advantages:
        advantage_BxL = masking.whiten(advantage_BxL, mask_BxL, shift_mean=True)

    gap_BxL = jnp.where(mask_BxL, jnp.abs(rescored_BxL - sampled_BxL), 0.0)
    length_B = mask_BxL.sum(axis=1).astype(jnp.float32)
    entropy_B = jnp.where(mask_BxL, statistics["entropy"], 0.0).sum(axis=1)
    metrics = {
        "objective/kl": k1_B.mean(),
        "objective/kl_coef": jnp.asarray(kl_coef, jnp.float32),
        "objective/entropy": entropy_B.mean(),
        "objective/score": score_B.mean(),
        "objective/score_std": score_B.std(),
        "objective/score_total": unwhitened_B.mean(),
        "objective/non_score_reward": (unwhitened_B - score_B).mean(),
        "objective/rlhf_reward": unwhitened_B.mean(),
        "val/num_eos_tokens": (finished_B).astype(jnp.float32).sum(),
        "val/sampler_gap_max": gap_BxL.max(),
        "val/sampler_gap_mean": masking.masked_mean(gap_BxL, mask_BxL),
        "response_length/mean": length_B.mean(),
        "response_length/clip_ratio": (~finished_B).astype(jnp.float32).mean(),
    }
    rollout = Rollout(layout, mask_BxL, old_logp_BxL, value_BxL, advantage_BxL, return_BxL)
    return rollout, metrics, {"score": score_B, "kl": k1_B, "length": length_B}


def missing_eos_value(config: PpoConfig) -> float:
    """The field, or its rule's default: replace by -1 (Ziegler et al. 2019), subtract 1."""
    if config.missing_eos_value is not None:
        return config.missing_eos_value
    return -1.0 if config.missing_eos == "replace" else 1.0
