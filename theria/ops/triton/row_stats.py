"""What the derivative kernels need of a row, packed side by side: lse, delta and, at second order, tau and tdelta.

Kernels that walk over blocks of rows need these numbers along the second dimension of their transposed tiles, where
every thread holds a share of every row. As one contiguous block they are copied once per program, and each thread then
reads its share from shared memory, four numbers at a time; as four arrays they were copied by every thread for itself,
which cost a quarter of the dK, dV kernel's time on an H200.

Rows are padded to a multiple of PADDING with lse = ∞, for which P = 0: these reads need no mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from theria.ops.triton import plans
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.softmax import pivot
from theria.ops.triton.tensors import at, at_row, constexpr, coordinates, load, load_row
from theria.ops.triton.tiles import select

PADDING = tl.constexpr(256)  # the most rows that a tile may have


@triton.jit
def padded_rows(call):
    """Rows of one head in the packed statistics."""
    return tl.cdiv(call.N, PADDING) * PADDING


@triton.jit
def load_stats(stats, head, row, call, BLOCK: constexpr, TANGENTS: constexpr):
    """(pivots, delta), with TANGENTS (pivots, delta, tau, tdelta) of the rows [row, row + BLOCK) of one head."""
    COUNT: constexpr = 4 if TANGENTS else 2
    base = tl.multiple_of(stats + tl.cast(head, tl.int64) * padded_rows(call) * COUNT, 16)
    packed = tl.load(base + tl.multiple_of(row, BLOCK) * COUNT + tl.arange(0, BLOCK * COUNT))
    if TANGENTS:
        even, odd = tl.split(tl.reshape(packed, (BLOCK, 2, 2)))
        pivots, tau = tl.split(even)
        delta, tdelta = tl.split(odd)
        return pivots, delta, tau, tdelta
    else:
        return tl.split(tl.reshape(packed, (BLOCK, 2)))


@triton.jit
def row_dot(a, b):
    """rowsum(a∘b) in float32; 0 where one is absent."""
    if a is None or b is None:
        return 0.0
    else:
        return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit
def store_stats(stats, pivots, delta, tau, tdelta, head, row, call, S: constexpr):
    """Pack the statistics (rows,) of the rows [row, row + S.BLOCK_M) of one head: two without ``tau``, else four."""
    COUNT: constexpr = 2 if tau is None else 4
    rows = padded_rows(call)
    index = row + tl.arange(0, S.BLOCK_M)
    out = stats + (tl.cast(head, tl.int64) * rows + index) * COUNT
    exists = index < rows
    tl.store(out, pivots, mask=exists)
    tl.store(out + 1, delta, mask=exists)
    if tau is not None:
        tl.store(out + 2, tau, mask=exists)
        tl.store(out + 3, tdelta, mask=exists)


@triton.jit(do_not_specialize=["strides", "call"])
def row_stats_kernel(o, do, tdo, to, lse, tau, stats, strides, call, S: constexpr):
    """delta (6) and tdelta (15) of one block of rows, packed with lse (in the unit of the kernels) and tau."""
    blocks = tl.cdiv(padded_rows(call), S.BLOCK_M)
    head = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * S.BLOCK_M
    lead = coordinates(head, call)
    pivots = load_row(at_row(lse, head, call), row, call.N, float("inf"), S.BLOCK_M, False)
    pivots = pivot(pivots, S)
    o = load(at(o, strides.o, lead, S.VEC), row, call.N, strides.o, S.BLOCK_M, "E", False, S)
    do = load(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", False, S)
    to = load(at(to, strides.to, lead, S.VEC), row, call.N, strides.to, S.BLOCK_M, "E", False, S)
    tdo = load(at(tdo, strides.tdo, lead, S.VEC), row, call.N, strides.tdo, S.BLOCK_M, "E", False, S)
    if tau is not None:
        tau = load_row(at_row(tau, head, call), row, call.N, 0.0, S.BLOCK_M, False)
    store_stats(stats, pivots, row_dot(do, o), tau, row_dot(do, to) + row_dot(tdo, o), head, row, call, S)


def new_stats(frame: Frame, count: int) -> Tensor:
    """Uninitialised packed statistics (*L, padded rows, count), float32."""
    rows = -(-frame.N // PADDING.value) * PADDING.value
    return plans.allocated(torch.empty((*frame.lead, rows, count), dtype=torch.float32, device=frame.device))


def row_stats(frame: Frame, lse: Tensor, tau: Tensor | None = None) -> Tensor:
    """Packed statistics (*L, padded rows, 2 or 4), float32, from lse and what the frame holds of o, do, to and tdo.

    Args:
        lse, tau: (*L, N); with tau also the tangents' statistics.
    """
    tile = select("row_stats", frame)
    stats = new_stats(frame, 2 if tau is None else 4)
    tensors, strides, call, static = frame.describe(("o", "do", "tdo", "to"), tile)
    lse, tau = frame.rows(lse), None if tau is None else frame.rows(tau)
    programs = -(-stats.shape[-2] // tile.rows) * frame.heads
    launch(row_stats_kernel, programs, frame, (*tensors, lse, tau, stats, strides, call), static, tile)
    return stats
