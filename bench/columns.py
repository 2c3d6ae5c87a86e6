"""The environment of each column's processes, and where their Python is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Names that change how fast a side runs: every column starts without them.
CLEARED = ("GLIBC_TUNABLES", "LD_PRELOAD", "XLA_FLAGS", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS")

# The allocator keeps its pages, as launch/flags/cpu.env tells it for our side.
KEPT_PAGES = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
)
# MKL takes its fast kernels on any make of processor.
ANY_PROCESSOR = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


@dataclass(frozen=True)
class Column:
    python: Path
    environment: dict[str, str]


def flags(platform: str) -> dict[str, str]:
    """launch/flags/PLATFORM.env as the launchers apply it to an environment that sets none of its names."""
    found: dict[str, str] = {}
    for line in (ROOT / "launch" / "flags" / f"{platform}.env").read_text("utf-8").splitlines():
        match = re.fullmatch(r"([A-Z][A-Z0-9_]*)(\+?)=(.*)", line)
        if match:
            name, more, value = match.groups()
            found[name] = f"{found[name]} {value}" if more and name in found else value
    return found


def preloaded(folder: Path) -> Path:
    """A library of one function that MKL asks (and no processor of Intel's needs); compiled once."""
    library = folder / "any_processor.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-x", "c", "-o", str(library), "-"],
            input=ANY_PROCESSOR,
            text=True,
            check=True,
        )
    return library


def make(peers: Path, device: str, cache: Path) -> dict[str, Column]:
    """Column name -> its Python and environment. ``cache`` takes compiled things."""
    clean = {name: value for name, value in os.environ.items() if name not in CLEARED}
    clean |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    ours = (
        clean
        | flags(device)
        | {
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        }
    )
    tuned = dict(clean)
    if device == "cpu":
        # A device for each core, rows divided among them: what is too small for all cores runs on each.
        ours["JAX_NUM_CPU_DEVICES"] = str(len(os.sched_getaffinity(0)))
        tuned["GLIBC_TUNABLES"] = KEPT_PAGES
        if shutil.which("cc"):
            tuned["LD_PRELOAD"] = str(preloaded(cache))
        else:
            missing = "no C compiler (cc): the tuned peers keep MKL's own choice of kernels"
            print(f"bench: {missing}; install one to compare fairly", file=sys.stderr)
    return {
        "shipped": Column(peers, clean),
        "tuned": Column(peers, tuned),
        "compiled": Column(peers, tuned),
        "ours": Column(Path(sys.executable), ours),
    }
