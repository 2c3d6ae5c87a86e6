"""The architectures of the papers' tables as :class:`ModelConfig` values.

Two rows of GPT-3's table 2.1 are misprints: 24 heads of 128 are not 2048 wide, and 13B's 5140 is
not 40 heads of 128. Stiennon et al. 2020, table 3, has 16 heads and 5120; so do these.
"""

from __future__ import annotations

from instructax.config import ModelConfig


def _gpt2(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers, d_model=d_model, num_heads=num_heads, context_length=1024
    )


def _gpt3(num_layers: int, d_model: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        context_length=2048,
        attention_pattern=("dense", "banded"),
    )


GPT1 = ModelConfig(
    num_layers=12,
    d_model=768,
    num_heads=12,
    vocab_size=40478,
    context_length=512,
    norm_position="post",
    scale_residual_init=False,
)
"""Radford et al. 2018: post-LN, ffn 3072, 512 positions, 40,000 merges (40,478 entries as released)."""

PRESETS: dict[str, ModelConfig] = {
    "gpt1": GPT1,
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-355m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}
"""GPT-1 (2018), GPT-2 (2019) and GPT-3 (2020, table 2.1); InstructGPT's 1.3B, 6B and 175B are gpt3-1.3b, -6.7b and -175b."""


def llama(
    num_layers: int,
    d_model: int,
    num_heads: int,
    d_ff: int,
    vocab_size: int,
    context_length: int,
    *,
    num_kv_heads: int | None = None,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
    tie_embeddings: bool = False,
    rope_pairing: str = "half",
) -> ModelConfig:
    """The Llama family: RoPE, RMSNorm, SwiGLU, grouped-query attention, no biases."""
    return ModelConfig(
        num_layers=num_layers,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        d_ff=d_ff,
        vocab_size=vocab_size,
        context_length=context_length,
        norm="rms",
        norm_eps=norm_eps,
        positions="rope",
        rope_theta=rope_theta,
        rope_pairing=rope_pairing,  # type: ignore[arg-type]
        activation="swiglu",
        use_bias=False,
        tie_embeddings=tie_embeddings,
    )
