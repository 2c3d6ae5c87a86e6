"""States on disk: saved in the background, whole or not at all, restored onto any mesh.

A folder holds one directory a step, ``<step>/<item>/`` for each named item and ``<step>/meta`` for
a JSON object. A step counts from the moment its commit file exists, which is written last and
removed first, so that neither a save nor a deletion cut short is ever taken for a checkpoint.
Reading goes past the manager, by step and item, so that a later stage loads ``params`` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from instructax.config import UserError
from instructax.partitioning import path_name
from instructax.runtime.distributed import is_main, on_main, wait_for

_COMMIT = "commit_success.txt"
_META = "meta"


class Checkpoints:
    """The checkpoints that one training stage writes; also a context manager.

    Only the stage that trains opens its folder like this: opening removes what an interrupted save
    left behind. Others read with :func:`load_item` and :func:`load_meta`.

    Args:
      folder: where the steps lie; made if missing.
      keep_latest: how many of the newest steps are kept, beside the one being saved.
      keep_all: keep every step (candidates of a later choice).
    """

    def __init__(self, folder: Any, keep_latest: int = 2, keep_all: bool = False):
        if keep_latest < 1:
            raise ValueError(f"keep_latest must be at least 1, got {keep_latest}")
        self.folder = _path(folder)
        self._keep_latest = None if keep_all else keep_latest
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder; checkpoints need one")
        on_main(self._remove_interrupted)
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                # Renaming, the default on local disks, takes any directory with a number for a name
                # as whole, also an empty one or a copy cut short.
                atomicity_options=ocp.options.AtomicityOptions(
                    mode=ocp.options.AtomicityMode.COMMIT_FILE
                ),
                # Deleting is done here: the manager's leaves the commit file in place meanwhile.
                preservation_policy=ocp.checkpoint_managers.preservation_policy.PreserveAll(),
            ),
        )

    def save(self, step: int, items: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Save named pytrees and a JSON object as one step.

        Returns once the arrays are copied to the host: the caller may donate them. Writing goes on
        in the background; a failure shows at the next save, wait or close.

        Raises:
          ValueError: a step that is not newer than the newest, or an item called "meta".
          TypeError: ``meta`` is not JSON.
          UserError: the disk refused.
        """
        if _META in items or not items:
            raise ValueError(f"items must be one or more trees, none called {_META!r}")
        json.dumps(dict(meta))
        self.wait()
        newest = self.latest()
        if newest is not None and step <= newest:
            raise ValueError(f"step {step} is not newer than step {newest} in {self.folder}")
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(**arguments, **{_META: ocp.args.JsonSave(dict(meta))}),
                force=True,
            )
        except OSError as error:
            raise self._unwritable(error) from error
        if not saved:
            raise RuntimeError(f"step {step} was not saved in {self.folder}")

    def steps(self) -> list[int]:
        """The complete steps, ascending; one still being written is not among them."""
        return _steps(self.folder)

    def latest(self) -> int | None:
        """The newest complete step, or None; the same on every process, all of which must ask."""
        return on_main(lambda: max(self.steps(), default=None))

    def restore(self, step: int, item: str, abstract: Any) -> Any:
        """One item of a step, laid out as ``abstract`` says; see :func:`load_item`."""
        self.wait()
        return load_item(self.folder, item, abstract, step)

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON object of a step."""
        self.wait()
        return load_meta(self.folder, step)

    def wait(self) -> None:
        """Return once nothing is being written and only the steps to keep are left."""
        try:
            self._manager.wait_until_finished()
        except OSError as error:
            raise self._unwritable(error) from error
        if self._keep_latest is not None and is_main():
            for step in self.steps()[: -self._keep_latest]:
                _remove_step(self.folder / str(step))

    def close(self) -> None:
        """Wait, and let go of the folder."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove_interrupted(self) -> None:
        if self.folder.exists():
            for path in self.folder.iterdir():
                if path.name.isdigit() and not (path / _COMMIT).exists():
                    _remove_step(path)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"could not write a checkpoint to {self.folder}: {_first_line(error)}")


