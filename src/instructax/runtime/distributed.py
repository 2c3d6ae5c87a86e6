"""One program, one or many processes.

All processes run the same Python on the same values and so come to the same device programs, in the
same order. What they could see differently, above all the disk, is looked at by the main process,
which tells the others (:func:`on_main`). The medium for everything large is the run's folder, which
all of them share.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructax.config import Config, UserError
from instructax.resolve import diff, dump, from_dict
from instructax.runtime.environment import code_version

T = TypeVar("T")

_MESSAGE_BYTES = 1024
_PATIENCE_MS = 7 * 24 * 3600 * 1000  # for one process at work; a dead one shows by its heartbeat
_VISIBLE_SECONDS = 60.0  # network file systems show new files late

_barriers = itertools.count()
_alone = False  # inside on_main: what is called there must not wait for the others


def initialize_if_needed() -> None:
    """Join the other processes where this one was launched as one of many; else do nothing.

    Must run before the first use of a device. Launched as one of many means: the three variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a TPU VM, a SLURM step of
    several tasks, or Open MPI, all of which JAX detects by itself. A peer that is silent for
    INSTRUCTAX_HEARTBEAT_SECONDS (default 100) counts as dead.

    Raises:
      UserError: some of the three variables are missing, or the other processes were not found.
    """
    if jax.distributed.is_initialized():
        return
    arguments = _explicit(os.environ)
    if not arguments and not _cluster(os.environ):
        return
    arguments |= _heartbeat(os.environ)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"could not join the other processes ({_first_line(error)}); start the same command "
            "on every machine of the job"
        ) from error


def _explicit(environ: Mapping[str, str]) -> dict[str, Any]:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not environ.get(name)]
    if len(missing) == len(names):
        return {}
    if missing:
        # The address alone is enough on a cluster, whose detection knows the rest.
        if missing == list(names[1:]) and _cluster(environ):
            return {}
        raise UserError(f"of {', '.join(names)}, {' and '.join(missing)} not set; set all or none")
    try:
        count, index = int(environ[names[1]]), int(environ[names[2]])
    except ValueError as error:
        raise UserError(f"{names[1]} and {names[2]} must be integers: {error}") from error
    return {"coordinator_address": environ[names[0]], "num_processes": count, "process_id": index}


def _heartbeat(environ: Mapping[str, str]) -> dict[str, int]:
    text = environ.get("INSTRUCTAX_HEARTBEAT_SECONDS", "")
    if not text:
        return {}
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"INSTRUCTAX_HEARTBEAT_SECONDS must be a number of seconds, got {text!r}")
    return {"heartbeat_timeout_seconds": int(text)}


def _cluster(environ: Mapping[str, str]) -> bool:
    platforms = environ.get("JAX_PLATFORMS", "")
    on_tpu = (
        importlib.util.find_spec("libtpu") is not None
        and (not platforms or "tpu" in platforms)
        and any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))
    )
    return (
        on_tpu
        # Set inside srun only: a batch script that runs the command without srun is one process.
        or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    )


def join(config: Config) -> None:
    """Join the other processes, if any; all must run the same code with the same config.

    Raises:
      UserError: on every process, saying which one has what instead; and as
        :func:`initialize_if_needed`.
    """
    initialize_if_needed()
    if not are_many():
        return
    agree("code", code_version())
    # Their values can be compared now that the fields are known to be the same.
    mine, main = dump(config), on_main(lambda: dump(config))
    changed = diff(from_dict(main), config)
    _refuse_all(", ".join(f"{path} = {_at(mine, path)}, not {_at(main, path)}" for path in changed))


def are_many() -> bool:
    """Whether this is one of several processes; touches no device where it was started alone."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_main() -> bool:
    """Whether this process writes the files that exist once a run."""
    return not are_many() or jax.process_index() == 0


