"""Checks that need a process of their own: another number of devices, or a compiler that takes over the process it is in."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def needs_libtpu() -> None:
    """Skip visibly where the TPU's compiler is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install instructax[tpu]")


def passes(program: str, *arguments: str, timeout: int = 600, **environ: str) -> str:
    """A Python program, which finds what this one finds, ends by printing "passed"; returns its stderr."""
    found = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | found | environ,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("passed\n"), done.stdout + done.stderr
    return done.stderr
