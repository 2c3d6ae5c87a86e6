"""Which axis of which array lies on which axis of the mesh: the only place that knows.

Tables are data. ``RULES`` maps logical axis names to mesh axes (``PLACEMENTS`` and ``DECODING`` are its
variants for a network's parameters and for decoding); ``PARAMETERS`` maps the end of a parameter's path
to its logical axes. Because only the *end* of a path is matched, Adam's moments and the averaged policy,
whose paths contain the parameter's own, are sharded alike.

The mesh axes are ``data`` (batch parallelism, parameters replicated unless ``ModelConfig.shard_over`` says
otherwise), ``fsdp`` (batch parallelism, parameters sharded) and ``model`` (tensor parallelism).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from instructax.config import ShardOver

MESH_AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")

# "d_model" is the model width of a kernel, "features" that of anything else: a token embedding
# sharded over the vocabulary by one mesh axis and over the width by another makes the compiler
# materialize it whole on every device, so there both mesh axes go to the vocabulary.
RULES: dict[str, tuple[str, ...]] = {
    "batch": BATCH_AXES,
    "replica": ("data",),
    "length": ("model",),
    "layers": (),
    "vocab": ("model", "fsdp"),
    "vocab_of_rows": ("model",),  # of logits whose rows lie on fsdp
    "position": (),
    "features": (),
    "d_model": ("fsdp",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "head_width": (),
    "of_group": (),  # the queries of a key-value head, its key and its value
    "mlp": ("model",),
    "scalar": (),
}

# Where the parameters of a network lie, by its ModelConfig.shard_over; activations of all lie by RULES. data comes last, so
# that what it divides is a part of what a chip has otherwise.
PLACEMENTS: dict[ShardOver, dict[str, tuple[str, ...]]] = {
    "fsdp": RULES,
    "data+fsdp": RULES | {"vocab": ("model", "fsdp", "data"), "d_model": ("fsdp", "data")},
}

# While one token a row is decoded, activations are far smaller than the kernels that they meet. So kernels stay where they
# are, and fsdp and model change places: a product over d_model is summed over model, one over heads or the MLP over fsdp
# (weights stationary in two dimensions: Pope et al. 2022, section 3.2.2).
DECODING: dict[str, tuple[str, ...]] = RULES | {
    "d_model": ("model",),
    "heads": ("fsdp",),
    "kv_heads": ("fsdp",),
    "mlp": ("fsdp",),
}

# (end of the path, logical axes); the parameters of all blocks are stacked on a leading axis.
PARAMETERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"embed/token", ("vocab", "features")),
    (r"embed/position", ("position", "features")),
    (r"blocks/(attn_norm|mlp_norm)/(scale|bias)", ("layers", "features")),
    (r"blocks/attn/q/kernel", ("layers", "d_model", "heads", "head_width")),
    (r"blocks/attn/q/bias", ("layers", "heads", "head_width")),
    (r"blocks/attn/(k|v)/kernel", ("layers", "d_model", "kv_heads", "head_width")),
    (r"blocks/attn/(k|v)/bias", ("layers", "kv_heads", "head_width")),
    (r"blocks/attn/qkv/kernel", ("layers", "d_model", "kv_heads", "of_group")),
    (r"blocks/attn/qkv/bias", ("layers", "kv_heads", "of_group")),
    (r"blocks/attn/(q_norm|k_norm)/scale", ("layers", "head_width")),
    (r"blocks/attn/out/kernel", ("layers", "heads", "head_width", "d_model")),
    (r"blocks/attn/out/bias", ("layers", "features")),
    (r"blocks/mlp/(up|gate)/kernel", ("layers", "d_model", "mlp")),
    (r"blocks/mlp/(up|gate)/bias", ("layers", "mlp")),
    (r"blocks/mlp/down/kernel", ("layers", "mlp", "d_model")),
    (r"blocks/mlp/down/bias", ("layers", "features")),
    (r"final_norm/(scale|bias)", ("features",)),
    (r"head/kernel", ("vocab", "features")),
    (r"value_head/kernel", ("features", "scalar")),
    (r"value_head/bias", ("scalar",)),
)

_PATTERNS = tuple((re.compile(rf"(?:^|/){end}$"), axes) for end, axes in PARAMETERS)


def path_name(path: Sequence[Any]) -> str:
    """A key path of ``jax.tree_util`` as ``a/b/0/c``, the form that the tables match."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def spec(
    name: str,
    shape: Sequence[int],
    logical_axes: Sequence[str | None],
    mesh_shape: Mapping[str, int] | None = None,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> PartitionSpec:
    """The PartitionSpec of one array; None as a logical axis leaves that axis whole.

    An axis of size 1 has nothing to divide and stays whole. With ``mesh_shape`` (axis name to
    size) divisibility is checked.

    Raises:
      ValueError, naming ``name``: unknown logical axis, wrong rank, two axes that claim one mesh
        axis, or an axis that its mesh axes do not divide.
    """
    if len(logical_axes) != len(shape):
        raise ValueError(
            f"{name}: shape {tuple(shape)} has rank {len(shape)}, but its logical axes are "
            f"{tuple(logical_axes)}"
        )
    entries: list[str | tuple[str, ...] | None] = []
    claimed: dict[str, str] = {}
    for size, logical in zip(shape, logical_axes, strict=True):
        if logical is not None and logical not in rules:
            raise ValueError(f"{name}: unknown logical axis {logical!r}, known: {sorted(rules)}")
        mesh_axes = () if logical is None else rules[logical]
        for mesh_axis in mesh_axes:
            if mesh_axis in claimed:
                raise ValueError(
                    f"{name}: mesh axis {mesh_axis!r} is claimed by {claimed[mesh_axis]!r} and "
                    f"{logical!r}"
                )
            claimed[mesh_axis] = str(logical)
        if size == 1:
            mesh_axes = ()
        if mesh_shape is not None:
            parts = math.prod(mesh_shape[axis] for axis in mesh_axes)
            if size % parts:
                raise ValueError(
                    f"{name}: axis {logical!r} of size {size} is not divisible by {parts} "
                    f"(mesh axes {mesh_axes})"
                )
        entries.append(
            None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes
        )
    return PartitionSpec(*entries)


