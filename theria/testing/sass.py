"""What the assembler made of the operands that Hopper's matrix unit takes from registers.

NOTE [held operands]. A left operand that a loop does not change may stay in registers (the field ``held`` of a tile).
ptxas 12.8 sometimes gives the same registers to the other left operand of the loop, P, and never restores the first
one: from the second iteration on Q is gone, and the result is wrong without an error. The PTX is right. So the machine
code is looked at: within a loop, no left operand may be what arithmetic made for another product before.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PRODUCT = "HGMMA"
ARITHMETIC = ("F2FP", "FMUL", "FADD", "FFMA", "HADD2", "HMUL2", "HFMA2")  # what makes an operand of numbers
OPERAND = 4  # registers of the left operand of one instruction
WIDTHS = {".64": 2, ".128": 4, ".WIDE": 2}


def told_by(tool: str, cubin: bytes, *arguments: str) -> str:
    """What one of the tools that Triton brings says of a kernel's binary."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), *arguments, file.name], check=True, capture_output=True, text=True).stdout


def disassemble(cubin: bytes) -> list[str]:
    """The lines of a kernel's machine code, labels among them."""
    return told_by("nvdisasm", cubin, "-c").splitlines()


def lost_operands(lines: list[str]) -> list[str]:
    """The products of a loop whose left operand was made for another product of it, see NOTE [held operands]."""
    return [found for body in _loops(lines) for found in _lost(body)]


def _lost(body: list[str]) -> Iterator[str]:
    """Registers of left operands that arithmetic wrote in the iteration before, for another product that used them."""
    operands = [_left_operand(op) for op in body]
    writes = [_written(op) for op in body]
    for i, own in enumerate(operands):
        for register in own:
            if any(register in written for written in writes[:i]):
                continue  # made in this iteration
            last = next((j for j in range(len(body) - 1, i, -1) if register in writes[j]), None)
            if last is None or not _name(body[last]).startswith(ARITHMETIC):
                continue
            if any(register in operand for operand in operands[last + 1 :] + operands[:i]):
                yield f"{body[i]} reads R{register}, which {body[last]} made for another product"


def _loops(lines: list[str]) -> Iterator[list[str]]:
    """The instructions from each label to the last branch back to it, where there are products."""
    ops: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(ops)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            ops.append(instruction[1])
    for i, op in enumerate(ops):
        target = re.search(r"BRA\S* `\((\.L_x_\d+)\)", op)
        start = labels.get(target[1], i + 1) if target else i + 1
        if start <= i and any(PRODUCT in x for x in ops[start:i]):
            yield ops[start : i + 1]


def _name(op: str) -> str:
    return re.sub(r"^@\S+\s+", "", op)


def _left_operand(op: str) -> range:
    """The registers that a product takes its left operand from; none where it is in shared memory."""
    found = re.match(rf"{PRODUCT}\S* R\d+, R(\d+), gdesc", _name(op))
    return range(int(found[1]), int(found[1]) + OPERAND) if found else range(0)


def _written(op: str) -> range:
    """The registers that an instruction writes: those of its first operand, if it is one."""
    found = re.match(r"(\S+)\s+(?:P\d+, )*R(\d+)", _name(op))
    if not found or found[1].startswith(("ST", "RED", "LDGSTS")):
        return range(0)
    if columns := re.match(rf"{PRODUCT}\.64x(\d+)x", found[1]):
        count = int(columns[1]) // 2
    elif found[1].startswith("LDSM"):
        count = int((re.search(r"\.(\d)$", found[1]) or [0, 1])[1])
    else:
        count = max((n for suffix, n in WIDTHS.items() if suffix in found[1]), default=1)
    return range(int(found[2]), int(found[2]) + count)
