"""PPO-ptx: gamma times the pretraining gradient, added to PPO's before the one optimizer step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from instructax import masking, shapes


def combine_gradients(
    ppo_grads: Any, ptx_grads: Any, ptx_coef: Any
) -> tuple[Any, dict[str, jax.Array]]:
    """g = g_ppo + gamma g_ptx, the gradient of the loss of Ouyang et al. 2022, eq. 2.

    Both are gradients of losses (of minus the PPO objective, of the pretraining NLL), so both are
    descended. Give the sum to *one* optimizer step: after two steps, each clipped or normalised
    by Adam, gamma has no effect.

    At gamma = 0 the result is ``ppo_grads`` bit for bit, also where a pretraining gradient is NaN
    or infinite: 0 * NaN is NaN, and -0.0 + 0.0 is 0.0, so the product is not formed into the sum
    but selected away. Both arms of an ablation thus run one program and log the same metrics.

    Args:
      ppo_grads: pytree of floating arrays.
      ptx_grads: pytree of the same structure and shapes, *not* scaled by gamma.
      ptx_coef: gamma, a number or a traced scalar; 27.8 in Ouyang et al. 2022.

    Returns:
      g, each leaf in the dtype of PPO's (summed in float32 at least), and float32 metrics:
      ``ppo_grad_norm``, ``ptx_grad_norm`` (unscaled), ``grad_norm`` of g, all global L2 norms, and
      ``grad_cosine`` of PPO's and the pretraining gradient, 0 where one of them is 0.

    Raises:
      TypeError: a leaf that is not floating. ValueError: trees that differ in structure or shape.
    """
    ppo_tree: Any = jax.tree.structure(ppo_grads)
    ptx_tree: Any = jax.tree.structure(ptx_grads)
    if ptx_tree != ppo_tree:
        raise ValueError(f"ptx_grads is {ptx_tree}, but ppo_grads is {ppo_tree}")

    def combine(path: Any, ppo: Any, ptx: Any) -> jax.Array:
        leaf = jax.tree_util.keystr(path)
        ppo_name, ptx_name = f"ppo_grads{leaf}", f"ptx_grads{leaf}"
        ppo_float = shapes.float_array(ppo_name, ppo)
        ptx_float = shapes.float_array(ptx_name, ptx)
        shapes.same_shape(**{ppo_name: ppo_float, ptx_name: ptx_float})
        gamma = shapes.scalar("ptx_coef", ptx_coef, ppo_float.dtype)
        total = jnp.where(gamma == 0, ppo_float, ppo_float + gamma * ptx_float)
        return total.astype(jnp.asarray(ppo).dtype)

    grads = jax.tree_util.tree_map_with_path(combine, ppo_grads, ptx_grads)
    ppo_norm, ptx_norm = _norm(ppo_grads), _norm(ptx_grads)
    # Divided one norm at a time: their product leaves float32's range before they do.
    cosine = masking.ratio_or_zero(
        masking.ratio_or_zero(_dot(ppo_grads, ptx_grads), ppo_norm), ptx_norm
    )
    metrics = {
        "ppo_grad_norm": ppo_norm,
        "ptx_grad_norm": ptx_norm,
        "grad_norm": _norm(grads),
        "grad_cosine": jnp.clip(cosine, -1.0, 1.0),
    }
    return grads, metrics


def _dot(a: Any, b: Any) -> jax.Array:
    """<a, b> over all leaves, in float32 whatever their dtypes."""
    products = jax.tree.map(
        lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b
    )
    return jax.tree.reduce(jnp.add, products, jnp.zeros((), jnp.float32))


def _norm(grads: Any) -> jax.Array:
    return jnp.sqrt(_dot(grads, grads))
