"""Compiled HLO text -> computations and instructions, with shapes, loops' trip counts and FLOPs of products.

The compiler's own cost analysis counts the body of a loop once; here every instruction can be
counted as often as it runs.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field

BYTES = {
    "pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1,
    "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
"""Bytes of an element; what is not here (tokens, opaque values) has none."""

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_BROKEN_LINE = re.compile(r"(kernel_metadata=\{)\n(.*)\n(\})")
# Products of blocks of scores in a flash kernel: q k and p v; going back, the scores again, and what leads to
# dq, or to dk and dv.
_FLASH = {"fwd": 2, "dq": 3, "dkv": 4}
_NEVER = 2**62  # the compiler's "no estimate"


@dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    fast: bool
    """In the chip's fast memory (memory space 1), not in HBM."""

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        return BYTES.get(self.dtype, 0) * self.size


@dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Its result's; several for a tuple, flattened."""
    operands: tuple[str, ...]
    attributes: str
    literal: str
    """What stands in the parentheses: the value of a constant, the number of a parameter."""
    root: bool

    @functools.cached_property
    def cycles(self) -> int:
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        cycles = int(match[1]) if match else 0
        return cycles if cycles < _NEVER else 0

    def attribute(self, key: str) -> str | None:
        """What stands behind ``key=``: a number, or the name of a computation."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    @property
    def chain(self) -> str:
        """What the pieces of one collective have in common; empty where it is in one piece."""
        match = re.search(r'chain_id="(\d+)"', self.attributes)
        return match[1] if match else ""

    @property
    def op_name(self) -> str:
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)


@dataclass
class Module:
    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction) -> int | None:
        """How often a while's body runs: as the compiler has noted, or as its condition ``i < n`` says."""
        noted = re.search(r'known_trip_count[^}]*?"?n"?\s*:\s*"?(\d+)', loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.attribute("condition") or ""]
        root = condition.root
        if root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        parts = [condition.instructions[name] for name in root.operands]
        bounds = [int(i.literal) for i in parts if i.opcode == "constant" and i.literal.isdecimal()]
        counters = [i for i in parts if i.opcode == "get-tuple-element"]
        if len(bounds) != 1 or len(counters) != 1:
            return None
        stride = self._stride(loop, int(counters[0].attribute("index") or 0))
        return None if stride is None else math.ceil(bounds[0] / stride)

    def _stride(self, loop: Instruction, index: int) -> int | None:
        """What a turn adds to the element of the carry that counts: 2 where the compiler has unrolled twice."""
        body = self.computations[loop.attribute("body") or ""]
        if body.root.opcode != "tuple":
            return None
        at, stride = body.instructions[body.root.operands[index]], 0
        while at.opcode != "get-tuple-element":
            parts = [body.instructions[name] for name in at.operands]
            if at.opcode == "add":
                added = [i for i in parts if i.opcode == "constant" and i.literal.isdecimal()]
                parts = [i for i in parts if i.opcode != "constant"]
                stride += sum(int(i.literal) for i in added)
            elif at.opcode not in ("copy", "bitcast"):
                return None
            if len(parts) != 1:
                return None
            at = parts[0]
        return stride or None


def parse(text: str) -> Module:
    """Raises ValueError where the text has no entry computation."""
    text = _BROKEN_LINE.sub(r"\1\2\3", text)
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if (header := _HEADER.match(line)) is not None:
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)) is not None:
            instruction = _instruction(match[2], match[3], bool(match[1]))
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("text is no compiled HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=name,
        opcode=rest[:opening],
        shapes=tuple(_shapes(kind)),
        operands=tuple(_NAME.findall(inside)),
        attributes=rest[closing + 1 :],
        literal=inside,
        root=root,
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _shapes(text: str) -> list[Shape]:
    return [
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(text)
    ]


def product_flops(instruction: Instruction, within: Computation) -> float:
    """FLOPs of a dot, a convolution, a call of a matrix library or a flash kernel: 2 for each multiply-add."""
    if instruction.opcode == "dot":
        return _dot_flops(instruction, within, r"lhs_contracting_dims=\{([\d,]*)\}")
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, within)
    if instruction.opcode == "custom-call" and re.search(r"gemm|matmul", instruction.attributes):
        return _dot_flops(instruction, within, r'lhs_contracting_dimensions":\[([\d",]*)\]')
    if is_flash(instruction):
        return _flash_flops(instruction, within)
    return 0.0


def is_flash(instruction: Instruction) -> bool:
    """Whether it is one of the kernels that :mod:`instructax.models.flash` calls."""
    return instruction.opcode == "custom-call" and "flash_pairs_" in instruction.op_name


_CACHE_LOOK = re.compile(r"cache_reach_(\d+)_block_(\d+)")


def is_cache_look(instruction: Instruction) -> bool:
    """Whether it is the kernel of :mod:`instructax.models.decoding_kernel`."""
    return instruction.opcode == "custom-call" and bool(_CACHE_LOOK.search(instruction.op_name))


def is_kernel(instruction: Instruction) -> bool:
    """Whether it is a kernel of ours, of which the compiler says nothing."""
    return is_flash(instruction) or is_cache_look(instruction)


