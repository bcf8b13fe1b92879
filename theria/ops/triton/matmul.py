"""Matrix products of float32 tensors at the rate of half precision: ``theria::matmul``, whole to a compiler.

Tiles of both operands are read once and split in registers; a product is three of their fp16 parts, with float32's
accuracy (:mod:`theria.ops.triton.products` has the derivation). Each row of a left tile and each column of a right one
has its own factor, for each block of the sum anew, so that what is small beside other rows loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from theria.ops.transforms import differentiated
from theria.ops.triton.products import OPERAND, split
from theria.ops.triton.tensors import constexpr, device
from theria.ops.triton.tiles import architecture

MAX_STRIDE = 2**23  # offsets inside a tile of 64 by 128 elements are 32-bit up to here


class Tile(NamedTuple):
    """What one program computes (rows by columns), and how much of the sum at a time (depth)."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# The fastest of eight at every shape measured on an H200 (128 to 1600 rows, widths 128 to 512, 16 products): two thirds
# of cuBLAS's time, which computes float32 outside the matrix units.
DEEP = Tile(64, 64, 128, 4, 1)
# What compiles without spilling registers elsewhere: on other chips and for short sums; where rows cannot be read 16
# bytes at a time, every element needs an address and a mask of its own.
SHALLOW = DEEP._replace(depth=64)
ROUGH = DEEP._replace(depth=32)
HOPPER = 90


@dataclass(frozen=True)
class Static:
    """What makes another kernel. ``S`` in its code.

    Attributes:
        BLOCK_M, BLOCK_N, BLOCK_K: rows, columns and depth of a tile.
        EVEN_M, EVEN_N, EVEN_K: they divide those of the product.
        WIDE: offsets inside a tile are 64-bit.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    EVEN_M: bool
    EVEN_N: bool
    EVEN_K: bool
    WIDE: bool

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, tl.constexpr(getattr(self, field.name)))


@device
def block(base, row, column, rows, columns, R: constexpr, C: constexpr, ALL_R: constexpr, ALL_C: constexpr,
          WIDE: constexpr) -> Any:  # fmt: skip
    """The tile (R, C) at ``base``, zero past the ``rows`` and ``columns`` that there are."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    place = base + (i.to(tl.int64) * row + j.to(tl.int64) * column if WIDE else i * row + j * column)
    if ALL_R and ALL_C:
        return tl.load(place)
    elif ALL_R:
        return tl.load(place, mask=(j < columns) & (i < R), other=0.0)
    elif ALL_C:
        return tl.load(place, mask=(i < rows) & (j < C), other=0.0)
    else:
        return tl.load(place, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def matmul_kernel(a, b, c, M, N, K, a_batch, a_row, a_column, b_batch, b_row, b_column, S: constexpr):
    """One tile of one product: a (B, M, K) b (B, K, N) = c (B, M, N), contiguous."""
    columns = tl.cdiv(N, S.BLOCK_N)
    tiles = columns * tl.cdiv(M, S.BLOCK_M)
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    m, n = program % tiles // columns * S.BLOCK_M, program % columns * S.BLOCK_N
    a += batch * a_batch + m.to(tl.int64) * a_row
    b += batch * b_batch + n.to(tl.int64) * b_column
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_N), tl.float32)
    for k in range(0, K, S.BLOCK_K):
        x = block(a, a_row, a_column, M - m, K - k, S.BLOCK_M, S.BLOCK_K, S.EVEN_M, S.EVEN_K, S.WIDE)
        hi, lo, factor = split(x, OPERAND)  # before y is read: both at once would spill registers
        y = block(b, b_column, b_row, N - n, K - k, S.BLOCK_N, S.BLOCK_K, S.EVEN_N, S.EVEN_K, S.WIDE)
        hi_b, lo_b, factor_b = split(y, OPERAND)
        z = tl.dot(lo, tl.trans(hi_b))
        z = tl.dot(hi, tl.trans(lo_b), z)
        z = tl.dot(hi, tl.trans(hi_b), z)
        # the factors first: one of them alone may carry z out of float32's range, their product is that of the sum
        acc += z * (factor[:, None] * factor_b[None, :])
        a += tl.cast(S.BLOCK_K, tl.int64) * a_column
        b += tl.cast(S.BLOCK_K, tl.int64) * b_row
    i, j = m + tl.arange(0, S.BLOCK_M)[:, None], n + tl.arange(0, S.BLOCK_N)[None, :]
    place = c + batch * M * N + (i.to(tl.int64) * N + j)
    if S.EVEN_M and S.EVEN_N:
        tl.store(place, acc)
    else:
        tl.store(place, acc, mask=(i < M) & (j < N))


