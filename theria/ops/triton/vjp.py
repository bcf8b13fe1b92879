"""Cotangents of the operands (README (5)-(8)): dQ by blocks of query rows, dK and dV by blocks of keys.

Two kernels, so that every sum stays in the registers of one program: nothing is added atomically, and every run gives
the same bits. What is not wanted is not compiled in.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands, Shapes
from theria.ops.triton.cotangents import cotangents
from theria.ops.triton.dropout import drop, keep_factor
from theria.ops.triton.launch import Frame
from theria.ops.triton.masks import key_range, own_keys, own_rows, row_range
from theria.ops.triton.parts import load_factors, with_parts
from theria.ops.triton.products import left_operand, load_operand, score_product, weighted_sum
from theria.ops.triton.row_stats import load_stats, row_stats
from theria.ops.triton.row_sums import row_shares, with_shares
from theria.ops.triton.shifts import common_part, with_row_sums, without
from theria.ops.triton.softmax import exponential, exponents
from theria.ops.triton.tensors import at, constexpr, coordinates, device, store


@triton.jit
def _dq_step(acc, sums, rows, keys, common, row, col, edge, S: constexpr):
    """One tile of keys: adds dS K, and the sums of the rows of dS."""
    q, do, pivots, delta = rows
    k_head, v, key_factors = keys
    mask, seed, strides, head, lead, call = common
    of_keys = load_factors(key_factors, head, col, call.M, S.BLOCK_N)
    k = load_operand(k_head, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
    v = load_operand(v, strides.v, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 2, S)
    x = exponents(q, k, pivots[:, None], mask, strides, lead, row, col, call, edge, False, S)
    dp = score_product(do, v, None, False, S)
    p = exponential(x, S)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, False)
    ds = p * (drop(dp, keep) - delta[:, None])
    return weighted_sum(ds, k, acc, S), with_row_sums(sums, ds, k_head)


@triton.jit(do_not_specialize=["strides", "call"])
def vjp_dq_kernel(q, k, v, mask, seed, do, dq, stats, row_factors, key_factors, strides, call, S: constexpr):
    """dQ (8) of one block of rows."""
    head, row = own_rows(call, S)
    lead = coordinates(head, call)
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q_tile = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    do_tile = load_operand(do, strides.do, lead, row, call.N, S.BLOCK_M, "E", S.EVEN_N, of_rows, 2, S)
    pivots, delta = load_stats(stats, head, row, call, S.BLOCK_M, False)
    rows = (left_operand(q_tile, S), left_operand(do_tile, S), pivots, delta)
    keys = (k, v, key_factors)
    common = (mask, seed, strides, head, lead, call)
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32)
    sums = tl.zeros((S.BLOCK_M,), tl.float32)
    plain, end = key_range(row, call, S)
    for col in range(0, end, S.BLOCK_N):
        acc, sums = _dq_step(acc, sums, rows, keys, common, row, col, col >= plain, S)
    acc = without(acc, sums, common_part(k, strides.k, (mask, strides.mask, lead, row, call), S.BLOCK_N, S))
    store(at(dq, strides.dq, lead, S.VEC), acc * call.scale, row, call.N, strides.dq, S.BLOCK_M, "D", S.EVEN_N, S)


@device
def _dkv_step(
    acc_k, acc_v, keys, rows, common, row, col,
    edge, DK: constexpr, DV: constexpr, S: constexpr,
):  # fmt: skip
    """One tile of rows: adds dSᵀQ and P̃ᵀdO. Tiles of scores are (keys, rows)."""
    k, v = keys
    q, do, stats, row_factors = rows
    mask, seed, strides, head, lead, call = common
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    do = load_operand(do, strides.do, lead, row, call.N, S.BLOCK_M, "E", S.EVEN_N, of_rows, 2, S)
    pivots, delta = load_stats(stats, head, row, call, S.BLOCK_M, False)
    x = exponents(q, k, pivots[None, :], mask, strides, lead, row, col, call, edge, True, S)
    p = exponential(x, S)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, True)
    if DV:
        acc_v = weighted_sum(drop(p, keep), do, acc_v, S)
    if DK:
        ds = p * (drop(score_product(do, v, None, True, S), keep) - delta[None, :])
        acc_k = weighted_sum(ds, q, acc_k, S)
    return acc_k, acc_v


@device
def _dkv_head(acc_k, acc_v, keys, rows, common, col, DK: constexpr, DV: constexpr, S: constexpr):
    """What the rows of one query head add to a block of keys."""
    mask, seed, strides, head, lead, call = common
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    common = (mask, seed, strides, head, lead, call)
    start, plain = row_range(col, call, S)
    for row in range(start, call.N, S.BLOCK_M):
        acc_k, acc_v = _dkv_step(acc_k, acc_v, keys, rows, common, row, col, row < plain, DK, DV, S)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["strides", "call"])
def vjp_dkv_kernel(q, k, v, mask, seed, do, dk, dv, stats, row_factors, key_factors, strides, call, S: constexpr):
    """dK (8) and dV (7) of one block of keys; with S.GROUPED summed over the query heads of a key head."""
    DK: constexpr = dk is not None
    DV: constexpr = dv is not None
    first, col = own_keys(call, S)
    if S.GROUPED:
        first *= call.L3
    lead = coordinates(first, call)
    of_keys = load_factors(key_factors, first, col, call.M, S.BLOCK_N)
    k_tile = load_operand(k, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
    v_tile = load_operand(v, strides.v, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 2, S)
    keys = (left_operand(k_tile, S), left_operand(v_tile, S))
    rows = (q, do, stats, row_factors)
    acc_k = tl.zeros((S.BLOCK_N, S.BLOCK_D if DK else 1), tl.float32)
    acc_v = tl.zeros((S.BLOCK_N, S.BLOCK_E if DV else 1), tl.float32)
    if S.GROUPED:
        for head in range(first, first + call.L3):
            common = (mask, seed, strides, head, coordinates(head, call), call)
            acc_k, acc_v = _dkv_head(acc_k, acc_v, keys, rows, common, col, DK, DV, S)
    else:
        common = (mask, seed, strides, first, lead, call)
        acc_k, acc_v = _dkv_head(acc_k, acc_v, keys, rows, common, col, DK, DV, S)
    if DK:
        store(at(dk, strides.dk, lead, S.VEC), acc_k * call.scale, col, call.M, strides.dk, S.BLOCK_N, "D", S.EVEN_M, S)
    if DV:
        store(at(dv, strides.dv, lead, S.VEC), acc_v, col, call.M, strides.dv, S.BLOCK_N, "E", S.EVEN_M, S)


READS = ("q", "k", "v", "mask", "seed", "do")


def vjp(
    ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, None; see :func:`theria.ops.reference.vjp`."""
    (do,), factor = with_shares((do,), row_shares(ops, lse, spec))
    frame = Frame(ops, spec, factor=factor, o=o, do=do)
    stats = row_stats(frame, lse)
    return cotangents("vjp", (vjp_dq_kernel, vjp_dkv_kernel), READS, with_parts(frame, READS), stats, shapes)
