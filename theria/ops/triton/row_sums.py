"""Rows of P under an additive mask, whose sums lse cannot make 1.

A mask may be a large number on every key that a row sees (-1e9, the dtype's lowest). Its lse is then that number, the
logarithm of how many keys there are is lost beside it, and exp(S − lse) sums to their count. So each rule first adds
these rows up, at the cost of one more product, and has P as exp(S − lse) times the *share* 1 / rowsum.

Every derivative of (5)-(22) is linear in P where delta, tau and the like are given, and those of :mod:`.vjp` and
:mod:`.hvp` are linear in (dO, tdO), too: there dO and tdO take the share (:func:`with_shares`), and the kernels need
not know of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands
from theria.ops.triton import plans
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.masks import key_range, own_rows
from theria.ops.triton.parts import factors, load_factors, with_parts
from theria.ops.triton.products import left_operand, load_operand
from theria.ops.triton.softmax import pivot, probabilities, scaled_scores
from theria.ops.triton.tensors import at_row, constexpr, coordinates, load_row, store_row
from theria.ops.triton.tiles import select

OPERANDS = ("q", "k")
LARGEST = 16.0  # of a cotangent: its products with values of usual size are far from the end of float16
NAMES = ("q", "k", "mask")


@triton.jit(do_not_specialize=["strides", "call"])
def row_sums_kernel(q, k, mask, lse, shares, row_factors, key_factors, strides, call, S: constexpr):
    """``shares`` (*L, N) of one block of rows; 1 for a row that sees no key."""
    head, row = own_rows(call, S)
    lead = coordinates(head, call)
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q_tile = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    q_tile = left_operand(q_tile, S)
    pivots = pivot(load_row(at_row(lse, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N), S)
    total = tl.zeros((S.BLOCK_M,), tl.float32)
    plain, end = key_range(row, call, S)
    for col in range(0, end, S.BLOCK_N):
        of_keys = load_factors(key_factors, head, col, call.M, S.BLOCK_N)
        k_tile = load_operand(k, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
        x = scaled_scores(q_tile, k_tile, mask, strides, lead, row, col, call, col >= plain, False, S)
        total += tl.sum(probabilities(x, pivots[:, None], S), 1)
    shares_row = 1.0 / tl.where(total == 0.0, 1.0, total)
    store_row(at_row(shares, head, call), shares_row, row, call.N, S.BLOCK_M, S.EVEN_N)


def row_shares(ops: Operands, lse: Tensor, spec: AttentionSpec) -> Tensor | None:
    """1 / rowsum(exp(S − lse)), float32 (*L, N); None without an additive mask, where it is 1 up to rounding."""
    if not ops.additive:
        return None
    frame = with_parts(Frame(ops, spec), OPERANDS)
    tile = select("forward", frame)
    shares = frame.new_rows()
    tensors, strides, call, static = frame.describe(NAMES, tile)
    programs = -(-frame.N // tile.rows) * frame.heads
    args = (*tensors, frame.rows(lse), shares, factors(frame, "rows"), factors(frame, "keys"), strides, call)
    launch(row_sums_kernel, programs, frame, args, static, tile)
    return shares


def with_shares(cotangents: tuple[Tensor | None, ...], shares: Tensor | None) -> tuple[tuple[Any, ...], Tensor | None]:
    """Cotangents (*L, N, E) times the shares of their rows, in their dtype; they themselves where there are no shares.

    In float16 a share of a thousandth may leave too little of a cotangent. So they are times a power of two besides,
    the largest of at least 1 that lets none grow beyond LARGEST: the second result, by which those of the rule are to
    be divided; None for 1.
    """
    if shares is None:
        return cotangents, None
    plans.unplanned()
    present = [x * shares[..., None] for x in cotangents if x is not None]
    dtype, factor = next(x.dtype for x in cotangents if x is not None), None
    if dtype == torch.float16:
        room = LARGEST / torch.stack([x.abs().amax() for x in present]).amax()
        room = room.nan_to_num(1.0, 1.0).clamp(1.0, 2.0**64)  # also where all are zero, or one is not finite
        factor = torch.exp2(room.log2().floor())
        present = [x * factor for x in present]
    rounded = iter([x.to(dtype) for x in present])
    return tuple(None if x is None else next(rounded) for x in cotangents), factor
