"""The kernels of :mod:`theria.ops.triton.short`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from theria.ops.triton import dropout, softmax, tensors
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
from theria.ops.triton.tensors import at, at_row, constexpr, device

WGMMA_ROWS = tl.constexpr(64)  # what Hopper's matrix unit wants on the left


@triton.jit
def _with_unit_sums(p, total):
    """P (2) from exp(S − lse) and the sums of its rows, 0 for a row that sees no key.

    Σ P of a row is 1 up to the rounding of lse and of exp2; times what the keys of a row have in common in dP or tS,
    this is what (6) and (13), where only differences count, would be off by. Where an additive mask is a large number
    on all keys, lse has lost how many they are (:mod:`theria.ops.triton.row_sums`).
    """
    return p / tl.where(total == 0.0, 1.0, total)


@triton.jit
def _weights(q, k, lse, mask, strides, lead, head, row, call, PACK: constexpr, S: constexpr):
    """Pᵀ (2) of a block of rows; exactly 0 in rows that do not exist."""
    pivots = pivot(load_row(lse, head, row, float("inf"), call, PACK, S), S)
    x = scaled_scores(q, k, mask, strides, lead, row, call, PACK, S)
    p = probabilities(x, pivots, S)
    if S.NATURAL:
        return _with_unit_sums(p, row_sum(p))
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
def _second_block(acc_k, acc_v, k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, known, mask, seed, strides,
                  head, row, call, PACK: constexpr, FLAT: constexpr, S: constexpr):  # fmt: skip
    """(10)-(18) of one block of rows: writes tO with tau, and tdQ, adds to tdK (without scale) and tdV.

    ``known`` is tau where a walk before this one has written it, else None.
    """
    lead = coordinates(head, call, FLAT)
    q = load_operand(at(q, strides.q, lead, S.VEC), row, call.N, strides.q, S.BLOCK_M, "D", S.EVEN_N, PACK, S)
    tq = load_operand(at(tq, strides.tq, lead, S.VEC), row, call.N, strides.tq, S.BLOCK_M, "D", S.EVEN_N, PACK, S)
    do = load_operand(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, PACK, S)
    tdo = load_operand(at(tdo, strides.tdo, lead, S.VEC), row, call.N, strides.tdo, S.BLOCK_M, "E", S.EVEN_N, PACK, S)
    p = _weights(q, k, lse, mask, strides, lead, head, row, call, PACK, S)
    keep = keep_factor(_seed_of(seed, strides, lead), head, row, call, PACK, S)
    total = row_sum(_zeros(16, S.BLOCK_M, PACK))
    u, ds, y, out = None, None, None, None
    ts = product_with_transposed(tk, q, product_with_transposed(k, tq, None, S), S)
    if ts is not None:
        total = row_sum(p * ts) * call.scale if known is None else load_row(known, head, row, 0.0, call, PACK, S)
        u = ts * call.scale - total  # tP = P∘U (13)
        if dv is not None:
            acc_v = _add(acc_v, drop(p * u, keep), do, S)
        if to is not None:
            out = _add_transposed(out, drop(p * u, keep), v, S)
    if dv is not None:
        acc_v = _add(acc_v, drop(p, keep), tdo, S)
    if to is not None:
        out = _add_transposed(out, drop(p, keep), tv, S)
        _store_rows(to, out, strides.to, lead, row, call, "E", PACK, S)
        store_row(tau, total, head, row, call, PACK, S)
    if dq is not None or dk is not None:
        if u is not None:
            dp = drop(product_with_transposed(v, do, None, S), keep)
            dp -= row_sum(p * dp)
            ds = rounded(p * dp, k, S)
            if dk is not None:
                acc_k = _add(acc_k, ds, tq, S)
            y = u * dp
        if keep is None and not S.SPLIT:  # the matrix unit adds tdP: one tile of registers less
            y = product_with_transposed(tv, do, product_with_transposed(v, tdo, y, S), S)
        else:
            tdp = product_with_transposed(tv, do, product_with_transposed(v, tdo, None, S), S)
            if tdp is not None:
                y = drop(tdp, keep) if y is None else y + drop(tdp, keep)
        if y is not None:
            y = p * y
            y = rounded(y - p * row_sum(y), k, S)  # (16): rowsum(tP) = 0 makes rowsum(y) tdelta
        if dq is not None:
            tdq = _add_transposed(_add_transposed(None, ds, tk, S), y, k, S)
            if tdq is not None:
                tdq *= call.scale
            _store_rows(dq, tdq, strides.dq, lead, row, call, "D", PACK, S)
        if y is not None and dk is not None:
            acc_k = _add(acc_k, y, q, S)
    return acc_k, acc_v


@triton.jit
def _output_block(acc_v, k, v, tk, tv, q, do, tq, tdo, to, dv, lse, tau, mask, seed, strides, head, row, call,
                  FLAT: constexpr, S: constexpr):  # fmt: skip
    """(10)-(12) and (18) of one block of rows of one head: writes tO with tau, adds to tdV. Scores are (rows, keys)."""
    lead = coordinates(head, call, FLAT)
    q = load_operand(at(q, strides.q, lead, S.VEC), row, call.N, strides.q, S.BLOCK_M, "D", S.EVEN_N, 1, S)
    tq = load_operand(at(tq, strides.tq, lead, S.VEC), row, call.N, strides.tq, S.BLOCK_M, "D", S.EVEN_N, 1, S)
    do = load_operand(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, 1, S)
    tdo = load_operand(at(tdo, strides.tdo, lead, S.VEC), row, call.N, strides.tdo, S.BLOCK_M, "E", S.EVEN_N, 1, S)
    pivots = pivot(tensors.load_row(at_row(lse, head, call), row, call.N, float("inf"), S.BLOCK_M, S.EVEN_N), S)
    x = softmax.scaled_scores(q, k, mask, strides, lead, row, 0, call, True, False, S)
    p = probabilities(x, pivots[:, None], S)
    if S.NATURAL:
        p = _with_unit_sums(p, tl.sum(p, 1)[:, None])
    keep = dropout.keep_factor(_seed_of(seed, strides, lead), head, row, 0, call, S.BLOCK_M, S.BLOCK_N, False)
    out = None
    ts = product_with_transposed(q, tk, product_with_transposed(tq, k, None, S), S)
    total = tl.zeros((S.BLOCK_M,), tl.float32)
    if ts is not None:
        total = tl.sum(p * ts, 1) * call.scale
        tp = rounded(drop(p * (ts * call.scale - total[:, None]), keep), v, S)  # (13)
        if dv is not None:
            acc_v = weighted_sum(transposed(tp), do, acc_v, S)
        if to is not None:
            out = weighted_sum(tp, v, out, S)
    weights = rounded(drop(p, keep), v, S)
    if dv is not None and tdo is not None:
        acc_v = weighted_sum(transposed(weights), tdo, acc_v, S)
    if to is not None:
        if tv is not None:
            out = weighted_sum(weights, tv, out, S)
        if out is None:
            out = _zeros(S.BLOCK_M, S.BLOCK_E, 1)
        tensors.store(at(to, strides.to, lead, S.VEC), out, row, call.N, strides.to, S.BLOCK_M, "E", S.EVEN_N, S)
        tensors.store_row(at_row(tau, head, call), total, row, call.N, S.BLOCK_M, S.EVEN_N)
    return acc_v


@device
def _first_head(total, call, PACK: constexpr, S: constexpr) -> Any:
    """The first head of this program."""
    first = tl.program_id(0) * PACK
    return heads_from(first * call.L3 if S.GROUPED else first, total, PACK)


@device
def _blocks(call, S: constexpr) -> Any:
    """Blocks of rows of a head, and of all heads of this program."""
    blocks = tl.cdiv(call.N, S.BLOCK_M)
    return blocks, blocks * call.L3 if S.GROUPED else blocks  # the query heads of one key head


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
    first = _first_head(total, call, PACK, S)
    lead = coordinates(first, call, FLAT)
    k_tile = load_operand(at(k, strides.k, lead, S.VEC), 0, call.M, strides.k, S.BLOCK_N, "D", S.EVEN_M, PACK, S)
    v_tile = load_operand(at(v, strides.v, lead, S.VEC), 0, call.M, strides.v, S.BLOCK_N, "E", S.EVEN_M, PACK, S)
    acc_k, acc_v = _zeros(S.BLOCK_N, S.BLOCK_D, PACK), _zeros(S.BLOCK_N, S.BLOCK_E, PACK)
    if ONE:
        acc_k, acc_v = _vjp_block(acc_k, acc_v, k_tile, v_tile, q, do, dq, dk, dv, lse, mask, seed, strides,
                                  first, 0, call, PACK, FLAT, S)  # fmt: skip
    else:
        blocks, count = _blocks(call, S)
        for i in range(0, count):
            head = _head_of(i, first, blocks, S)
            row = _row_of(i, blocks, S)
            acc_k, acc_v = _vjp_block(acc_k, acc_v, k_tile, v_tile, q, do, dq, dk, dv, lse, mask, seed, strides,
                                      head, row, call, PACK, FLAT, S)  # fmt: skip
    _store_keys(dk, dv, acc_k, acc_v, strides, lead, call, PACK, S)


@triton.jit
def _second_pass(k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, known, mask, seed, strides, first, call,
                 PACK: constexpr, FLAT: constexpr, ONE: constexpr, S: constexpr):  # fmt: skip
    """What is wanted of (10)-(18), in one walk over the rows."""
    acc_k, acc_v = _zeros(S.BLOCK_N, S.BLOCK_D, PACK), _zeros(S.BLOCK_N, S.BLOCK_E, PACK)
    if ONE:
        acc_k, acc_v = _second_block(acc_k, acc_v, k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, known, mask,
                                     seed, strides, first, 0, call, PACK, FLAT, S)  # fmt: skip
    else:
        blocks, count = _blocks(call, S)
        # What the compiler would take out of this loop are addresses, some thirty registers of them.
        for i in tl.range(0, count, disable_licm=True):
            head = _head_of(i, first, blocks, S)
            row = _row_of(i, blocks, S)
            acc_k, acc_v = _second_block(acc_k, acc_v, k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, known,
                                         mask, seed, strides, head, row, call, PACK, FLAT, S)  # fmt: skip
    lead = coordinates(first, call, FLAT)
    _store_keys(dk, dv, acc_k, acc_v, strides, lead, call, PACK, S)


@triton.jit
def _output_pass(k, v, tk, tv, q, do, tq, tdo, to, dv, lse, tau, mask, seed, strides, first, call,
                 FLAT: constexpr, S: constexpr):  # fmt: skip
    """tO, tau and tdV, as wanted, in one walk over the rows."""
    acc_v = _zeros(S.BLOCK_N, S.BLOCK_E, 1)
    blocks, count = _blocks(call, S)
    # Rows that are loaded ahead would take the shared memory of the second program of a multiprocessor.
    for i in tl.range(0, count, num_stages=1, disable_licm=True):
        head = _head_of(i, first, blocks, S)
        row = _row_of(i, blocks, S)
        acc_v = _output_block(acc_v, k, v, tk, tv, q, do, tq, tdo, to, dv, lse, tau, mask, seed, strides, head, row,
                              call, FLAT, S)  # fmt: skip
    _store_keys(None, dv, None, acc_v, strides, coordinates(first, call, FLAT), call, 1, S)


@triton.jit(do_not_specialize=["strides", "call", "total"])
def second_short_kernel(q, k, v, mask, seed, do, tq, tk, tv, tdo, to, dq, dk, dv, lse, tau, strides, call, total,
                        PACK: constexpr, FLAT: constexpr, ONE: constexpr, SECOND: constexpr,
                        S: constexpr):  # fmt: skip
    """All of (10)-(18) for the heads of one program.

    With S.APART in two walks over the rows: tO with tdV, then tdQ with tdK. 15 products instead of 12, and the
    registers of one accumulator. The first walk takes WGMMA_ROWS rows at a time, if its tile has as many, as (rows,
    keys): left operands are whole then, and the sum of a row stays in a warp. The second one has no registers for
    that, and takes those of SECOND.
    """
    first = _first_head(total, call, PACK, S)
    lead = coordinates(first, call, FLAT)
    k = load_operand(at(k, strides.k, lead, S.VEC), 0, call.M, strides.k, S.BLOCK_N, "D", S.EVEN_M, PACK, S)
    v = load_operand(at(v, strides.v, lead, S.VEC), 0, call.M, strides.v, S.BLOCK_N, "E", S.EVEN_M, PACK, S)
    tk = load_operand(at(tk, strides.tk, lead, S.VEC), 0, call.M, strides.tk, S.BLOCK_N, "D", S.EVEN_M, PACK, S)
    tv = load_operand(at(tv, strides.tv, lead, S.VEC), 0, call.M, strides.tv, S.BLOCK_N, "E", S.EVEN_M, PACK, S)
    if not S.APART:
        _second_pass(k, v, tk, tv, q, do, tq, tdo, to, dq, dk, dv, lse, tau, None, mask, seed, strides, first, call,
                     PACK, FLAT, ONE, S)  # fmt: skip
    else:
        if to is not None or dv is not None:
            if S.BLOCK_M >= WGMMA_ROWS:
                _output_pass(k, v, tk, tv, q, do, tq, tdo, to, dv, lse, tau, mask, seed, strides, first, call, FLAT, S)
            else:
                _second_pass(k, v, tk, tv, q, do, tq, tdo, to, None, None, dv, lse, tau, None, mask, seed, strides,
                             first, call, PACK, FLAT, False, SECOND)  # fmt: skip
        if dq is not None or dk is not None:
            known = None if to is None else tau
            if known is not None:
                tl.debug_barrier()  # other threads of this program have written it
            first += tl.minimum(call.N, 0)  # nothing, but the compiler keeps no address of the one walk for the other
            _second_pass(k, v, tk, tv, q, do, tq, tdo, None, dq, dk, None, lse, tau, known, mask, seed, strides, first,
                         call, PACK, FLAT, False, SECOND)  # fmt: skip
