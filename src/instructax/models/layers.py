"""The leaf modules: norm, attention projections, MLP, block. Linen; no mask and no cache in here.

A block is told what to attend to by a function ``attend(q, k, v) -> (out, carry)``, so that
training rows, prefill and cached decoding are one block with three such functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from instructax.config import ModelConfig, ShardOver
from instructax.models import decoding
from instructax.partitioning import (
    block_axes,
    constrain,
    constrain_stream,
    gather_stream,
    gathered,
    parts,
)

Array = Any

# Names for policies of what the backward pass is given: products that are no wider than the stream.
QKV, NARROW = "qkv", "narrow"
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def keep_masks(key: Array, shape: tuple[int, ...], rate: float) -> tuple[Array, Array]:
    """Two independent masks of ``shape``, true with probability 1 - rate: the halves of one word an element.

    They are made once: the compiler would draw again within every product that reads what is masked, and a draw is a
    hundred operations (and, for TPU, half a minute of the compiler for each such product).
    """
    word = jax.random.bits(key, shape, jnp.uint32)
    below = _dropped_of_65536(rate)
    return jax.lax.optimization_barrier(((word & 0xFFFF) >= below, (word >> 16) >= below))


def dropout(x: Array, keep: Array, rate: float) -> Array:
    """x / (1 - rate) where it is kept, else 0; the rate as :func:`keep_masks` has it, so that the mean is that of x."""
    return jnp.where(keep, x / (1 - _dropped_of_65536(rate) / 2**16), 0).astype(x.dtype)


def _dropped_of_65536(rate: float) -> int:
    return min(round(rate * 2**16), 2**16 - 1)


def activation(name: str, x: Array) -> Array:
    """The MLP's non-linearity; gelu_tanh = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    if name == "gelu_erf":
        return jax.nn.gelu(x, approximate=False)
    if name == "gelu_sigmoid":
        return x * jax.nn.sigmoid(1.702 * x)
    if name == "swiglu":
        return jax.nn.silu(x)
    raise ValueError(f"activation {name!r} is not known")


