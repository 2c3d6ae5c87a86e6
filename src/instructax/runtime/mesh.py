"""The device mesh, and how batches and states come to lie on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from instructax import partitioning
from instructax.config import MeshConfig, ShardOver, UserError
from instructax.runtime.distributed import are_many


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh (data, fsdp, model) over all devices, with Auto axes; one device gives (1, 1, 1).

    At most one axis is -1 and takes what the others leave. Raises UserError where the axes do
    not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.model]
    said = f"mesh data={config.data} fsdp={config.fsdp} model={config.model}"
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{said}: axes must be positive, and at most one may be -1 (inferred)")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        if len(devices) % known:
            raise UserError(f"{said}: {known} does not divide the {len(devices)} devices present")
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"{said} needs {math.prod(sizes)} devices, {len(devices)} are present; "
            "set one axis to -1 to take them all"
        )
    return Mesh(
        arrange(sizes, devices), partitioning.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes)
    )


def arrange(sizes: Sequence[int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Devices in the mesh's shape: neighbours along the last axes, which say most, are neighbours in the machine.

    Axes of a TPU slice are split where the mesh needs it. Between several slices, whose network is slow, lies
    nothing but ``data``; nodes with GPUs follow each other. (``jax.make_mesh`` refuses all three.)

    Raises:
      UserError: slices that ``data`` does not divide into.
    """
    data, *inner = sizes
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu" or slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if data % slices:
        raise UserError(
            f"mesh.data = {data}: the devices are {slices} slices, between which only data can lie; "
            f"use a multiple of {slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inner),
        (slices, *(1 for _ in inner)),
        devices,
        allow_split_physical_axes=True,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data and fsdp axes."""
    return NamedSharding(mesh, partitioning.batch_spec())


def shards(mesh: Mesh) -> int:
    """How many parts the rows of a batch are divided into."""
    return math.prod(mesh.shape[axis] for axis in partitioning.BATCH_AXES)


def check_rows(mesh: Mesh, field: str, rows: int, microbatches: int = 1) -> None:
    """Refuse a number of rows that the data axes do not divide, in each of its microbatches.

    Raises:
      UserError: it names the field and what divides.
    """
    parts = shards(mesh)
    if rows % (parts * microbatches):
        of_each = f" in each of {microbatches} microbatches" if microbatches > 1 else ""
        raise UserError(
            f"{field} = {rows}: cannot be divided over {parts} data-parallel devices{of_each}; use "
            f"a multiple of {parts * microbatches}, or another mesh"
        )


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Turn a pytree of NumPy arrays, the same *global* batch on every process, into global arrays.

    Each process hands over the rows of the shards that its own devices hold. Where the model axis
    spans processes these are not the ``process_index``-th slice, so they are read off the sharding.
    Leaves of rank 0 are replicated.

    Raises:
      UserError: a number of rows that the data axes do not divide.
    """
    parts = shards(mesh)
    rows_sharding, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def put(path, leaf):
        array = np.asarray(leaf)
        if array.ndim and array.shape[0] % parts:
            raise UserError(
                f"a batch of {array.shape[0]} rows ({partitioning.path_name(path) or 'batch'}) "
                f"cannot be divided over {parts} data-parallel devices; make the batch size a "
                f"multiple of {parts} or the mesh smaller"
            )
        return jax.make_array_from_callback(
            array.shape, rows_sharding if array.ndim else whole, lambda index: array[index]
        )

    return jax.tree_util.tree_map_with_path(put, batch)


def to_host(tree: Any) -> Any:
    """Whole NumPy arrays, on every process, of a pytree of arrays that may lie on many of them."""
    if not are_many():
        return jax.device_get(tree)

    def whole(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


def shardings(mesh: Mesh, abstract: Any, over: Any = "fsdp") -> Any:
    """A tree of NamedShardings for parameters or a state that holds copies of them.

    ``over`` is a network's ``ModelConfig.shard_over``; of a state of several networks, a tree of these that its own begins with.
    """

    def of_network(name: ShardOver, tree: Any) -> Any:
        return partitioning.param_specs(tree, dict(mesh.shape), partitioning.PLACEMENTS[name])

    specs = jax.tree.map(of_network, over, abstract)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def abstract_sharded(
    mesh: Mesh, init_fn: Callable[..., Any], *args: Any, over: Any = "fsdp"
) -> Any:
    """The ShapeDtypeStructs, with shardings, of what ``init_fn`` returns: what a restore needs. ``over``: :func:`shardings`."""
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(init_fn, *args)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings(mesh, abstract, over),
    )


def init_sharded(mesh: Mesh, init_fn: Callable[..., Any], *args: Any, over: Any = "fsdp") -> Any:
    """Call ``init_fn`` so that its result is born sharded: no device ever holds all of it. ``over``: :func:`shardings`."""
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(init_fn, *args)
        return jax.jit(init_fn, out_shardings=shardings(mesh, abstract, over))(*args)


def parked(field: str, tree: Any) -> Callable[[], Any]:
    """A copy of arrays in their hosts' pinned memory, each shard where its device is; a call brings them back.

    Drop ``tree`` to free the devices. What a call returns is freed when it is dropped in turn.

    Raises:
      UserError: devices whose platform has no such memory; it names the field that asked for it.
    """
    placed = jax.tree.map(lambda x: x.sharding, tree)
    try:
        hosted = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), placed)
    except ValueError as error:
        raise UserError(
            f"{field} = host: {jax.default_backend()} devices have no pinned host memory; "
            "leave it at device"
        ) from error
    on_host = jax.device_put(tree, hosted)
    return lambda: jax.device_put(on_host, placed)