def tile_for(a: Tensor, b: Tensor, arch: int) -> Tile:
    """The tile of the products a b, batches (B, M, K) and (B, K, N), on a chip."""
    smooth = (
        all(size % 16 == 0 for size in (*a.shape[1:], b.shape[2]))
        and all(1 in x.stride()[1:] and max(x.stride()[1:]) < MAX_STRIDE for x in (a, b))
        and all(step % 16 == 0 or step == 1 for x in (a, b) for step in x.stride())
        and all(x.data_ptr() % 16 == 0 for x in (a, b))
    )
    if not smooth:
        return ROUGH
    return DEEP if arch == HOPPER and a.shape[2] > SHALLOW.depth else SHALLOW


def described(a: Tensor, b: Tensor, c: Tensor, arch: int) -> tuple[int, tuple[Any, ...], Static, Tile]:
    """Programs, arguments and constants of the kernel for a product, and its tile."""
    if a.ndim == 2:
        a, b, c = a[None], b[None], c[None]
    (B, M, K), N = a.shape, b.shape[2]
    tile = tile_for(a, b, arch)
    static = Static(
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        EVEN_M=M % tile.rows == 0,
        EVEN_N=N % tile.columns == 0,
        EVEN_K=K % tile.depth == 0,
        WIDE=max(*a.stride()[1:], *b.stride()[1:]) >= MAX_STRIDE,
    )
    programs = B * -(-M // tile.rows) * -(-N // tile.columns)
    return programs, (a, b, c, M, N, K, *a.stride(), *b.stride()), static, tile


def _shape(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """The shape of the product, if there is one."""
    if a.ndim not in (2, 3) or b.ndim != a.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"no matrix product of {tuple(a.shape)} and {tuple(b.shape)}: (M, K) (K, N), or a batch each")
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise TypeError(f"float32 operands are wanted, not {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"operands on {a.device} and {b.device}")
    return *a.shape[:-1], b.shape[-1]


def _new(a: Tensor, b: Tensor) -> Tensor:
    """The product, uninitialised (also the operator's fake)."""
    return torch.empty(_shape(a, b), dtype=torch.float32, device=a.device)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return _matmul_out(a, b, out=_new(a, b))


def _matmul_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    if out.shape != _shape(a, b) or out.dtype != torch.float32 or out.device != a.device:
        raise ValueError(f"{tuple(out.shape)} {out.dtype} on {out.device} cannot hold the product")
    if not out.is_contiguous():
        return out.copy_(_matmul(a, b))
    if out.numel():
        programs, args, static, tile = described(a, b, out, architecture(a.device))
        kernel: Any = matmul_kernel
        with torch.cuda.device_of(a):
            kernel[(programs,)](*args, S=static, num_warps=tile.warps, num_stages=tile.stages)
    return out


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of float32 matrices, or of a batch of them, without a derivative.

    Its error is that of a float32 product, about 2e-7 of the norms of row and column, whatever other rows and columns
    are; the same bits on every run. An entry that is infinite or NaN makes NaN or infinite what it is part of. Where
    the largest entries of row and column have a product above 1e43 nothing is finite, even where the sum is.

    Args:
        a, b: (M, K) and (K, N), or (B, M, K) and (B, K, N), with any strides, on a CUDA device (on a CPU in Triton's
            interpreter).

    Returns:
        (M, N) or (B, M, N), contiguous.

    Raises:
        ValueError: shapes that do not fit, or operands on two devices.
        TypeError: another dtype than float32.
        NotImplementedError: an operand requires grad or carries a tangent.
    """
    if not torch.compiler.is_compiling():
        _refuse_derivative(a, b)
    return torch.ops.theria.matmul(a, b)


def _refuse_derivative(*operands: Tensor) -> None:
    """Raise where PyTorch would warn of a gradient that is missing, and say nothing of a tangent that is."""
    for x in operands:
        what = differentiated(x)
        if what is not None and (torch.is_grad_enabled() or not x.requires_grad):
            raise NotImplementedError(f"this product has no derivative, and an operand {what}: detach it, or use a @ b")


LIBRARY = torch.library.Library("theria", "FRAGMENT")
# The kernel reads any strides: a compiler need not copy what has others than it once saw.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
LIBRARY.define("matmul(Tensor a, Tensor b) -> Tensor", tags=TAGS)
# PyTorch's compiler prefers the variant that writes where it is told, if it has this tag: it plans that memory and
# knows that its address divides by 16 bytes; what the other one returns is read number by number.
OUT = (torch.Tag.out,) if hasattr(torch.Tag, "out") else ()
LIBRARY.define("matmul.out(Tensor a, Tensor b, *, Tensor(c!) out) -> Tensor(c!)", tags=OUT)
for _device in ("CUDA", "CPU"):  # the CPU in Triton's interpreter
    LIBRARY.impl("matmul", _matmul, _device)
    LIBRARY.impl("matmul.out", _matmul_out, _device)
torch.library.register_fake("theria::matmul", _new, lib=LIBRARY)
torch.library.register_fake("theria::matmul.out", lambda a, b, *, out: out, lib=LIBRARY)
