"""Where a run ran: what belongs beside its figures, and no path of the machine."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import instructax

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "sentencepiece",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Versions, devices, processor count, sources and arguments, ready for JSON.

    ``git`` is null where the package is installed; ``sources`` tells what it was made of all the same.
    """
    devices = jax.devices()
    return {
        "instructax": instructax.__version__,
        "sources": sources_hash(),
        "git": _git_commit(),
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": {"count": len(devices), "kind": devices[0].device_kind},
        "processes": jax.process_count(),
    }


@functools.cache
def sources_hash() -> str:
    """Twelve digits of the SHA-256 of the package's files and their names: equal in a checkout and installed."""
    digest = hashlib.sha256()
    folder = Path(instructax.__file__).parent
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.j2")]):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


@functools.cache
def code_version() -> str:
    """The package's version with a hash of its sources and of the versions of what it stands on."""
    versions = [sources_hash(), *(_version(name) for name in _PACKAGES)]
    return f"{instructax.__version__} {hashlib.sha256(repr(versions).encode()).hexdigest()[:12]}"


def peak_rss_bytes(workers: int = 1) -> int:
    """The largest resident memory so far, of this process or of any child that has ended.

    Where ``workers`` children ran at a time, at most so much: this process and the largest child,
    so many times.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    if workers > 1:
        return _own_peak(unit) + workers * children
    return max(_own_peak(unit), children)


def enable_compile_cache(folder: Any) -> None:
    """Keep compiled programs in ``folder``, so that a second run starts sooner."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _own_peak(unit: int) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss survives exec, and so counts the parent that this process was forked from.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the sources, "+" appended where they were changed; None outside a checkout."""
    folder = Path(instructax.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        # An installed package may lie inside the repository of something else.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