def load_item(folder: Any, item: str, abstract: Any, step: int | None = None) -> Any:
    """Restore one item of the newest step, or of ``step``.

    Args:
      folder: the checkpoints folder of a stage.
      item: the name it was saved under, such as "params".
      abstract: a pytree of ShapeDtypeStructs (or arrays) with shardings: the result has its
        structure, dtypes and shardings, whatever mesh it was saved from.

    Raises:
      ValueError: a leaf of ``abstract`` has no sharding.
      UserError: no such folder, step or item; another shape, dtype or structure, naming the path;
        damaged files.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"abstract leaf {path_name(path)!r} has no sharding")
    folder = _path(folder)
    if step is not None:
        wait_for(folder / str(step) / _COMMIT)
    where = _step_path(folder, step) / item
    if not (where / _COMMIT).exists():
        held = sorted(path.name for path in where.parent.iterdir() if path.is_dir())
        raise UserError(f"{where.parent} holds no {item!r}, only {held}")
    handler = ocp.StandardCheckpointHandler()
    target = jax.tree.map(_as_struct, abstract)
    try:
        stored = _stored(handler, where)
        _check(where, stored, _wanted(target))
        return handler.restore(where, args=ocp.args.StandardRestore(target))
    except UserError:
        raise
    except Exception as error:  # orbax and tensorstore raise many types for damaged files
        raise _damaged(where, error) from error


def newest(folder: Any) -> int:
    """The newest complete step. Raises UserError where there is none."""
    return int(_step_path(_path(folder), None).name)


def load_meta(folder: Any, step: int | None = None) -> dict[str, Any]:
    """The JSON object saved with the newest step, or with ``step``. Raises as :func:`load_item`."""
    where = _step_path(_path(folder), step) / _META / "metadata"
    try:
        return json.loads(where.read_text())
    except (OSError, ValueError) as error:
        raise _damaged(where.parent, error) from error


def _path(folder: Any) -> Any:
    # tensorstore wants local paths absolute; a remote address (gs://...) is so already.
    path = epath.Path(folder)
    return path if "://" in str(folder) else path.expanduser().absolute()


def _steps(folder: Any) -> list[int]:
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.name.isdigit()]
    return sorted(int(name) for name in names if (folder / name / _COMMIT).exists())


def _step_path(folder: Any, step: int | None) -> Any:
    if not folder.exists():
        raise UserError(f"{folder} does not exist; expected a folder of checkpoints")
    steps = _steps(folder)
    if not steps:
        raise UserError(
            f"{folder} holds no complete checkpoint; name the folder that holds the steps"
        )
    if step is None:
        return folder / str(steps[-1])
    if step not in steps:
        raise UserError(f"{folder} holds no complete step {step}, only {steps}")
    return folder / str(step)


def _remove_step(path: Any) -> None:
    (path / _COMMIT).unlink(missing_ok=True)
    path.rmtree()


def _as_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _stored(handler: Any, where: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    tree = handler.metadata(where).tree
    return {
        path_name(path): (tuple(leaf.shape), np.dtype(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _wanted(target: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    wanted = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(target):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)  # what lies on disk of a typed key
        wanted[path_name(path)] = (tuple(leaf.shape), np.dtype(leaf.dtype))
    return wanted


def _check(where: Any, stored: dict, wanted: dict) -> None:
    """Refuse what restoring would cast or reshape silently, or refuse less clearly."""
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"also holds {', '.join(extra[:3])}"] if extra else []
        raise UserError(f"{where} is of another model or optimizer: it {' and '.join(parts)}")
    for name, (shape, dtype) in wanted.items():
        stored_shape, stored_dtype = stored[name]
        if stored_shape != shape:
            raise UserError(f"{where}: {name} has shape {stored_shape}, expected {shape}")
        if stored_dtype != dtype:
            raise UserError(f"{where}: {name} has dtype {stored_dtype}, expected {dtype}")


def _damaged(where: Any, error: BaseException) -> UserError:
    return UserError(
        f"{where} cannot be read ({_first_line(error)}); the checkpoint is damaged: remove the "
        f"folder {where.parent} to go on from the one before it"
    )


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}"
