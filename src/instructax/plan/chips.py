"""Published figures of accelerators, one table, and the CPU at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass

import jax

from instructax.config import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator. Bandwidths are bytes a second and one way, peaks are dense bfloat16."""

    name: str
    hbm_bytes: int
    """Published memory."""
    reserved_bytes: int
    """Of it, what the TPU compiler says is not available to programs and data."""
    peak_flops: float
    """FLOP/s of bfloat16 products with float32 sums."""
    hbm_bandwidth: float
    link_bandwidth: float
    """One way, of one link."""
    links: int
    """Links of a chip: 6 in a 3-D torus, 4 in a 2-D one; 1 stands for a switched network."""
    torus: int
    """Dimensions of the torus; 0 where a switch connects all chips."""
    wraps_at: int
    """A dimension of the slice closes to a ring where its size is a multiple of this."""
    clock: float | None
    """Hertz that the compiler's cycles are of (peak / FLOPs of all matrix units a cycle); None: it gives none."""
    source: str

    @property
    def usable_bytes(self) -> int:
        return self.hbm_bytes - self.reserved_bytes

    def __post_init__(self):
        if self.links < 1 or min(self.peak_flops, self.hbm_bandwidth, self.link_bandwidth) <= 0:
            raise ValueError(f"{self.name}: links, peaks and bandwidths must be positive")


# Cloud TPU's pages give the interconnect of a chip as the sum over its links and both directions (v5p 1200 GB/s,
# v6e 800, v5e 400) or over its links one way (v5p 4800 Gbit/s, v4 2400); both come to the same per link.
_CLOUD = "docs.cloud.google.com/tpu/docs/"
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v4", 32 * GIB, 0, 275e12, 1228e9, 50e9, 6, 3, 4, 1.05e9, _CLOUD + "v4"),
        Chip("v5e", 16 * GIB, GIB // 4, 197e12, 819e9, 50e9, 4, 2, 16, 1.5e9, _CLOUD + "v5e"),
        Chip("v5p", 95 * GIB, 0, 459e12, 2765e9, 100e9, 6, 3, 4, 1.75e9, _CLOUD + "v5p"),
        Chip("v6e", 32 * GIB, 3 * GIB // 4, 918e12, 1640e9, 100e9, 4, 2, 16, 1.75e9, _CLOUD + "v6e"),
        Chip(
            "A100", 80 * 10**9, 0, 312e12, 2039e9, 300e9, 1, 0, 1, None,
            "NVIDIA A100 80GB SXM data sheet: NVLink 600 GB/s both ways",
        ),
        Chip(
            "H100", 80 * 10**9, 0, 989e12, 3350e9, 450e9, 1, 0, 1, None,
            "NVIDIA H100 SXM data sheet: NVLink 900 GB/s both ways; FLOP/s without sparsity",
        ),
        Chip(
            "H200", 141 * 10**9, 0, 989e12, 4800e9, 450e9, 1, 0, 1, None,
            "NVIDIA H200 SXM data sheet: NVLink 900 GB/s both ways; FLOP/s without sparsity",
        ),
    )
}  # fmt: skip

# What jax calls them.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def cpu() -> Chip:
    """The CPU at hand. Its memory is the machine's, the rest is a round guess, so that a plan has an order of size."""
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Two 8-lane float32 multiply-adds a cycle at 2.5 GHz, and 10 GB/s of memory a core.
    return Chip("cpu", memory, 0, cores * 80e9, cores * 10e9, 10e9, 1, 0, 1, None, "a guess")


def chip_of(device: jax.Device) -> Chip:
    """The row of the table for a device that jax has found or a topology describes.

    Raises:
      UserError: a kind of device that the table lacks.
    """
    if device.platform == "cpu":
        return cpu()
    kind = device.device_kind
    if kind in _KINDS:
        return CHIPS[_KINDS[kind]]
    for name, chip in CHIPS.items():
        if chip.torus == 0 and name in kind:
            return chip
    raise UserError(
        f"no published figures for {kind!r} in instructax.plan.chips; known: {', '.join(CHIPS)}; "
        "add a row"
    )
