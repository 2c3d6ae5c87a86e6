"""A model with the seam's functions that looks one token back: known in closed form, cheap to compile.

Put in place of ``instructax.models.functional`` inside a step, it leaves the step's own wiring as
it is: layouts, predecessors, temperatures, masks and coefficients act as with a transformer.
Parameters: ``table`` (V x V, the logits of the next token) and ``value`` (V, read after a token).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from instructax.batches import predecessor

VOCAB = 11


def params(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return {
        "table": (scale * rng.normal(size=(VOCAB, VOCAB))).astype(np.float32),
        "value": rng.normal(size=VOCAB).astype(np.float32),
    }


def token_statistics(params, model_config, layout, *, temperature=1.0, dropout_key=None):
    index_BxL, exists_BxL = predecessor(layout)
    before_BxL = jnp.take_along_axis(jnp.asarray(layout.token_BxL), index_BxL, axis=1)
    logp_BxLxV = jax.nn.log_softmax(jnp.asarray(params["table"])[before_BxL] / temperature)
    entropy_BxL = -(jnp.exp(logp_BxLxV) * logp_BxLxV).sum(axis=-1)
    token_BxLx1 = jnp.asarray(layout.token_BxL)[:, :, None]
    logp_BxL = jnp.take_along_axis(logp_BxLxV, token_BxLx1, axis=2)[:, :, 0]
    return {
        "logp": jnp.where(exists_BxL, logp_BxL, 0.0),
        "entropy": jnp.where(exists_BxL, entropy_BxL, 0.0),
    }


def token_logprobs(params, model_config, layout, *, temperature=1.0, dropout_key=None):
    return token_statistics(params, model_config, layout, temperature=temperature)["logp"]


def scalars(params, model_config, layout, *, dropout_key=None):
    value_BxL = jnp.asarray(params["value"])[layout.token_BxL]
    return jnp.where(layout.segment_BxL > 0, value_BxL, 0.0)


def rollout_copy(params, model_config):
    return params


def prefill(copy, model_config, token_BxP, mask_BxP, slots, cache_dtype=None):
    return jnp.asarray(copy["table"])[token_BxP[:, -1]], ()


def decode(copy, model_config, token_B, cache):
    return jnp.asarray(copy["table"])[token_B], cache


def install(monkeypatch) -> None:
    """Every step that a PPO iteration consists of reads this model."""
    import sys

    from instructax.steps import ppo, rollout

    for step in (ppo, rollout):
        monkeypatch.setattr(step, "model", sys.modules[__name__])
