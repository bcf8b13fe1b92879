"""The jvp and the hvp's tdQ (README (10)-(17), (25)) in one walk over the keys: one program per block of query rows.

tau and tdelta are sums over a whole row, which (13) and (16) take from each of its elements: two walks, it seems. But
tdS is linear in them, so that what they take from tdQ can be taken from its sums when the row has ended (25), if dQ of
the vjp is at hand. Scores, their tangents and P are computed once for the two, and P only once: 10 products where the
jvp and then ``hvp_dq`` take 12.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Size, Tensor

from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents, batch_shape
from theria.ops.triton.hvp import hvp
from theria.ops.triton.jvp import Left
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.masks import key_range, own_rows
from theria.ops.triton.products import left_operand, product, rounded, score_product
from theria.ops.triton.row_stats import PADDING, new_stats, row_dot, store_stats
from theria.ops.triton.shifts import FEW, common_part, shifted, tangent_shift, total, without
from theria.ops.triton.softmax import exponential, exponents, pivot
from theria.ops.triton.tensors import at, at_row, constexpr, coordinates, load, load_row, store, store_row
from theria.ops.triton.tiles import covers, kind, power_of_two, select


@triton.jit
def _step(acc_o, acc_q, acc_p, sums, q, tq, do, tdo, pivots, delta, shift, keys, common, row, col, edge, S: constexpr):
    """One tile of keys: adds (P∘tS)V + P tV, W K + dS tK, P K and the sums of the rows of P∘tS, dS and, with tdO, W."""
    k, tk, v, tv = keys
    mask, strides, lead, call = common
    tau, missing, tdelta = sums
    k = load(at(k, strides.k, lead, S.VEC), col, call.M, strides.k, S.BLOCK_N, "D", S.EVEN_M, S)
    tk = load(at(tk, strides.tk, lead, S.VEC), col, call.M, strides.tk, S.BLOCK_N, "D", S.EVEN_M, S)
    v = load(at(v, strides.v, lead, S.VEC), col, call.M, strides.v, S.BLOCK_N, "E", S.EVEN_M, S)
    tv = load(at(tv, strides.tv, lead, S.VEC), col, call.M, strides.tv, S.BLOCK_N, "E", S.EVEN_M, S)
    # The products of scores come first: none waits for another, and P is computed beside them. With tdO the registers
    # do not hold all of them, and the matrix unit adds tdP to what it belongs to.
    FIRST: constexpr = tdo is None
    x = exponents(q, k, pivots[:, None], mask, strides, lead, row, col, call, edge, False, S)
    ts = score_product(tq, k, None, False, S)
    ts = score_product(q, tk, ts, False, S)
    if FIRST:
        dp = score_product(do, v, None, False, S)
        tdp = score_product(do, tv, None, False, S)
    p = exponential(x, S)
    weights = rounded(p, k, S)
    acc_p = product(weights, k, acc_p, S)
    if tv is not None:
        acc_o = product(weights, tv, acc_o, S)
    if ts is not None:
        ts = shifted(ts, shift, call)
        u = p * ts
        tau += tl.sum(u, 1)
        acc_o = product(rounded(u, v, S), v, acc_o, S)
    if not FIRST:
        dp = score_product(do, v, None, False, S)
    dp = dp - delta[:, None]
    if tk is not None:
        ds = p * dp
        missing += tl.sum(ds, 1)
        acc_q = product(rounded(ds, k, S), tk, acc_q, S)
    w = None if ts is None else ts * dp
    if FIRST:
        if tdp is not None:
            w = tdp if w is None else w + tdp
    else:
        w = score_product(do, tv, w, False, S)
        w = score_product(tdo, v, w, False, S)
    w = p * w
    if tdo is not None:
        tdelta += tl.sum(w, 1)
    acc_q = product(rounded(w, k, S), k, acc_q, S)
    return acc_o, acc_q, acc_p, (tau, missing, tdelta)


@triton.jit(do_not_specialize=["strides", "call"])
def jvp_dq_kernel(q, k, v, mask, o, do, vjp_dq, tq, tk, tv, tdo, to, dq, lse, tau_out, stats, strides, call,
                  S: constexpr):  # fmt: skip
    """``to`` (*L, N, E), ``tau`` (*L, N), ``dq`` (*L, N, D) and the packed statistics of one block of rows."""
    head, row = own_rows(call, S)
    lead = coordinates(head, call)
    q_tile = load(at(q, strides.q, lead, S.VEC), row, call.N, strides.q, S.BLOCK_M, "D", S.EVEN_N, S)
    tq_tile = load(at(tq, strides.tq, lead, S.VEC), row, call.N, strides.tq, S.BLOCK_M, "D", S.EVEN_N, S)
    o_tile = load(at(o, strides.o, lead, S.VEC), row, call.N, strides.o, S.BLOCK_M, "E", S.EVEN_N, S)
    do_tile = load(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, S)
    tdo_tile = load(at(tdo, strides.tdo, lead, S.VEC), row, call.N, strides.tdo, S.BLOCK_M, "E", S.EVEN_N, S)
    lse_row = load_row(at_row(lse, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N)
    pivots = pivot(lse_row, S)
    delta = row_dot(do_tile, o_tile)
    where = (mask, strides.mask, lead, row, call)
    shift = tangent_shift(q_tile, tq_tile, k, tk, strides, lse_row, where, S)
    q_tile = left_operand(q_tile, S)
    keys, common = (k, tk, v, tv), (mask, strides, lead, call)
    acc_o = tl.zeros((S.BLOCK_M, S.BLOCK_E), tl.float32)
    acc_q = tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32)
    acc_p = tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32)
    zero = tl.zeros((S.BLOCK_M,), tl.float32)
    sums = (zero, zero, zero)
    plain, end = key_range(row, call, S)
    for col in range(0, end, S.BLOCK_N):
        acc_o, acc_q, acc_p, sums = _step(acc_o, acc_q, acc_p, sums, q_tile, tq_tile, do_tile, tdo_tile, pivots, delta,
                                          shift, keys, common, row, col, col >= plain, S)  # fmt: skip
    tau, missing, tdelta = sums  # of P∘tS less the shift; of dS, 0 but for rounding (shifts.py); of P∘W
    # O and dO are read again: kept until here they would take the registers of the loop
    o_tile = load(at(o, strides.o, lead, S.VEC), row, call.N, strides.o, S.BLOCK_M, "E", S.EVEN_N, S)
    do_tile = load(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, S)
    acc_o -= tau[:, None] * o_tile.to(tl.float32)
    store(at(to, strides.to, lead, S.VEC), acc_o, row, call.N, strides.to, S.BLOCK_M, "E", S.EVEN_N, S)
    if tdo is None:  # rowsum(P∘W) all the same, before tO is rounded
        tdelta = row_dot(do_tile, acc_o)
    acc_q -= tdelta[:, None] * acc_p
    acc_q = without(acc_q, missing, common_part(tk, strides.tk, where, FEW, S)) * call.scale
    vjp_dq = load(at(vjp_dq, strides.vjp_dq, lead, S.VEC), row, call.N, strides.vjp_dq, S.BLOCK_M, "D", S.EVEN_N, S)
    if vjp_dq is not None:
        acc_q -= tau[:, None] * vjp_dq.to(tl.float32)
    store(at(dq, strides.dq, lead, S.VEC), acc_q, row, call.N, strides.dq, S.BLOCK_M, "D", S.EVEN_N, S)
    whole = total(tau, shift)
    store_row(at_row(tau_out, head, call), whole, row, call.N, S.BLOCK_M, S.EVEN_N)
    if stats is not None:
        store_stats(stats, pivots, delta, whole, tdelta, head, row, call, S)


NAMES = ("q", "k", "v", "mask", "o", "do", "vjp_dq", "tq", "tk", "tv", "tdo", "to", "dq")


def takes(ops: Operands, o: Tensor, do: Tensor, dq: Tensor | None, shape: Size | None) -> bool:
    """Whether this module computes a call: where dQ of the vjp is at hand, of every row by itself, and tdQ is wanted;
    without dropout or an additive mask; and what :func:`theria.ops.triton.tiles.covers`."""
    if dq is None or shape is None or ops.seed is not None or ops.additive:
        return False
    own = batch_shape(*ops, o, do) == ops.q.shape[:-2]  # else dQ is a sum over leading dimensions that q does not have
    width = power_of_two(max(ops.q.shape[-1], ops.v.shape[-1]))
    return own and dq.shape == ops.q.shape and covers("jvp_dq", width, kind(ops.q.dtype))


def jvp_hvp(
    ops: Operands,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dq: Tensor,
    t: Tangents,
    tdo: Tensor | None,
    spec: AttentionSpec,
    shapes: Shapes,
) -> tuple[Tensor | None, ...]:
    """to, tau, tdq, tdk, tdv, None of a call that this module :func:`takes`; ``dq`` is that of the vjp at ``do``."""
    frame = Frame(ops, spec, o=o, do=do, vjp_dq=dq, tq=t.q, tk=t.k, tv=t.v, tdo=tdo)
    stats = new_stats(frame, 4) if frame.N % PADDING.value == 0 else None
    tile = select("jvp_dq", frame)
    lse, tau = frame.rows(lse), frame.new_rows()
    to, tdq = frame.new_output("to"), frame.new_cotangent("dq", shapes[0])
    tensors, strides, call, static = frame.describe(NAMES, tile)
    programs = -(-frame.N // tile.rows) * frame.heads
    launch(jvp_dq_kernel, programs, frame, (*tensors, lse, tau, stats, strides, call), static, tile)
    tdq = frame.finish(tdq, shapes[0])
    if shapes[1] is None and shapes[2] is None:
        return to, tau, tdq, None, None, None
    _, *of_keys = hvp(ops, o, lse, do, t, tdo, to, tau, spec, (None, *shapes[1:]), Left(frame, stats))
    return (to, tau, tdq, *of_keys)