def parameter_axes(path: str) -> tuple[str, ...] | None:
    """The logical axes that ``PARAMETERS`` gives to a path, or None where no rule matches."""
    found = [axes for pattern, axes in _PATTERNS if pattern.search(path)]
    if len(found) > 1:
        raise ValueError(f"{path}: matched by {len(found)} rules of PARAMETERS, must be one")
    return found[0] if found else None


def block_axes(path: str) -> tuple[str, ...]:
    """The logical axes of a parameter of one block, such as ``mlp/up/kernel``, without the leading layers.

    Raises:
      ValueError, naming the path: no rule of ``PARAMETERS`` matches.
    """
    axes = parameter_axes(f"blocks/{path}")
    if axes is None:
        raise ValueError(f"blocks/{path}: no rule of PARAMETERS matches")
    return axes[1:]


def param_specs(
    abstract_tree: Any,
    mesh_shape: Mapping[str, int] | None = None,
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> Any:
    """A tree of PartitionSpecs for parameters, or for any state that holds copies of them.

    Leaves of rank 0 (counters, keys, coefficients) are replicated.

    Raises:
      ValueError, naming the path: an array of rank > 0 that no rule of ``PARAMETERS`` matches,
        and everything that :func:`spec` refuses.
    """

    def of_leaf(path, leaf):
        name = path_name(path)
        if not leaf.shape:
            return PartitionSpec()
        axes = parameter_axes(name)
        if axes is None:
            raise ValueError(
                f"{name}: no rule of PARAMETERS matches this array of shape {leaf.shape}"
            )
        return spec(name, leaf.shape, axes, mesh_shape, rules)

    return jax.tree_util.tree_map_with_path(of_leaf, abstract_tree)


def batch_spec() -> PartitionSpec:
    """Rows over all batch-parallel devices; every other axis whole."""
    return PartitionSpec(BATCH_AXES)


def parts(logical_axis: str, over: ShardOver = "fsdp") -> int:
    """Into how many parts the mesh of the enclosing ``jax.set_mesh`` divides an axis; 1 without one.

    Inside of :func:`by_batch_shard` a device sees its own rows alone: nothing divides them further.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = [axis for axis in PLACEMENTS[over][logical_axis] if axis not in mesh.manual_axes]
    return math.prod(dict(mesh.shape).get(axis, 1) for axis in left)


def free_axes() -> tuple[str, ...]:
    """Axes of the enclosing mesh that are the compiler's; none without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)


def platform() -> str:
    """Where the program being traced will run: ``tpu``, ``gpu`` or ``cpu``; that of the mesh, if there is one."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        return jax.default_backend()
    return device.platform


def decoding_rules(heads: int, kv_heads: int, d_model: int, mlp: int) -> dict[str, tuple[str, ...]]:
    """:data:`DECODING` where the enclosing mesh has fsdp and divides these so, else :data:`RULES`."""
    mesh = jax.sharding.get_abstract_mesh()
    shape = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    fsdp, model = shape.get("fsdp", 1), shape.get("model", 1)
    divides = not any(size % fsdp for size in (heads, kv_heads, mlp)) and d_model % model == 0
    return DECODING if fsdp > 1 and divides else RULES


def constrain_stream(x_BxLxD: jax.Array) -> jax.Array:
    """Pin the residual stream between the products that the model axis divides: rows, and slots by ``model``.

    So a norm or a dropout is computed once a slot, and what the backward pass keeps of a block is
    divided as well (sequence parallelism: Korthikanti et al. 2022, section 4.2). Rows whose length
    the model axis does not divide are whole on it.
    """
    return constrain(x_BxLxD, *_stream_axes(x_BxLxD))


def gather_stream(x_BxLxD: jax.Array) -> jax.Array:
    """The residual stream with all slots of its rows, for products; its gradient is divided like the stream."""
    return gathered(x_BxLxD, _stream_axes(x_BxLxD), "length")


def _stream_axes(x_BxLxD: jax.Array) -> tuple[str | None, ...]:
    divides = x_BxLxD.shape[1] % parts("length") == 0
    return "batch", "length" if divides else None, None


def gathered(
    x: jax.Array, logical_axes: tuple[str | None, ...], whole: str, over: ShardOver = "fsdp"
) -> jax.Array:
    """``x``, which lies as its logical axes say, whole along ``whole``; its gradient lies as ``x`` does.

    The partitioner would gather for each product that reads ``x``, and for their gradients again. So all
    of them read one array, and a gradient is summed into parts. A backward pass keeps what is whole, unless
    ``jax.checkpoint`` tells it not to.
    """
    return _gathered(x, logical_axes, whole, over) if parts(whole, over) > 1 else x


def _whole(
    x: jax.Array, logical_axes: tuple[str | None, ...], whole: str, over: ShardOver
) -> jax.Array:
    kept = (None if axis == whole else axis for axis in logical_axes)
    return constrain(x, *kept, rules=PLACEMENTS[over])


_gathered = jax.custom_vjp(_whole, nondiff_argnums=(1, 2, 3))
_gathered.defvjp(
    lambda x, logical_axes, whole, over: (_whole(x, logical_axes, whole, over), None),
    lambda logical_axes, whole, over, _, gradient: (
        constrain(gradient, *logical_axes, rules=PLACEMENTS[over]),
    ),
)


def constrain(
    x: jax.Array, *logical_axes: str | None, rules: Mapping[str, tuple[str, ...]] = RULES
) -> jax.Array:
    """Pin the sharding of an activation; does nothing where no mesh is set.

    The mesh is the one of the enclosing ``jax.set_mesh``, so that models never carry it around.
    Inside of :func:`by_batch_shard` only the axes that it leaves to the compiler are pinned.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    manual = set(mesh.manual_axes)
    logical_axes = tuple(
        None if name is not None and manual & set(rules.get(name, ())) else name
        for name in logical_axes
    )
    return jax.lax.with_sharding_constraint(
        x, spec("activation", x.shape, logical_axes, dict(mesh.shape), rules)
    )


def by_batch_shard(function: Callable[..., Any], whole: int) -> Callable[..., Any]:
    """``function`` on every shard's rows apart: its loops may end at other times, and nothing is exchanged within them.

    The first ``whole`` arguments are the same for all shards: what is sharded over ``fsdp`` is gathered
    once. All others, and the results, have rows. Tensor parallelism stays the compiler's.
    """
    if parts("batch") == 1:
        return function

    def call(*args):
        specs = tuple(PartitionSpec() if i < whole else batch_spec() for i in range(len(args)))
        return jax.shard_map(
            function,
            in_specs=specs,
            out_specs=batch_spec(),
            axis_names=set(BATCH_AXES),
            check_vma=False,
        )(*args)

    return call


def by_batch_shard_with_table(
    function: Callable[..., Any], table: jax.Array, dtype: Any, *of_rows: Any
) -> Any:
    """``function(table, *of_rows)`` on every shard's rows apart.

    The table travels to them once, in ``dtype``, and its gradient back once, added up on a shard in the table's own.
    """

    def call(narrow, *of_rows):
        return function(narrow.astype(table.dtype), *of_rows)

    return by_batch_shard(call, whole=1)(table.astype(dtype), *of_rows)
