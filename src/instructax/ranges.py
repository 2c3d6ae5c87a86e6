"""The range of every number in a config."""

from __future__ import annotations

import math
from dataclasses import dataclass

from instructax.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PpoConfig,
    PretrainConfig,
    RewardConfig,
    SampleConfig,
    SftConfig,
    TokenizerConfig,
    WorldConfig,
)


@dataclass(frozen=True)
class Range:
    """An interval; an end may be left out."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.low_open else x >= self.low
        return above and (x < self.high if self.high_open else x <= self.high)

    def __str__(self) -> str:
        low = f"{'above' if self.low_open else 'at least'} {self.low:,}"
        high = f"{'below' if self.high_open else 'at most'} {self.high:,}"
        ends = ((low, self.low), (high, self.high))
        return " and ".join(text for text, end in ends if math.isfinite(end))


ANY = Range()
COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, low_open=True)
FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, high_open=True)
ABOVE_ZERO = Range(0, 1, low_open=True)


def _table(**groups: str) -> dict[str, Range]:
    return {name: globals()[group] for group, names in groups.items() for name in names.split()}


RANGES: dict[type, dict[str, Range]] = {
    ModelConfig: _table(
        COUNT="num_layers d_model num_heads num_kv_heads d_head d_ff vocab_size vocab_multiple "
        "context_length band_width scan_unroll",
        POSITIVE="norm_eps rope_theta init_std",
        BELOW_ONE="dropout",
    ),
    OptimizerConfig: _table(
        NOT_NEGATIVE="learning_rate warmup_steps weight_decay",
        FRACTION="final_fraction warmup_from",
        BELOW_ONE="b1 b2",
        POSITIVE="eps max_grad_norm",
    ),
    MeshConfig: dict.fromkeys(("data", "fsdp", "model"), Range(-1)),
    # Byte fallback takes 256 pieces, special tokens 8.
    TokenizerConfig: {"vocab_size": Range(264)},
    DataConfig: _table(
        BELOW_ONE="validation_fraction",
        COUNT="max_prompts_per_user dedup_prefix_chars max_prompt_tokens max_response_tokens",
    ),
    PretrainConfig: {
        **_table(COUNT="batch_size grad_accumulation steps checkpoint_every evaluate_every"),
        "row_length": Range(2),
    },
    SftConfig: _table(
        COUNT="batch_size grad_accumulation row_length epochs select_samples",
        BELOW_ONE="dropout pretrain_mix",
        FRACTION="prompt_loss_weight",
    ),
    RewardConfig: {
        **_table(
            COUNT="batch_size grad_accumulation row_length epochs evaluations", BELOW_ONE="dropout"
        ),
        "max_responses": Range(2, 9),
    },
    PpoConfig: {
        **_table(
            NOT_NEGATIVE="kl_coef ptx_coef rl_coef log_prompts",
            COUNT="episodes batch_size minibatch_size grad_accumulation inner_epochs kl_horizon "
            "prompt_length response_length rollout_slots ptx_examples_per_episode "
            "checkpoint_every sample_every",
            POSITIVE="value_clip_range temperature kl_target",
            ABOVE_ZERO="discount",
            FRACTION="gae_lambda",
            BELOW_ONE="ema_decay",
            ANY="missing_eos_value",
        ),
        "clip_range": Range(0, 1, low_open=True, high_open=True),
        "normalize_samples": Range(2),
        "ptx_row_length": Range(2),
    },
    SampleConfig: _table(
        COUNT="samples_per_prompt top_k batch_size", NOT_NEGATIVE="temperature", ABOVE_ZERO="top_p"
    ),
    EvaluateConfig: _table(COUNT="best_of bootstrap batch_size", NOT_NEGATIVE="temperature"),
    WorldConfig: {
        **_table(
            COUNT="pretrain_documents pretrain_heldout_documents train_demonstrations "
            "validation_demonstrations comparison_prompts comparison_validation_prompts ppo_prompts "
            "validation_prompts eval_prompts labelers heldout_labelers user_cap",
            NOT_NEGATIVE="seed labeler_noise length_liking tie_width heavy_prompts courtesy_liking",
            FRACTION="kind_floor forbidden_share sound_alike_share filler chatter courtesy sloppy comply "
            "dirty_share",
        ),
        "num_entities": Range(8, 40),
        "num_attributes": Range(2, 5),
    },
    Config: {"seed": Range(0, 2**31 - 1), "seeds": Range(1, 2**31 - 1), "workers": Range(1)},
}
"""Range of every number by class and field; a test holds that none is left out."""