def rotate(x_BxLxHxC: Array, position_BxL: Array, theta: float, pairing: str) -> Array:
    """Rotary embedding: pair i turns by position * theta^(-2i/C); float32 inside.

    ``half`` pairs component i with i + C/2, ``interleaved`` 2i with 2i + 1.
    """
    width = x_BxLxHxC.shape[-1]
    frequency_C = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = position_BxL.astype(jnp.float32)[:, :, None, None] * frequency_C[None, None, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x = x_BxLxHxC.astype(jnp.float32)
    if pairing == "half":
        a, b = jnp.split(x, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return out.astype(x_BxLxHxC.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm, statistics in float32."""

    kind: str
    eps: float
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (width,))
        dtype, x = x.dtype, x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.eps)
        # Not an einsum: its gradient would be a product with d_model as the batch, of transposed copies.
        x = x * jnp.broadcast_to(scale, x.shape)
        if self.kind == "layer" and self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (width,))
            x = x + jnp.broadcast_to(bias, x.shape)
        return x.astype(dtype)


def _product(x: Array, kernel: Array, contract: int, first: int = 0) -> Array:
    """x . kernel over the last axes of x and those of the kernel from ``first`` on."""
    of_x = tuple(range(x.ndim - contract, x.ndim))
    of_kernel = tuple(range(first, first + contract))
    return jax.lax.dot_general(x, kernel, ((of_x, of_kernel), ((), ())))


def _product_of_parts(
    x: Array, kernel: Array, contract: int, axes: tuple[str, ...], over: ShardOver
) -> Array:
    """The same where both lie in parts: the stream by slots, the kernel by d_model, which are whole for it."""
    if axes[0] == "d_model":
        return _product(gather_stream(x), gathered(kernel, axes, "d_model", over), contract)
    # A TPU's compiler does not sum into parts along a last axis: with d_model behind, a gradient would be summed whole.
    kernel = gathered(jnp.moveaxis(kernel, -1, 0), (axes[-1], *axes[:-1]), "d_model", over)
    return _product(x, kernel, contract, first=1)


class Linear(nn.Module):
    """x . kernel + bias over the last ``contract`` axes; parameters float32, product in x's dtype.

    What the axes of ``over`` divide of a kernel travels to the rows, unless it is ``stationary``: then the rows
    travel (``decoding.py``).
    """

    features: tuple[int, ...]
    std: float
    use_bias: bool
    over: ShardOver
    contract: int = 1
    stationary: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs = x.shape[x.ndim - self.contract :]
        kernel = self.param("kernel", nn.initializers.normal(self.std), inputs + self.features)
        product: Callable[..., Array] = functools.partial(_product, contract=self.contract)
        if parts("d_model", self.over) * parts("length") > 1 and not self.stationary:
            axes = block_axes("/".join((*self.path, "kernel")))
            product = functools.partial(
                _product_of_parts, contract=self.contract, axes=axes, over=self.over
            )
            # What is gathered for it is gathered again for its gradients, not kept.
            product = jax.checkpoint(product, prevent_cse=False)
        y = product(x, kernel.astype(x.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features)
            y = y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)
        return y


def join_qkv(attn: Any, config: ModelConfig) -> Any:
    """Parameters of :class:`Attention` with q, k and v as one product, qkv: of every group its queries, key and value."""

    def join(q: Array, k: Array, v: Array) -> Array:
        return jnp.concatenate([q.reshape(q.shape[:-2] + (config.kv_heads, -1)), k, v], axis=-1)

    rest = {name: of for name, of in attn.items() if name not in ("q", "k", "v")}
    return rest | {"qkv": jax.tree.map(join, attn["q"], attn["k"], attn["v"])}


def part_qkv(attn: Any, config: ModelConfig) -> Any:
    """The parameters of which :func:`join_qkv` made these."""
    rest = {name: of for name, of in attn.items() if name != "qkv"}
    parts = {name: _heads(x, config) for name, x in attn["qkv"].items()}
    return rest | {
        key: {name: of[i] for name, of in parts.items()} for i, key in enumerate(("q", "k", "v"))
    }


def _heads(qkv: Array, config: ModelConfig) -> tuple[Array, Array, Array]:
    """(..., H, C) queries, (..., G, C) keys and values of (..., G, (H / G + 2) C)."""
    heads, width = config.num_heads, config.head_width
    queries = heads // config.kv_heads * width
    q, k, v = jnp.split(qkv, (queries, queries + width), axis=-1)
    return q.reshape(q.shape[:-2] + (heads, width)), k, v


class Attention(nn.Module):
    config: ModelConfig
    residual_std: float
    decoding: bool = False

    @nn.compact
    def __call__(self, x: Array, position_BxL: Array, attend: Attend) -> tuple[Array, Any]:
        c = self.config
        heads, groups, width = c.num_heads, c.kv_heads, c.head_width
        linear = functools.partial(
            Linear, use_bias=c.use_bias, over=c.shard_over, stationary=self.decoding
        )
        if self.decoding:
            x = decoding.to_kernels(x, c)
            qkv = linear((groups, (heads // groups + 2) * width), c.init_std, name="qkv")(x)
            q, k, v = _heads(decoding.to_cache(qkv, c), c)
        else:
            q = linear((heads, width), c.init_std, name="q")(x)
            k = linear((groups, width), c.init_std, name="k")(x)
            v = linear((groups, width), c.init_std, name="v")(x)
            q, k, v = (checkpoint_name(x, QKV) for x in (q, k, v))
        q = constrain(q, "batch", None, "heads", None)
        k, v = (constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
        if c.qk_norm:
            q = Norm("rms", c.norm_eps, False, name="q_norm")(q)
            k = Norm("rms", c.norm_eps, False, name="k_norm")(k)
        if c.positions == "rope":
            q = rotate(q, position_BxL, c.rope_theta, c.rope_pairing)
            k = rotate(k, position_BxL, c.rope_theta, c.rope_pairing)
        out, carry = attend(q, k, v)
        if self.decoding:
            out = decoding.from_cache(out, c)
        out = linear((c.d_model,), self.residual_std, contract=2, name="out")(out)
        return checkpoint_name(out, NARROW), carry


class Mlp(nn.Module):
    config: ModelConfig
    residual_std: float
    decoding: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        linear = functools.partial(
            Linear, use_bias=c.use_bias, over=c.shard_over, stationary=self.decoding
        )
        if self.decoding:
            x = decoding.to_kernels(x, c)
        hidden = linear((c.mlp_width,), c.init_std, name="up")(x)
        if c.activation == "swiglu":
            gate = linear((c.mlp_width,), c.init_std, name="gate")(x)
            hidden = activation(c.activation, gate) * hidden
        else:
            # Its several factors are computed again in the backward pass: they are as wide as the layer itself.
            hidden = jax.checkpoint(functools.partial(activation, c.activation))(hidden)
        if self.decoding:
            hidden = decoding.hidden(hidden, c)
        else:
            hidden = constrain(hidden, "batch", None, "mlp")
        down = linear((c.d_model,), self.residual_std, name="down")(hidden)
        return checkpoint_name(down, NARROW)


class Block(nn.Module):
    """x + attention(norm(x)), then + mlp(norm(x)); GPT-1 normalises after each sum instead.

    ``decoding``: of one token a row; activations then travel to the weights, not weights to rows, and the
    parameters are those of :func:`join_qkv`.
    """

    config: ModelConfig
    deterministic: bool = True
    decoding: bool = False

    @nn.compact
    def __call__(self, x: Array, position_BxL: Array, attend: Attend) -> tuple[Array, Any]:
        c = self.config
        residual_std = c.init_std
        if c.scale_residual_init:
            residual_std /= (2 * c.num_layers) ** 0.5
        attn_norm = Norm(c.norm, c.norm_eps, c.use_bias, name="attn_norm")
        mlp_norm = Norm(c.norm, c.norm_eps, c.use_bias, name="mlp_norm")
        attention = Attention(c, residual_std, self.decoding, name="attn")
        mlp = Mlp(c, residual_std, self.decoding, name="mlp")
        stream = functools.partial(decoding.stream, config=c) if self.decoding else constrain_stream
        pre = c.norm_position == "pre"

        keeps = (None, None)
        if not self.deterministic:
            keeps = keep_masks(self.make_rng("dropout"), x.shape, c.dropout)

        def drop(y: Array, keep: Array | None) -> Array:
            return y if keep is None else dropout(y, keep, c.dropout)

        y, carry = attention(attn_norm(x) if pre else x, position_BxL, attend)
        x = stream(x + drop(y, keeps[0]))
        x = x if pre else attn_norm(x)
        x = x + drop(mlp(mlp_norm(x) if pre else x), keeps[1])
        x = x if pre else mlp_norm(x)
        return stream(x), carry
