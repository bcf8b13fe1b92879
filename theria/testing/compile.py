"""What the compiler makes of the fused kernels for a chip that need not be there.

Needs Triton, whose package brings the assembler, and no GPU. It must run in a process in which ``TRITON_INTERPRET`` is
not set, and changes that process for good: no kernel can be launched in it afterwards.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from theria.ops.triton.tiles import ROWS_ONLY, VARIANT, Tile, is_short, override
from theria.testing.kernels import Launch, launches, make_problem, name_of

KB = 1024
# The most that one program may have (CUDA C++ Programming Guide, technical specifications per compute capability).
SHARED_LIMITS = {80: 163 * KB, 86: 99 * KB, 87: 163 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 120: 99 * KB}
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
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int

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
    made: Any = launch.kernel.warmup(
        *launch.args,
        S=launch.static,
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
        grid=(launch.programs,),
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
    if arch != 90 or dtype == torch.float32 or tile.warps < WGMMA_WARPS or kernel in ROWS_ONLY:
        return False
    kept = min(tile.rows, tile.keys) if is_short(kernel) else tile.keys if "dkv" in kernel else tile.rows
    return kept >= WGMMA_ROWS


def _usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and the like of a binary's one kernel, by the tool that Triton brings."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    line = next(line for line in shown.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
