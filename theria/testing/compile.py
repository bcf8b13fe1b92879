"""What the compiler makes of the fused kernels for a chip that need not be there.

    python -m theria.testing.compile 90 jvp hvp_dkv      # every configuration of these kernels for sm_90, one line each

Needs Triton, whose package brings the assembler, and no GPU. It must run in a process in which ``TRITON_INTERPRET`` is
not set, and changes that process for good: no kernel can be launched in it afterwards.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from theria.ops.triton.tile_table import TABLE
from theria.ops.triton.tiles import (
    DTYPES,
    ROWS_ONLY,
    VARIANT,
    WIDTHS,
    Key,
    Tile,
    covers,
    is_short,
    lookup,
    measured,
    override,
)
from theria.testing.kernels import RULES, Launch, launches, make_problem, name_of, short_sides
from theria.testing.sass import disassemble, lost_operands, told_by

KB = 1024
# The most that one program may have (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED_LIMITS = {80: 163 * KB, 86: 99 * KB, 87: 163 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}
HOPPER = 90
WGMMA_ROWS, WGMMA_WARPS = 64, 4  # the least that a product needs on each side of a warp group


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        name: of its function.
        arch: what it was compiled for.
        registers: per thread.
        stack: bytes per thread in local memory; these kernels have none unless registers are spilled.
        shared: bytes of shared memory per program.
        wgmma, mma: matrix instructions of Hopper's warp groups, and of warps.
        lost: left operands that the assembler overwrote in a loop, see NOTE [held operands] in `theria.testing.sass`.
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    lost: int = 0

    def faults(self, *, wgmma: bool = False) -> list[str]:
        """What forbids to use it; ``wgmma``: it should use Hopper's matrix units."""
        limit = SHARED_LIMITS[self.arch]
        found = []
        if self.stack:
            found.append(f"spills registers ({self.stack} bytes of stack)")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, sm_{self.arch} has {limit}")
        if wgmma and not self.wgmma:
            found.append("no wgmma")
        if self.lost:
            found.append(f"computes with {self.lost} overwritten registers")
        return found


class _Driver:
    """A Triton driver of a device that need not exist."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.arch, 10)


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile what a launch would run."""
    driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    tile = launch.tile
    most = {"maxnreg": tile.most} if tile.most else {}
    made: Any = launch.kernel.warmup(
        *launch.args, S=launch.static, num_warps=tile.warps, num_stages=tile.stages, grid=(launch.programs,), **most
    )
    usage, ptx = _usage(made.asm["cubin"]), made.asm["ptx"]
    return Compiled(
        name=name_of(launch),
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=made.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma=ptx.count("mma.sync"),
        lost=len(lost_operands(disassemble(made.asm["cubin"]))) if arch == HOPPER else 0,
    )


def compile_kernel(
    kernel: str,
    tile: Tile,
    arch: int,
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    causal: bool,
) -> list[Compiled]:
    """A kernel with one tile, for a call of shape (B, H, N, M, D, E); two of them where the tile is split."""
    problem = make_problem(shape, dtype, causal, "meta")
    with override(kernel.removesuffix(VARIANT), tile):
        found = launches(kernel, problem)
    if any(launch.tile.warps != tile.warps or launch.tile.stages != tile.stages for launch in found):
        raise ValueError(f"{kernel} is launched with {found[0].tile}, not with {tile}: it does not ask tiles.select")
    return [compile_launch(launch, arch) for launch in found]


def ought_to_use_wgmma(kernel: str, tile: Tile, dtype: torch.dtype, arch: int) -> bool:
    """Whether a kernel with this tile ought to run on Hopper's matrix units."""
    if arch != HOPPER or dtype == torch.float32 or tile.warps < WGMMA_WARPS or kernel in ROWS_ONLY:
        return False
    kept = tile.keys if is_short(kernel) or "dkv" in kernel else tile.rows
    return kept >= WGMMA_ROWS


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and the like of a binary's one kernel."""
    shown = told_by("cuobjdump", cubin, "-res-usage")
    line = next(line for line in shown.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


def shape_for(key: Key) -> tuple[int, int, int, int, int, int]:
    """(B, H, N, M, D, E) of a call that a key is for."""
    rows = key.keys or 4096
    return 4, 16, rows, rows, key.width, key.width


def edged(shape: tuple[int, int, int, int, int, int]) -> tuple[int, int, int, int, int, int]:
    """A shape like it that no tile divides, in rows, keys and widths."""
    B, H, N, M, D, E = shape
    return B, H, N - 1, M - 3, max(5 * D // 8, 1), max(3 * E // 8, 1)


def configurations(arch: int, kernels: Sequence[str] = tuple(RULES)) -> Iterator[Key]:
    """Every entry of the tile table for a chip, and what has the default tile there instead.

    Of the defaults, those that ask for most: causal calls, the variant with all tangents, and the fewest and the most
    keys of a short kernel.
    """
    yield from (Key(*key) for key in TABLE if key[4] == arch and key[0] in kernels)
    for kernel, width, kind in product(kernels, WIDTHS, DTYPES):
        if kernel + VARIANT in RULES or not covers(kernel, width, kind):
            continue
        if is_short(kernel):
            sides = short_sides(width, kind)
            keys = [Key(kernel, width, kind, False, arch, side) for side in sides if side in (sides[0], sides[-1])]
        else:
            keys = [Key(kernel, width, kind, kernel not in ROWS_ONLY, arch)]
        yield from (key for key in keys if not measured(key))


def check(key: Key) -> tuple[list[Compiled], list[str]]:
    """A configuration compiled, and what is wrong with it."""
    dtype, tile = DTYPES[key.kind], lookup(key)
    made = compile_kernel(key.kernel, tile, key.arch, shape_for(key), dtype, key.causal)
    if tile.held:  # the assembler has to hold them wherever tiles have edges, too
        made += compile_kernel(key.kernel, tile, key.arch, edged(shape_for(key)), dtype, key.causal)
    wgmma = ought_to_use_wgmma(key.kernel, tile, dtype, key.arch)
    return made, [fault for one in made for fault in one.faults(wgmma=wgmma)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", type=int, choices=SHARED_LIMITS)
    parser.add_argument("kernels", nargs="*", default=list(RULES), metavar="kernel", help=", ".join(RULES))
    args = parser.parse_args()
    bad = 0
    for key in configurations(args.arch, args.kernels):
        made, faults = check(key)
        bad += bool(faults)
        origin = "table" if measured(key) else "default"
        figures = " + ".join(f"{x.registers} registers, {x.shared} bytes, {x.wgmma} wgmma" for x in made)
        print(
            f"{'BAD ' if faults else 'ok  '}{origin} {tuple(key)} {tuple(lookup(key))}: {'; '.join(faults) or figures}",
            flush=True,
        )
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
