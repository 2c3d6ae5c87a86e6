"""What a public pure function asks of its arguments at the door.

Arrays (NumPy's or jax's) come in, are checked by rank and dtype, and go on in the precision of the
arithmetic: float64 stays float64, every other floating type becomes float32. Integers are never
taken for floats: a reward buffer of integers would cut every score to a whole number. A message
names the argument. Nothing here computes.
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def float_array(name: str, value: Any, rank: int | None = None) -> jax.Array:
    """``value`` in float32, or in float64 if it is float64 (and jax's x64 mode is on).

    Raises:
      TypeError: not an array, or not of a floating dtype.
      ValueError: not of the given rank.
    """
    _check(name, value, jnp.floating, "floating", rank)
    array = jnp.asarray(value)
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def bool_array(name: str, value: Any, rank: int | None = None) -> jax.Array:
    """``value``, a mask of dtype bool; a 0/1 mask of numbers is refused, as in float_array."""
    _check(name, value, jnp.bool_, "bool", rank)
    return jnp.asarray(value)


def int_array(name: str, value: Any, rank: int | None = None) -> Any:
    """``value``, an array of integers of any width, as it is (jax would cut int64 to int32)."""
    _check(name, value, jnp.integer, "integer", rank)
    return value


def key_array(name: str, value: Any, rank: int) -> jax.Array:
    """``value``, an array of typed random keys (``jax.random.key``, not ``PRNGKey``)."""
    _check(name, value, jax.dtypes.prng_key, "a typed random key (jax.random.key)", rank)
    return value


def same_shape(**arrays: Any) -> None:
    """Raises ValueError unless all arguments, given by name, have the shape of the first."""
    (first, reference), *others = arrays.items()
    for name, array in others:
        if array.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {array.shape}, but {first} has shape {reference.shape}"
            )


def scalar(name: str, value: Any, dtype: Any) -> jax.Array:
    """A coefficient or a count, as a rank-0 array of ``dtype``; a traced scalar is welcome.

    The cast keeps a float64 NumPy scalar from raising the precision of a float32 loss. Here an
    integer is fine, since nothing is stored in its dtype: 0 is a value, and so is a token count.

    Raises:
      TypeError: not a real number.
      ValueError: not of rank 0.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return jnp.asarray(value, dtype)
    if not hasattr(value, "dtype") or not (
        jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    ):
        raise TypeError(f"{name} must be a real number, got {_describe(value)}")
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {value.shape}")
    return jnp.asarray(value).astype(dtype)


def _check(name: str, value: Any, kind: Any, expected: str, rank: int | None) -> None:
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"{name} must be an array, got {_describe(value)}")
    if not jnp.issubdtype(value.dtype, kind):
        raise TypeError(f"{name} must be {expected}, got {value.dtype}")
    if rank is not None and len(value.shape) != rank:
        raise ValueError(f"{name} must have rank {rank}, got shape {value.shape}")


def _describe(value: Any) -> str:
    return str(value.dtype) if hasattr(value, "dtype") else type(value).__name__