def on_main(work: Callable[[], T]) -> T:
    """``work()`` done by the main process alone; its result, which must be JSON, goes to all.

    Every process must come here. Whatever ``work`` writes is whole when the others go on. Inside
    it, further calls of on_main are plain calls.

    Raises:
      UserError: on every process, where ``work`` raised it.
      RuntimeError: on the others, where ``work`` raised anything else, which the main one raises.
    """
    global _alone
    if _alone or not are_many():
        return work()
    error: BaseException | None = None
    said = ""
    if is_main():
        _alone = True
        try:
            said = json.dumps({"value": work()})
        except UserError as refused:
            said = json.dumps({"refused": str(refused)})
        except BaseException as failed:  # noqa: BLE001 - raised below, when the others know
            error, said = failed, json.dumps({"failed": _first_line(failed)})
        finally:
            _alone = False
    _barrier()
    answer = json.loads(_from_main(said))
    if error is not None:
        raise error
    if "refused" in answer:
        raise UserError(answer["refused"])
    if "failed" in answer:
        raise RuntimeError(f"process 0 failed: {answer['failed']}")
    return answer["value"]


def agree(what: str, text: str) -> None:
    """A barrier that all processes pass only with the same ``text``; ``what`` is what it stands for.

    Raises:
      UserError: on every process, naming those that differ from process 0.
    """
    if not are_many():
        return
    digest = hashlib.sha256(text.encode()).hexdigest()
    same = digest == on_main(lambda: digest)
    shown = text if len(text) <= 60 else digest[:12]
    _refuse_all("" if same else f"other {what}, {shown}")


def wait_for(path: Any) -> None:
    """Return when this process, too, sees a file that the main one has written; or after a minute.

    Raises nothing: who then misses the file says so in its own words.
    """
    if is_main():
        return
    until = time.monotonic() + _VISIBLE_SECONDS
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)


def all_see(folder: Path, name: str) -> None:
    """A barrier that all processes pass only if they see a file that the main one has written.

    Raises:
      UserError: on every process.
    """
    if not are_many():
        return
    wait_for(folder / name)
    blind = [i for i, text in enumerate(_said("" if (folder / name).exists() else "-")) if text]
    if blind:
        raise UserError(
            f"processes {blind} do not see {name} in {folder}, where process 0 has written it; "
            "machines must share the folder of their run, --run-dir"
        )


def _at(plain: Any, path: str) -> str:
    for name in path.split("."):
        plain = plain[name]
    text = json.dumps(plain)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_all(mine: str) -> None:
    """Raise UserError on every process if any of them, the main one aside, has something to say."""
    said = _said(mine)
    different = [index for index, text in enumerate(said) if text]
    if different:
        raise UserError(
            f"processes {different} differ from process 0 (process {different[0]} has "
            f"{said[different[0]]}); start the same command with the same files everywhere"
        )


def _said(mine: str) -> list[str]:
    """The short texts of all processes."""
    return [_text(row) for row in np.asarray(multihost_utils.process_allgather(_bytes(mine)))]


def _barrier() -> None:
    # Not a collective of the devices: those give up, or burn power, while one process works long.
    from orbax.checkpoint import multihost

    wait = multihost.get_barrier_sync_fn()
    assert wait is not None, "asked for among many processes only"
    wait(key=f"instructax/{next(_barriers)}", timeout_ms=_PATIENCE_MS)


def _from_main(text: str) -> str:
    """The main process's text; short ones travel at once, longer ones are announced."""
    raw = text.encode()
    head = np.asarray([len(raw)], np.int32)
    first = _bytes(text) if len(raw) <= _MESSAGE_BYTES else np.zeros(_MESSAGE_BYTES, np.uint8)
    head, first = multihost_utils.broadcast_one_to_all((head, first))
    size = int(head[0])
    if size <= _MESSAGE_BYTES:
        return bytes(np.asarray(first)[:size]).decode()
    # Lengths are rounded up, so that few programs are compiled.
    room = _MESSAGE_BYTES << (-(-size // _MESSAGE_BYTES) - 1).bit_length()
    whole = np.zeros(room, np.uint8)
    if is_main():
        whole[:size] = np.frombuffer(raw, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(whole))[:size]).decode()


def _bytes(text: str) -> np.ndarray:
    raw = np.frombuffer(text.encode()[:_MESSAGE_BYTES], np.uint8)
    return np.pad(raw, (0, _MESSAGE_BYTES - raw.size))


def _text(row: np.ndarray) -> str:
    return bytes(row).rstrip(b"\0").decode(errors="ignore")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
