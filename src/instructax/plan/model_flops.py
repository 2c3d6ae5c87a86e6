"""FLOPs that a model needs, whatever the program does: 2 a parameter and token forward, 4 more backward.

Chowdhery et al. 2022, appendix B: 6N + 12 L H C T a token of a row of T tokens, N without what is only
looked up; recomputation does not count. Attention is counted whole, not halved for its triangle.
"""

from __future__ import annotations

from instructax.config import ModelConfig


def matrix_parameters(m: ModelConfig) -> int:
    """Parameters that a token is multiplied with: of all blocks, and no embeddings."""
    attention = m.d_model * m.head_width * (2 * m.num_heads + 2 * m.kv_heads)
    mlp = m.d_model * m.mlp_width * (3 if m.activation == "swiglu" else 2)
    return m.num_layers * (attention + mlp)


def forward(
    m: ModelConfig, tokens: float, context: float, *, unembedded: float | None = None
) -> float:
    """FLOPs of ``tokens`` that attend to ``context`` slots each, of which ``unembedded`` go on to the vocabulary.

    All by default; a scalar head has 0.
    """
    attention = 4.0 * m.num_layers * m.num_heads * m.head_width * context
    trunk = tokens * (2.0 * matrix_parameters(m) + attention)
    words = tokens if unembedded is None else unembedded
    return trunk + words * 2.0 * m.d_model * m.vocab_size


def train(
    m: ModelConfig, tokens: float, context: float, *, unembedded: float | None = None
) -> float:
    """Forward and backward: three times :func:`forward`."""
    return 3.0 * forward(m, tokens, context, unembedded=unembedded)
