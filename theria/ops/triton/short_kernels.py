"""The kernels of :mod:`theria.ops.triton.short`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from theria.ops.triton.dropout import drop
from theria.ops.triton.packed import (
    coordinates,
    heads_from,
    keep_factor,
    load_operand,
    load_row,
    row_sum,
    scaled_scores,
    store,
    store_row,
)
from theria.ops.triton.products import product, product_with_transposed, rounded, transposed, weighted_sum
from theria.ops.triton.softmax import pivot, probabilities
from theria.ops.triton.tensors import at, constexpr, device


@triton.jit
def _weights(q, k, lse, mask, strides, lead, head, row, call, PACK: constexpr, S: constexpr):
    """Pᵀ (2) of a block of rows; exactly 0 in rows that do not exist."""
    pivots = pivot(load_row(lse, head, row, float("inf"), call, PACK, S), S)
    x = scaled_scores(q, k, mask, strides, lead, row, call, PACK, S)
    p = probabilities(x, pivots, S)
    if S.NATURAL:
        # Σ P of a row is 1 up to the rounding of lse and of exp2; times what the keys of a row have in common in dP or
        # tS, this is what (6) and (13), where only differences count, would be off by. Where an additive mask is a
        # large number on all keys, lse has lost how many they are (:mod:`theria.ops.triton.row_sums`).
        total = row_sum(p)
        return p / tl.where(total == 0.0, 1.0, total)
    else:
        return p


@triton.jit
def _add(acc, a, b, S: constexpr):
    """acc + a b with ``a`` rounded to the dtype of ``b``; ``acc`` where either is absent."""
    if a is None or b is None:
        return acc
    else:
        return weighted_sum(a, b, acc, S)


@triton.jit
def _add_transposed(acc, a, b, S: constexpr):
    """acc + aᵀ b, ``a`` rounded to the dtype of ``b``; ``acc`` where either is absent.

    Held transposed where b has at least 64 columns (:func:`_store_rows`): Hopper's wgmma wants 64 on the left.
    Not with S.SPLIT, whose parts are of rows on the left.
    """
    if a is None or b is None:
        if acc is None:
            return
        else:
            return acc
    elif S.SPLIT:
        return weighted_sum(transposed(a), b, acc, S)
    elif b.shape[len(b.shape) - 1] >= 64:
        return product(transposed(b), a.to(b.dtype), acc, S)
    else:
        return product(transposed(a.to(b.dtype)), b, acc, S)


@triton.jit
def _store_rows(pointer, x, strides, lead, row, call, WIDTH: constexpr, PACK: constexpr, S: constexpr):
    """Write what :func:`_add_transposed` gave for a block of rows; zeros if it gave None."""
    BLOCK_W: constexpr = S.BLOCK_D if WIDTH == "D" else S.BLOCK_E
    if x is None:
        x = _zeros(S.BLOCK_M, BLOCK_W, PACK)
    elif BLOCK_W >= 64 and not S.SPLIT:
        x = transposed(x)
    store(at(pointer, strides, lead, S.VEC), x, row, call.N, strides, S.BLOCK_M, WIDTH, S.EVEN_N, PACK, S)


@triton.jit
def _store_keys(dk, dv, acc_k, acc_v, strides, lead, call, PACK: constexpr, S: constexpr):
    """Write what the keys have gathered, where it is wanted."""
    if dk is not None:
        x = acc_k * call.scale
        store(at(dk, strides.dk, lead, S.VEC), x, 0, call.M, strides.dk, S.BLOCK_N, "D", S.EVEN_M, PACK, S)
    if dv is not None:
        store(at(dv, strides.dv, lead, S.VEC), acc_v, 0, call.M, strides.dv, S.BLOCK_N, "E", S.EVEN_M, PACK, S)


@triton.jit
def _zeros(BLOCK: constexpr, BLOCK_W: constexpr, PACK: constexpr):
    if PACK == 1:
        return tl.zeros((BLOCK, BLOCK_W), tl.float32)
    else:
        return tl.zeros((PACK, BLOCK, BLOCK_W), tl.float32)


@triton.jit
def _seed_of(seed, strides, lead):
    if seed is None:
        return
    else:
        return tl.load(at(seed, strides.seed, lead, 1))


@triton.jit
def _vjp_block(acc_k, acc_v, k, v, q, do, dq, dk, dv, lse, mask, seed, strides, head, row, call,
               PACK: constexpr, FLAT: constexpr, S: constexpr):  # fmt: skip
    """(5)-(8) of one block of rows: writes dQ, adds to dK (without scale) and dV."""
    lead = coordinates(head, call, FLAT)
    q = load_operand(at(q, strides.q, lead, S.VEC), row, call.N, strides.q, S.BLOCK_M, "D", S.EVEN_N, PACK, S)
    do = load_operand(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, PACK, S)
    p = _weights(q, k, lse, mask, strides, lead, head, row, call, PACK, S)
    keep = keep_factor(_seed_of(seed, strides, lead), head, row, call, PACK, S)
    if dv is not None:
        acc_v = _add(acc_v, drop(p, keep), do, S)
    if dq is not None or dk is not None:
        dp = drop(product_with_transposed(v, do, None, S), keep)
        ds = rounded(p * (dp - row_sum(p * dp)), k, S)
        if dq is not None:
            x = _add_transposed(None, ds, k, S) * call.scale
            _store_rows(dq, x, strides.dq, lead, row, call, "D", PACK, S)
        if dk is not None:
            acc_k = _add(acc_k, ds, q, S)
    return acc_k, acc_v


@triton.jit
def _second_block(acc_k, acc_v, k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, mask, seed, strides, head, row,
                  call, PACK: constexpr, FLAT: constexpr, S: constexpr):  # fmt: skip
    """(10)-(18) of one block of rows: writes tO with tau, and tdQ, adds to tdK (without scale) and tdV."""
    lead = coordinates(head, call, FLAT)
    q = load_operand(at(q, strides.q, lead, S.VEC), row, call.N, strides.q, S.BLOCK_M, "D", S.EVEN_N, PACK, S)
    tq = load_operand(at(tq, strides.tq, lead, S.VEC), row, call.N, strides.tq, S.BLOCK_M, "D", S.EVEN_N, PACK, S)
    do = load_operand(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, PACK, S)
    tdo = load_operand(at(tdo, strides.tdo, lead, S.VEC), row, call.N, strides.tdo, S.BLOCK_M, "E", S.EVEN_N, PACK, S)
    p = _weights(q, k, lse, mask, strides, lead, head, row, call, PACK, S)
    keep = keep_factor(_seed_of(seed, strides, lead), head, row, call, PACK, S)
    total = row_sum(_zeros(16, S.BLOCK_M, PACK))
    tp, ds, y, out = None, None, None, None
    ts = product_with_transposed(tk, q, product_with_transposed(k, tq, None, S), S)
    if ts is not None:
        ts *= call.scale
        total = row_sum(p * ts)
        tp = p * (ts - total)  # (13)
        if to is not None:
            out = _add_transposed(out, drop(tp, keep), v, S)
        if dv is not None:
            acc_v = _add(acc_v, drop(tp, keep), do, S)
    if dv is not None:
        acc_v = _add(acc_v, drop(p, keep), tdo, S)
    if to is not None:
        out = _add_transposed(out, drop(p, keep), tv, S)
        _store_rows(to, out, strides.to, lead, row, call, "E", PACK, S)
        store_row(tau, total, head, row, call, PACK, S)
    if dq is not None or dk is not None:
        if tp is not None:
            dp = drop(product_with_transposed(v, do, None, S), keep)
            dp -= row_sum(p * dp)
            y = tp * dp
            ds = rounded(p * dp, k, S)
            if dk is not None:
                acc_k = _add(acc_k, ds, tq, S)
        tdp = product_with_transposed(tv, do, product_with_transposed(v, tdo, None, S), S)
        if tdp is not None:
            y = p * drop(tdp, keep) if y is None else y + p * drop(tdp, keep)
        if y is not None:
            y = rounded(y - p * row_sum(y), k, S)  # (16): rowsum(tP) = 0 makes rowsum(y) tdelta
        if dq is not None:
            tdq = _add_transposed(_add_transposed(None, ds, tk, S), y, k, S)
            if tdq is not None:
                tdq *= call.scale
            _store_rows(dq, tdq, strides.dq, lead, row, call, "D", PACK, S)
        if y is not None and dk is not None:
            acc_k = _add(acc_k, y, q, S)
    return acc_k, acc_v


@device
def _program(total, call, PACK: constexpr, S: constexpr) -> Any:
    """First head of this program, and how many blocks of rows it walks over."""
    first = tl.program_id(0) * PACK
    blocks = tl.cdiv(call.N, S.BLOCK_M)
    if S.GROUPED:  # the query heads of one key head
        return heads_from(first * call.L3, total, PACK), blocks, blocks * call.L3
    else:
        return heads_from(first, total, PACK), blocks, blocks


@device
def _head_of(block, first, blocks, S: constexpr) -> Any:
    """The head of a block of this program."""
    return first + block // blocks if S.GROUPED else first


@device
def _row_of(block, blocks, S: constexpr) -> Any:
    """Its first row."""
    return (block % blocks if S.GROUPED else block) * S.BLOCK_M


@triton.jit(do_not_specialize=["strides", "call", "total"])
def vjp_short_kernel(q, k, v, mask, seed, do, dq, dk, dv, lse, strides, call, total,
                     PACK: constexpr, FLAT: constexpr, ONE: constexpr, S: constexpr):  # fmt: skip
    """All of (5)-(8) for the heads of one program."""
    first, blocks, count = _program(total, call, PACK, S)
    lead = coordinates(first, call, FLAT)
    k_tile = load_operand(at(k, strides.k, lead, S.VEC), 0, call.M, strides.k, S.BLOCK_N, "D", S.EVEN_M, PACK, S)
    v_tile = load_operand(at(v, strides.v, lead, S.VEC), 0, call.M, strides.v, S.BLOCK_N, "E", S.EVEN_M, PACK, S)
    acc_k, acc_v = _zeros(S.BLOCK_N, S.BLOCK_D, PACK), _zeros(S.BLOCK_N, S.BLOCK_E, PACK)
    if ONE:
        acc_k, acc_v = _vjp_block(acc_k, acc_v, k_tile, v_tile, q, do, dq, dk, dv, lse, mask, seed, strides,
                                  first, 0, call, PACK, FLAT, S)  # fmt: skip
    else:
        for i in range(0, count):
            head = _head_of(i, first, blocks, S)
            row = _row_of(i, blocks, S)
            acc_k, acc_v = _vjp_block(acc_k, acc_v, k_tile, v_tile, q, do, dq, dk, dv, lse, mask, seed, strides,
                                      head, row, call, PACK, FLAT, S)  # fmt: skip
    _store_keys(dk, dv, acc_k, acc_v, strides, lead, call, PACK, S)


@triton.jit
def _second_pass(k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, mask, seed, strides, first, blocks, count,
                 call, PACK: constexpr, FLAT: constexpr, ONE: constexpr, S: constexpr):  # fmt: skip
    """What is wanted of (10)-(18), in one walk over the rows."""
    acc_k, acc_v = _zeros(S.BLOCK_N, S.BLOCK_D, PACK), _zeros(S.BLOCK_N, S.BLOCK_E, PACK)
    if ONE:
        acc_k, acc_v = _second_block(acc_k, acc_v, k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, mask, seed,
                                     strides, first, 0, call, PACK, FLAT, S)  # fmt: skip
    else:
        # What the compiler would take out of this loop are addresses, some thirty registers of them.
        for i in tl.range(0, count, disable_licm=True):
            head = _head_of(i, first, blocks, S)
            row = _row_of(i, blocks, S)
            acc_k, acc_v = _second_block(acc_k, acc_v, k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, mask,
                                         seed, strides, head, row, call, PACK, FLAT, S)  # fmt: skip
    lead = coordinates(first, call, FLAT)
    _store_keys(dk, dv, acc_k, acc_v, strides, lead, call, PACK, S)


@triton.jit(do_not_specialize=["strides", "call", "total"])
def second_short_kernel(q, k, v, mask, seed, do, tq, tk, tv, tdo, to, dq, dk, dv, lse, tau, strides, call, total,
                        PACK: constexpr, FLAT: constexpr, ONE: constexpr, S: constexpr):  # fmt: skip
    """All of (10)-(18) for the heads of one program.

    With S.APART in two walks over the rows, tO with tdV and then tdQ with tdK: 15 products instead of 12, and the
    registers of one accumulator.
    """
    first, blocks, count = _program(total, call, PACK, S)
    lead = coordinates(first, call, FLAT)
    k = load_operand(at(k, strides.k, lead, S.VEC), 0, call.M, strides.k, S.BLOCK_N, "D", S.EVEN_M, PACK, S)
    v = load_operand(at(v, strides.v, lead, S.VEC), 0, call.M, strides.v, S.BLOCK_N, "E", S.EVEN_M, PACK, S)
    tk = load_operand(at(tk, strides.tk, lead, S.VEC), 0, call.M, strides.tk, S.BLOCK_N, "D", S.EVEN_M, PACK, S)
    tv = load_operand(at(tv, strides.tv, lead, S.VEC), 0, call.M, strides.tv, S.BLOCK_N, "E", S.EVEN_M, PACK, S)
    if not S.APART:
        _second_pass(k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, mask, seed, strides, first, blocks, count,
                     call, PACK, FLAT, ONE, S)  # fmt: skip
    else:
        if to is not None or dv is not None:
            _second_pass(k, v, tk, tv, q, do, tq, tdo, to, None, None, dv, lse, tau, mask, seed, strides, first, blocks,
                         count, call, PACK, FLAT, ONE, S)  # fmt: skip
        if dq is not None or dk is not None:
            first += tl.minimum(call.N, 0)  # nothing, but the compiler keeps no address of the one walk for the other
            _second_pass(k, v, tk, tv, q, do, tq, tdo, None, dq, dk, None, lse, tau, mask, seed, strides, first, blocks,
                         count, call, PACK, FLAT, ONE, S)  # fmt: skip
