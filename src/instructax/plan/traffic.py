"""How many bytes of HBM an instruction of compiled text reads and writes."""

from __future__ import annotations

from instructax.plan.hlo import Computation, Instruction, Module

_NO_TRAFFIC = (
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "iota",
)  # fmt: skip
_READS = ("dynamic-slice", "gather", "slice")


def hbm_bytes(instruction: Instruction, within: Computation, module: Module) -> float:
    """What an instruction reads from and writes to HBM; of what it only slices, the slices."""
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
        return 0.0
    if opcode in ("copy-start", "slice-start"):
        # What is copied, and not the number by which it is awaited; a copied scalar is nothing.
        return float(min((s.nbytes for s in instruction.shapes if s.nbytes > 4), default=0))
    written = float(sum(s.nbytes for s in instruction.shapes if not s.fast))
    read = 0.0
    fused = module.computations.get(instruction.attribute("calls") or "")
    if opcode == "dynamic-update-slice":
        update = within.instructions.get(instruction.operands[1])
        return 2.0 * sum(s.nbytes for s in update.shapes) if update else 0.0
    if opcode in _READS:
        return 2.0 * written
    for index, name in enumerate(instruction.operands):
        operand = within.instructions.get(name)
        if operand is None or any(s.fast for s in operand.shapes[:1]):
            continue
        whole = sum(s.nbytes for s in operand.shapes)
        if fused is None:
            read += whole
        else:
            read += min(whole, _read_of_parameter(fused, index, whole, module)[0])
    if opcode == "fusion" and fused is not None:
        written = _written(fused, written)
    return read + written


def of_cache_look(instruction: Instruction, within: Computation, slots_read: float) -> float:
    """What our look at a cache reads and writes: query and result whole, of all that has slots those that it reads."""
    operands = [within.instructions[name].shapes[0] for name in instruction.operands]
    slots = operands[3].dims[2]  # counts, blocks, query, keys
    moved = float(sum(shape.nbytes for shape in instruction.shapes))
    for index, shape in enumerate(operands):
        moved += shape.nbytes * (slots_read / slots if index > 2 else 1.0)
    return moved


def _read_of_parameter(
    fused: Computation, index: int, whole: float, module: Module
) -> tuple[float, bool]:
    """Bytes read of a fusion's operand, those of its slices where nothing else looks at it, and whether it is the result."""
    parameter = next(
        (
            i
            for i in fused.instructions.values()
            if i.opcode == "parameter" and i.literal == str(index)
        ),
        None,
    )
    if parameter is None:
        return whole, False
    names, total = {parameter.name}, 0.0
    for instruction in fused.instructions.values():
        used = names & set(instruction.operands)
        if not used:
            continue
        if instruction.opcode in ("bitcast", "reshape"):
            names.add(instruction.name)
        elif instruction.opcode in _READS and instruction.operands[0] in names:
            total += sum(s.nbytes for s in instruction.shapes)
        elif instruction.opcode == "dynamic-update-slice" and instruction.operands[0] in names:
            names.add(instruction.name)  # updated in place; what reads the result reads the rest
        elif instruction.opcode == "tuple":
            continue
        elif instruction.opcode == "fusion":
            inner = module.computations[instruction.attribute("calls") or ""]
            for position, name in enumerate(instruction.operands):
                if name in names:
                    nbytes, is_result = _read_of_parameter(inner, position, whole, module)
                    total += nbytes
                    names |= {instruction.name} if is_result else set()
        else:
            return whole, False
    return total, fused.root.name in names


def _written(fused: Computation, whole: float) -> float:
    """Bytes a fusion writes: an update in place writes the update alone."""
    results = [fused.root]
    if fused.root.opcode == "tuple":
        results = [fused.instructions[name] for name in fused.root.operands]
    for result in results:
        while result.opcode == "bitcast" and result.operands[0] in fused.instructions:
            result = fused.instructions[result.operands[0]]
        update = result.operands[1:2] if result.opcode == "dynamic-update-slice" else ()
        for name in update:
            part = sum(s.nbytes for s in fused.instructions[name].shapes)
            whole -= sum(s.nbytes for s in result.shapes if not s.fast) - part
    return max(0.0, whole)