def cache_slots_read(instruction: Instruction, first: int, last: int) -> float:
    """Slots that a look at a cache reads of each row, of one that fills from ``first`` to ``last`` slots, in the mean."""
    found = _CACHE_LOOK.search(instruction.op_name)
    assert found is not None
    reach, size = map(int, found.groups())
    blocks = [(n - 1) // size - max(0, n - reach) // size + 1 for n in range(first, last + 1)]
    return size * sum(blocks) / len(blocks)


def _flash_flops(instruction: Instruction, within: Computation) -> float:
    pairs = re.search(r"flash_pairs_(\d+)", instruction.op_name)
    phase = re.search(r"splash_m[hq]a_(fwd|dq|dkv)", instruction.op_name)
    query = _operand(instruction, 2, within)
    if pairs is None or phase is None or query is None:
        return 0.0
    *heads, _, width = query.dims  # of each row, where a chip has more than one
    return 2.0 * _FLASH[phase[1]] * int(pairs[1]) * math.prod(heads) * width


def _operand(instruction: Instruction, index: int, within: Computation) -> Shape | None:
    if index >= len(instruction.operands):
        return None
    found = within.instructions.get(instruction.operands[index])
    return found.shapes[0] if found is not None and found.shapes else None


def _dot_flops(instruction: Instruction, within: Computation, dims: str) -> float:
    lhs, match = _operand(instruction, 0, within), re.search(dims, instruction.attributes)
    if lhs is None or match is None:
        return 0.0
    contracted = [int(d) for d in match[1].replace('"', "").split(",") if d]
    return 2.0 * instruction.shapes[0].size * math.prod(lhs.dims[d] for d in contracted)


def _convolution_flops(instruction: Instruction, within: Computation) -> float:
    """TPU compilers write every product as a convolution whose batch axes are spatial ones.

    So only pairs of an output place and a window tap that meet an input element count.
    """
    lhs, rhs = (_operand(instruction, i, within) for i in (0, 1))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if lhs is None or rhs is None or labels is None:
        return 0.0
    of_lhs, of_rhs, of_out = labels[1], labels[2], labels[3]
    out = instruction.shapes[0].dims
    flops = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * rhs.dims[of_rhs.index("i")]
    window = _window(instruction.attributes)
    for d in range(len(of_out) - 2):
        place = str(d)
        flops *= _meetings(
            base=lhs.dims[of_lhs.index(place)],
            out=out[of_out.index(place)],
            size=int(window.get("size", {}).get(d, 1)),
            stride=int(window.get("stride", {}).get(d, 1)),
            low=int(str(window.get("pad", {}).get(d, "0_0")).split("_")[0]),
            base_dilation=int(window.get("lhs_dilate", {}).get(d, 1)),
            tap_dilation=int(window.get("rhs_dilate", {}).get(d, 1)),
        )
    return flops


def _window(attributes: str) -> dict[str, dict[int, str]]:
    match = re.search(r"window=\{([^}]*)\}", attributes)
    fields = match[1].split() if match else ()
    return {
        key: dict(enumerate(value.split("x")))
        for key, _, value in (field.partition("=") for field in fields)
    }


@functools.cache
def _meetings(
    base: int, out: int, size: int, stride: int, low: int, base_dilation: int, tap_dilation: int
) -> int:
    if size == 1 and stride == 1 and base_dilation == 1 and low == 0:
        return min(out, base)
    dilated = (base - 1) * base_dilation + 1
    places = (o * stride + k * tap_dilation - low for o in range(out) for k in range(size))
    return sum(1 for at in places if 0 <= at < dilated and at % base_dilation == 0)


def group(instruction: Instruction, devices: int) -> tuple[int, ...]:
    """The first group of device numbers among which a collective moves data."""
    text = instruction.attributes
    if (match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text)) is not None:
        return _mesh_group(match[1], match[2], text)
    if (match := re.search(r"replica_groups=\{\{([\d,]+)\}", text)) is not None:
        return tuple(map(int, match[1].split(",")))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota is not None:
        numbers = _iota(iota[3], iota[4])
        return tuple(numbers[: int(iota[2])])
    if (match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text)) is not None:
        return int(match[1]), int(match[2])
    return tuple(range(devices))


def _mesh_group(axes: str, over: str, text: str) -> tuple[int, ...]:
    """``mesh['a'=4,'b'=2] {'a'}``: the devices that differ in the axes named last, all else 0."""
    names = re.findall(r"'([^']+)'=(\d+)", axes)
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", text)
    sizes = [int(size) for _, size in names]
    numbers = list(range(math.prod(sizes))) if order is None else _iota(order[1], order[2])
    chosen = set(re.findall(r"'([^']+)'", over))
    found = [0]
    stride = math.prod(sizes)
    for (name, _), size in zip(names, sizes, strict=True):
        stride //= size
        if name in chosen:
            found = [at + i * stride for at in found for i in range(size)]
    return tuple(numbers[at] for at in found)


def _iota(dims: str, permutation: str | None) -> list[int]:
    """0..n-1 in ``dims``, its axes permuted, flattened."""
    sizes = [int(d) for d in dims.split(",")]
    if permutation is None:
        return list(range(math.prod(sizes)))
    order = [int(p) for p in permutation.split(",")]
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    numbers = [0]
    for axis in order:
        numbers = [n + i * strides[axis] for n in numbers for i in range(sizes[axis])]
    return numbers
