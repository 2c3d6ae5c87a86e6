"""The devices that a plan is for: a TPU slice that is only described, or what is at hand."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence

import jax

from instructax.config import UserError
from instructax.plan.chips import CHIPS

LOCAL = "local"
_FORM = re.compile(r"([a-z0-9]+):(\d+(?:x\d+)*)")


def parse(text: str) -> tuple[str, tuple[int, ...]]:
    """("v5p", (8, 8, 8)) of ``v5p:8x8x8``.

    Raises:
      UserError: another form, a chip that is not in the table or no TPU, or a slice of the wrong
        number of dimensions.
    """
    tpus = {name: chip for name, chip in CHIPS.items() if chip.torus}
    match = _FORM.fullmatch(text)
    if match is None or match[1] not in tpus:
        raise UserError(
            f"--topology {text}: is no topology; write local, or CHIP:AxB with CHIP one of "
            f"{', '.join(tpus)}, for example v5p:4x4x8 or v6e:16x16"
        )
    name, sizes = match[1], tuple(map(int, match[2].split("x")))
    wanted = tpus[name].torus
    if len(sizes) != wanted or 0 in sizes:
        example = "x".join("4" * wanted)
        raise UserError(
            f"--topology {text}: a slice of {name} has {wanted} sizes of at least 1; "
            f"write for example {name}:{example}"
        )
    return name, sizes


def devices(text: str) -> Sequence[jax.Device]:
    """What ``--topology`` names: ``local`` is jax.devices(), else as many described TPU chips.

    Raises:
      UserError: a bad name, libtpu is missing, or the compiler knows no such slice.
    """
    if text == LOCAL:
        return jax.devices()
    name, sizes = parse(text)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {text}: compiling for a TPU needs the package libtpu; "
            "install it with `pip install instructax[tpu]`"
        )
    # Nothing is asked of the cloud's metadata server, and no real TPU of this host is taken.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # libtpu locks the machine for one process; it need not for what only compiles.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Its warnings, which it keeps to itself otherwise, are read for arrays that are gathered whole.
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    from jax.experimental import topologies

    try:
        with quiet():
            # The two cores of a v4 are one device, as its runtime has them.
            more = {"chip_config_name": "megacore"} if name == "v4" else {}
            shape = "x".join(map(str, sizes))
            described = topologies.get_topology_desc(f"{name}:{shape}", "tpu", **more)
    except Exception as error:
        # Whatever libtpu raises, it knows no such slice.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology {text}: the TPU compiler refuses it ({reason}); try a slice that can be rented"
        ) from error
    found = described.devices
    if len(found) != math.prod(sizes):
        raise UserError(
            f"--topology {text}: has {len(found)} devices, {math.prod(sizes)} were meant; "
            "this chip is not one device each"
        )
    return found


@contextlib.contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep what C++ writes to stderr off the screen; its lines are in the list after the block."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as caught:
        saved = os.dup(2)
        try:
            os.dup2(caught.fileno(), 2)
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            lines += caught.read().decode("utf-8", "replace").splitlines()
