"""Mixed second tangent of the output (README (19)-(22)): one program per block of query rows, over the keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands, Tangents
from theria.ops.triton.dropout import drop, keep_factor
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.masks import key_range, own_rows
from theria.ops.triton.parts import factors, load_factors, with_parts
from theria.ops.triton.products import load_operand, score_product, weighted_sum
from theria.ops.triton.row_sums import row_shares
from theria.ops.triton.shifts import row_shift, shifted, total
from theria.ops.triton.softmax import exponential, exponents, pivot
from theria.ops.triton.tensors import at, at_row, constexpr, coordinates, load, load_row, store
from theria.ops.triton.tiles import select


@triton.jit
def _centred(tq, k, q, tk, tau, call, S: constexpr):
    """U = tS − tau (20) of one direction; None where it moves neither q nor k."""
    ts = score_product(tq, k, None, False, S)
    ts = score_product(q, tk, ts, False, S)
    if ts is None:
        return
    else:
        return ts * call.scale - tau[:, None]


@triton.jit
def _curvature(u1, u2, q, tq1, tq2, ttq, k, tk1, tk2, ttk, shift, call, S: constexpr):
    """X (20) less the shift of its row; None where nothing bends the scores."""
    tts = score_product(tq1, tk2, None, False, S)
    tts = score_product(tq2, tk1, tts, False, S)
    tts = score_product(ttq, k, tts, False, S)
    tts = score_product(q, ttk, tts, False, S)
    if u1 is not None and u2 is not None:
        if tts is None:
            return u1 * u2
        else:
            return u1 * u2 + shifted(tts, shift, call)
    elif tts is None:
        return
    else:
        return shifted(tts, shift, call)


@triton.jit
def _add(acc, weight, v, strides, lead, col, call, of_values, INDEX: constexpr, keep, S: constexpr):
    """acc + (R∘weight) v with values or tangents of values; ``acc`` where either is absent."""
    if weight is None or v is None:
        return acc
    else:
        v = load_operand(v, strides, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_values, INDEX, S)
        return weighted_sum(drop(weight, keep), v, acc, S)


@triton.jit
def _times(x, p):
    """p∘x; None where x is absent."""
    if x is None:
        return
    else:
        return x * p


@triton.jit
def _step(acc, sums, q, tq1, tq2, ttq, pivots, tau1, tau2, shift, keys, values, common, row, col, edge, S: constexpr):
    """One tile of keys: adds to (22) without its second term, and to rowsum(P∘X)."""
    k, tk1, tk2, ttk, key_factors = keys
    v, tv1, tv2, ttv, value_factors = values
    mask, seed, strides, head, lead, call = common
    of_keys = load_factors(key_factors, head, col, call.M, S.BLOCK_N)
    k = load_operand(k, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
    tk1 = load_operand(tk1, strides.tk, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 1, S)
    tk2 = load_operand(tk2, strides.tk2, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 2, S)
    ttk = load_operand(ttk, strides.ttk, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 3, S)
    x = exponents(q, k, pivots[:, None], mask, strides, lead, row, col, call, edge, False, S)
    p = exponential(x, S)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, False)
    u1 = _centred(tq1, k, q, tk1, tau1, call, S)
    u2 = _centred(tq2, k, q, tk2, tau2, call, S)
    w = _times(_curvature(u1, u2, q, tq1, tq2, ttq, k, tk1, tk2, ttk, shift, call, S), p)
    if w is not None:
        sums += tl.sum(w, 1)
    of_values = load_factors(value_factors, head, col, call.M, S.BLOCK_N)
    acc = _add(acc, w, v, strides.v, lead, col, call, of_values, 0, keep, S)
    acc = _add(acc, _times(u1, p), tv2, strides.tv2, lead, col, call, of_values, 2, keep, S)
    acc = _add(acc, _times(u2, p), tv1, strides.tv, lead, col, call, of_values, 1, keep, S)
    acc = _add(acc, p, ttv, strides.ttv, lead, col, call, of_values, 3, keep, S)
    return acc, sums


@triton.jit(do_not_specialize=["strides", "call"])
def jvp_jvp_kernel(q, k, v, mask, seed, o, tq, tk, tv, tq2, tk2, tv2, ttq, ttk, ttv, to,
                   lse, tau1, tau2, shares, row_factors, key_factors, value_factors, strides, call,
                   S: constexpr):  # fmt: skip
    """``to`` (*L, N, E), the mixed tangent, of one block of rows."""
    head, row = own_rows(call, S)
    lead = coordinates(head, call)
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q_tile = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    tq1_tile = load_operand(tq, strides.tq, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 1, S)
    tq2_tile = load_operand(tq2, strides.tq2, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 2, S)
    ttq_tile = load_operand(ttq, strides.ttq, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 3, S)
    pivots = pivot(load_row(at_row(lse, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N), S)
    tau1_row = load_row(at_row(tau1, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N)
    tau2_row = load_row(at_row(tau2, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N)
    shift = None
    if S.BLOCK_D <= 128:  # beyond, registers are spilled
        where = (mask, strides.mask, lead, row, call)
        shift = row_shift(q_tile, ttq_tile, k, ttk, strides.k, strides.ttk, where, S)
        mixed = row_shift(tq1_tile, tq2_tile, tk, tk2, strides.tk, strides.tk2, where, S)
        if mixed is not None:
            shift = total(mixed, shift)
    keys = (k, tk, tk2, ttk, key_factors)
    values = (v, tv, tv2, ttv, value_factors)
    common = (mask, seed, strides, head, lead, call)
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_E), tl.float32)
    sums = tl.zeros((S.BLOCK_M,), tl.float32)
    plain, end = key_range(row, call, S)
    for col in range(0, end, S.BLOCK_N):
        acc, sums = _step(acc, sums, q_tile, tq1_tile, tq2_tile, ttq_tile, pivots, tau1_row, tau2_row, shift, keys,
                          values, common, row, col, col >= plain, S)  # fmt: skip
    o_tile = load(at(o, strides.o, lead, S.VEC), row, call.N, strides.o, S.BLOCK_M, "E", S.EVEN_N, S)
    acc -= sums[:, None] * o_tile.to(tl.float32)
    if shares is not None:
        acc *= load_row(at_row(shares, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N)[:, None]
    store(at(to, strides.to, lead, S.VEC), acc, row, call.N, strides.to, S.BLOCK_M, "E", S.EVEN_N, S)


GROUPS = {"rows": ("q", "tq", "tq2", "ttq"), "keys": ("k", "tk", "tk2", "ttk"), "values": ("v", "tv", "tv2", "ttv")}
OPERANDS = tuple(name for group in GROUPS.values() for name in group)
NAMES = ("q", "k", "v", "mask", "seed", "o", "tq", "tk", "tv", "tq2", "tk2", "tv2", "ttq", "ttk", "ttv", "to")


def jvp_jvp(
    ops: Operands,
    o: Tensor,
    lse: Tensor,
    t1: Tangents,
    t2: Tangents,
    t12: Tangents,
    tau1: Tensor,
    tau2: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """tto; see :func:`theria.ops.reference.jvp_jvp`."""
    moved = {"tq": t1.q, "tk": t1.k, "tv": t1.v, "tq2": t2.q, "tk2": t2.k, "tv2": t2.v}
    frame = with_parts(Frame(ops, spec, o=o, **moved, ttq=t12.q, ttk=t12.k, ttv=t12.v), OPERANDS, GROUPS)
    tile = select("jvp_jvp", frame)
    shares = row_shares(ops, lse, spec)
    rows = tuple(None if x is None else frame.rows(x) for x in (lse, tau1, tau2, shares))
    tto = frame.new_output("to")
    tensors, strides, call, static = frame.describe(NAMES, tile)
    parts = tuple(factors(frame, group) for group in GROUPS)
    programs = -(-frame.N // tile.rows) * frame.heads
    launch(jvp_jvp_kernel, programs, frame, (*tensors, *rows, *parts, strides, call), static, tile)
    return tto
