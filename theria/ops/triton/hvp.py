"""The tangent of vjp (README (13)-(18)): dQ by blocks of query rows, dK and dV by blocks of keys.

Two kernels, so that every sum stays in the registers of one program: nothing is added atomically, and every run gives
the same bits. Work is ordered so that few tiles of the size of the scores are alive at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents
from theria.ops.triton.cotangents import cotangents
from theria.ops.triton.dropout import drop, keep_factor
from theria.ops.triton.jvp import Left
from theria.ops.triton.launch import Frame
from theria.ops.triton.masks import key_range, own_keys, own_rows, row_range
from theria.ops.triton.parts import load_factors, reading, with_parts
from theria.ops.triton.products import left_operand, load_operand, score_product, weighted_sum
from theria.ops.triton.row_stats import load_stats, row_stats
from theria.ops.triton.row_sums import row_shares, with_shares
from theria.ops.triton.shifts import common_part, with_row_sums, without
from theria.ops.triton.softmax import exponential, exponents
from theria.ops.triton.tensors import at, constexpr, coordinates, device, store


@triton.jit
def log_tangent(q, tq, k, tk, tau, call, TRANSPOSED: constexpr, S: constexpr):
    """U = tS − tau, the tangent of log P (13); None where the direction does not move the scores."""
    ts = score_product(tq, k, None, TRANSPOSED, S)
    ts = score_product(q, tk, ts, TRANSPOSED, S)
    if ts is None:
        return
    else:
        return ts * call.scale - tau


@triton.jit
def score_tangent(p, dp, u, do, tdo, v, tv, tdelta, keep, TRANSPOSED: constexpr, S: constexpr):
    """tdS (16) of a tile from P, dP − delta and U; tdelta is broadcast along its rows."""
    if u is not None and keep is None and not S.SPLIT:
        # what tdP belongs to is there before it, so that the matrix unit adds them: one tile of registers less
        rest = score_product(do, tv, u * dp - tdelta, TRANSPOSED, S)
        return p * score_product(tdo, v, rest, TRANSPOSED, S)
    else:
        tdp = score_product(do, tv, None, TRANSPOSED, S)
        tdp = score_product(tdo, v, tdp, TRANSPOSED, S)
        tds = -(p * tdelta) if tdp is None else p * (drop(tdp, keep) - tdelta)
        if u is not None:
            tds += u * (p * dp)  # tP∘(dP − delta)
        return tds


@triton.jit
def _dq_step(acc, sums, tsums, q, tq, do, tdo, stats, keys, common, row, col, edge, S: constexpr):
    """One tile of keys: adds tdS K + dS tK, and the sums of the rows of dS, with tK, and of tdS."""
    pivots, delta, tau, tdelta = stats
    k_head, tk_head, v, tv, key_factors = keys
    mask, seed, strides, head, lead, call = common
    of_keys = load_factors(key_factors, head, col, call.M, S.BLOCK_N)
    k = load_operand(k_head, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
    tk = load_operand(tk_head, strides.tk, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 1, S)
    v = load_operand(v, strides.v, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 2, S)
    tv = load_operand(tv, strides.tv, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 3, S)
    x = exponents(q, k, pivots[:, None], mask, strides, lead, row, col, call, edge, False, S)
    p = exponential(x, S)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, False)
    u = log_tangent(q, tq, k, tk, tau[:, None], call, False, S)
    dp = drop(score_product(do, v, None, False, S), keep) - delta[:, None]
    if tk is not None:
        ds = p * dp
        sums = with_row_sums(sums, ds, tk_head)
        acc = weighted_sum(ds, tk, acc, S)
    tds = score_tangent(p, dp, u, do, tdo, v, tv, tdelta[:, None], keep, False, S)
    tsums = with_row_sums(tsums, tds, k_head)
    acc = weighted_sum(tds, k, acc, S)
    return acc, sums, tsums


@triton.jit(do_not_specialize=["strides", "call"])
def hvp_dq_kernel(
    q, k, v, mask, seed, do, tq, tk, tv, tdo, dq, stats, row_factors, key_factors, strides, call, S: constexpr
):
    """tdQ (17) of one block of rows."""
    head, row = own_rows(call, S)
    lead = coordinates(head, call)
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q_tile = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    tq_tile = load_operand(tq, strides.tq, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 1, S)
    do_tile = load_operand(do, strides.do, lead, row, call.N, S.BLOCK_M, "E", S.EVEN_N, of_rows, 2, S)
    tdo_tile = load_operand(tdo, strides.tdo, lead, row, call.N, S.BLOCK_M, "E", S.EVEN_N, of_rows, 3, S)
    stats = load_stats(stats, head, row, call, S.BLOCK_M, True)
    q_tile = left_operand(q_tile, S)
    tq_tile = left_operand(tq_tile, S)
    do_tile = left_operand(do_tile, S)
    tdo_tile = left_operand(tdo_tile, S)
    keys = (k, tk, v, tv, key_factors)
    common = (mask, seed, strides, head, lead, call)
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32)
    sums = tl.zeros((S.BLOCK_M,), tl.float32)
    tsums = tl.zeros((S.BLOCK_M,), tl.float32)
    plain, end = key_range(row, call, S)
    for col in range(0, end, S.BLOCK_N):
        acc, sums, tsums = _dq_step(acc, sums, tsums, q_tile, tq_tile, do_tile, tdo_tile, stats, keys, common,
                                    row, col, col >= plain, S)  # fmt: skip
    where = (mask, strides.mask, lead, row, call)
    acc = without(acc, sums, common_part(tk, strides.tk, where, S.BLOCK_N, S))
    acc = without(acc, tsums, common_part(k, strides.k, where, S.BLOCK_N, S))
    store(at(dq, strides.dq, lead, S.VEC), acc * call.scale, row, call.N, strides.dq, S.BLOCK_M, "D", S.EVEN_N, S)


@device
def _dkv_step(
    acc_k,
    acc_v,
    k,
    tk,
    v,
    tv,
    rows,
    common,
    row,
    col,
    edge,
    DK: constexpr,
    DV: constexpr,
    S: constexpr,
):
    """One tile of rows: adds tdSᵀQ + dSᵀtQ and (R∘tP)ᵀdO + P̃ᵀtdO. Tiles of scores are (keys, rows)."""
    q, tq, do, tdo, stats, row_factors = rows
    mask, seed, strides, head, lead, call = common
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    tq = load_operand(tq, strides.tq, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 1, S)
    do = load_operand(do, strides.do, lead, row, call.N, S.BLOCK_M, "E", S.EVEN_N, of_rows, 2, S)
    tdo = load_operand(tdo, strides.tdo, lead, row, call.N, S.BLOCK_M, "E", S.EVEN_N, of_rows, 3, S)
    pivots, delta, tau, tdelta = load_stats(stats, head, row, call, S.BLOCK_M, True)
    x = exponents(q, k, pivots[None, :], mask, strides, lead, row, col, call, edge, True, S)
    p = exponential(x, S)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, True)
    u = log_tangent(q, tq, k, tk, tau[None, :], call, True, S)
    if DV:
        if u is not None:
            acc_v = weighted_sum(drop(p * u, keep), do, acc_v, S)
        if tdo is not None:
            acc_v = weighted_sum(drop(p, keep), tdo, acc_v, S)
    if DK:
        dp = drop(score_product(do, v, None, True, S), keep) - delta[None, :]
        # dS is done with before tdP is made, but for parts, which spill in this order
        if tq is not None and not S.SPLIT:
            acc_k = weighted_sum(p * dp, tq, acc_k, S)
        tds = score_tangent(p, dp, u, do, tdo, v, tv, tdelta[None, :], keep, True, S)
        acc_k = weighted_sum(tds, q, acc_k, S)
        if tq is not None and S.SPLIT:
            acc_k = weighted_sum(p * dp, tq, acc_k, S)
    return acc_k, acc_v


@device
def _dkv_head(acc_k, acc_v, k, tk, v, tv, rows, common, col, DK: constexpr, DV: constexpr, S: constexpr):
    """What the rows of one query head add to a block of keys."""
    mask, seed, strides, head, lead, call = common
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    common = (mask, seed, strides, head, lead, call)
    start, plain = row_range(col, call, S)
    for row in range(start, call.N, S.BLOCK_M):
        acc_k, acc_v = _dkv_step(acc_k, acc_v, k, tk, v, tv, rows, common, row, col, row < plain, DK, DV, S)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["strides", "call"])
def hvp_dkv_kernel(
    q, k, v, mask, seed, do, tq, tk, tv, tdo, dk, dv, stats, row_factors, key_factors, strides, call, S: constexpr
):
    """tdK (17) and tdV (18) of one block of keys; with S.GROUPED summed over the query heads of a key head."""
    DK: constexpr = dk is not None
    DV: constexpr = dv is not None
    first, col = own_keys(call, S)
    if S.GROUPED:
        first *= call.L3
    lead = coordinates(first, call)
    of_keys = load_factors(key_factors, first, col, call.M, S.BLOCK_N)
    k_tile = load_operand(k, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
    tk_tile = load_operand(tk, strides.tk, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 1, S)
    v_tile = load_operand(v, strides.v, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 2, S)
    tv_tile = load_operand(tv, strides.tv, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 3, S)
    k_tile = left_operand(k_tile, S)
    tk_tile = left_operand(tk_tile, S)
    v_tile = left_operand(v_tile, S)
    tv_tile = left_operand(tv_tile, S)
    rows = (q, tq, do, tdo, stats, row_factors)
    acc_k = tl.zeros((S.BLOCK_N, S.BLOCK_D if DK else 1), tl.float32)
    acc_v = tl.zeros((S.BLOCK_N, S.BLOCK_E if DV else 1), tl.float32)
    if S.GROUPED:
        for head in range(first, first + call.L3):
            common = (mask, seed, strides, head, coordinates(head, call), call)
            acc_k, acc_v = _dkv_head(acc_k, acc_v, k_tile, tk_tile, v_tile, tv_tile, rows, common, col, DK, DV, S)
    else:
        common = (mask, seed, strides, first, lead, call)
        acc_k, acc_v = _dkv_head(acc_k, acc_v, k_tile, tk_tile, v_tile, tv_tile, rows, common, col, DK, DV, S)
    if DK:
        store(at(dk, strides.dk, lead, S.VEC), acc_k * call.scale, col, call.M, strides.dk, S.BLOCK_N, "D", S.EVEN_M, S)
    if DV:
        store(at(dv, strides.dv, lead, S.VEC), acc_v, col, call.M, strides.dv, S.BLOCK_N, "E", S.EVEN_M, S)


READS = ("q", "k", "v", "mask", "seed", "do", "tq", "tk", "tv", "tdo")


def hvp(
    ops: Operands,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    t: Tangents,
    tdo: Tensor | None,
    to: Tensor,
    tau: Tensor,
    spec: AttentionSpec,
    shapes: Shapes,
    left: Left | None = None,
) -> tuple[Tensor | None, ...]:
    """tdq, tdk, tdv, None; see :func:`theria.ops.reference.hvp`.

    ``left``: by the jvp along the same direction.
    """
    if left is None:
        (do, tdo), factor = with_shares((do, tdo), row_shares(ops, lse, spec))
        frame = Frame(ops, spec, factor=factor, o=o, do=do, tq=t.q, tk=t.k, tv=t.v, tdo=tdo, to=to)
        left = Left(with_parts(frame, READS), None)
    stats = row_stats(reading(left.frame, ()), lse, tau) if left.stats is None else left.stats
    return cotangents("hvp", (hvp_dq_kernel, hvp_dkv_kernel), READS, left.frame, stats, shapes)
