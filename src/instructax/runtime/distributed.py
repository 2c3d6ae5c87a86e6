"""One program, one or many processes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from instructax.config import UserError


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


def is_main() -> bool:
    """Whether this process writes the files that exist once a run."""
    return jax.process_index() == 0


def agree(text: str) -> None:
    """A barrier that all processes pass only with the same ``text`` (a config, a data hash).

    Raises:
      UserError: on every process, naming those that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(digest)).reshape(-1, digest.size)
    different = np.flatnonzero((gathered != gathered[0]).any(axis=1))
    if different.size:
        shown = text if len(text) <= 200 else text[:200] + "..."
        raise UserError(
            f"processes {different.tolist()} differ from process 0; start the same command with "
            f"the same files everywhere (process {jax.process_index()} has: {shown})"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
