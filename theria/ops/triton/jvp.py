"""Tangent of the output and of lse (README (10)-(12)): one program per block of query rows, over the keys."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands, Tangents
from theria.ops.triton.dropout import drop, keep_factor
from theria.ops.triton.forward_jvp import forward_jvp
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.masks import key_range, own_rows
from theria.ops.triton.parts import factors, load_factors, reading, with_parts
from theria.ops.triton.products import left_operand, load_operand, score_product, weighted_sum
from theria.ops.triton.row_stats import PADDING, new_stats, row_dot, store_stats
from theria.ops.triton.shifts import shifted, tangent_shift, total
from theria.ops.triton.softmax import exponential, exponents, pivot
from theria.ops.triton.tensors import at, at_row, constexpr, coordinates, load, load_row, store, store_row
from theria.ops.triton.tiles import select


@triton.jit
def _step(acc, tau, q, tq, pivots, shift, keys, common, row, col, edge, S: constexpr):
    """One tile of keys: adds to (P̃∘tS)V + P̃tV and to tau, where tS is less the shift of its row."""
    k, v, tk, tv, key_factors = keys
    mask, seed, strides, head, lead, call = common
    of_keys = load_factors(key_factors, head, col, call.M, S.BLOCK_N)
    k = load_operand(k, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
    tk = load_operand(tk, strides.tk, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 1, S)
    x = exponents(q, k, pivots[:, None], mask, strides, lead, row, col, call, edge, False, S)
    p = exponential(x, S)
    ts = score_product(tq, k, None, False, S)
    ts = score_product(q, tk, ts, False, S)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, False)
    if ts is not None:
        w = p * shifted(ts, shift, call)
        tau += tl.sum(w, 1)
        v = load_operand(v, strides.v, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 2, S)
        acc = weighted_sum(drop(w, keep), v, acc, S)
    if tv is not None:
        tv = load_operand(tv, strides.tv, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 3, S)
        acc = weighted_sum(drop(p, keep), tv, acc, S)
    return acc, tau


@triton.jit(do_not_specialize=["strides", "call"])
def jvp_kernel(q, k, v, mask, seed, o, tq, tk, tv, to, do, tdo, lse, tau, stats, row_factors, key_factors, strides,
               call, S: constexpr):  # fmt: skip
    """``to`` (*L, N, E) and ``tau`` (*L, N) of one block of rows; with ``do`` also what the hvp needs of its rows."""
    head, row = own_rows(call, S)
    lead = coordinates(head, call)
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q_tile = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    tq_tile = load_operand(tq, strides.tq, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 1, S)
    lse_row = load_row(at_row(lse, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N)
    pivots = pivot(lse_row, S)
    where = (mask, strides.mask, lead, row, call)
    shift = tangent_shift(q_tile, tq_tile, k, tk, strides, lse_row, where, S)
    q_tile = left_operand(q_tile, S)
    tq_tile = left_operand(tq_tile, S)
    keys = (k, v, tk, tv, key_factors)
    common = (mask, seed, strides, head, lead, call)
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_E), tl.float32)
    sums = tl.zeros((S.BLOCK_M,), tl.float32)
    plain, end = key_range(row, call, S)
    for col in range(0, end, S.BLOCK_N):
        acc, sums = _step(acc, sums, q_tile, tq_tile, pivots, shift, keys, common, row, col, col >= plain, S)
    o_tile = load(at(o, strides.o, lead, S.VEC), row, call.N, strides.o, S.BLOCK_M, "E", S.EVEN_N, S)
    if tq is not None or tk is not None:
        acc -= sums[:, None] * o_tile.to(tl.float32)
        sums = total(sums, shift)
    store(at(to, strides.to, lead, S.VEC), acc, row, call.N, strides.to, S.BLOCK_M, "E", S.EVEN_N, S)
    store_row(at_row(tau, head, call), sums, row, call.N, S.BLOCK_M, S.EVEN_N)
    if stats is not None:
        do = load(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, S)
        tdo = load(at(tdo, strides.tdo, lead, S.VEC), row, call.N, strides.tdo, S.BLOCK_M, "E", S.EVEN_N, S)
        tdelta = row_dot(do, acc) + row_dot(tdo, o_tile)
        store_stats(stats, pivots, row_dot(do, o_tile), sums, tdelta, head, row, call, S)


OPERANDS = ("q", "k", "v", "tq", "tk", "tv")
NAMES = ("q", "k", "v", "mask", "seed", "o", "tq", "tk", "tv", "to", "do", "tdo")


class Left(NamedTuple):
    """What a jvp leaves to the hvp along the same direction.

    Attributes:
        frame: all tensors of both, and the parts of those that either multiplies.
        stats: the packed row statistics; None where the rows of their padding would need programs of their own.
    """

    frame: Frame
    stats: Tensor | None


def jvp(ops: Operands, o: Tensor, lse: Tensor, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """to, tau; see :func:`theria.ops.reference.jvp`."""
    return jvp_before_hvp(ops, o, lse, None, t, None, spec)[:2]


def jvp_before_hvp(
    ops: Operands, o: Tensor, lse: Tensor, do: Tensor | None, t: Tangents, tdo: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor, Left | None]:
    """to, tau, and what spares the hvp with ``do`` a pass over its rows and the parts of its operands.

    Nothing is left without ``do``, nor with an additive mask: lse does not make the rows of P add up to 1 then
    (:mod:`theria.ops.triton.row_sums`), and the kernel that computes their sums beside the tangent takes the place of
    this one.
    """
    if ops.additive:
        return *forward_jvp(ops, t, spec)[2:], None
    whole = Frame(ops, spec, o=o, tq=t.q, tk=t.k, tv=t.v, do=do, tdo=tdo)
    whole = with_parts(whole, OPERANDS if do is None else (*OPERANDS, "do", "tdo"))
    frame = reading(whole, OPERANDS)
    stats = new_stats(frame, 4) if do is not None and frame.N % PADDING.value == 0 else None
    tile = select("jvp", frame)
    lse, tau = frame.rows(lse), frame.new_rows()
    to = frame.new("to", "q", (*frame.lead, frame.N, frame.E))
    tensors, strides, call, static = frame.describe(NAMES, tile)
    programs = -(-frame.N // tile.rows) * frame.heads
    of_rows, of_keys = factors(frame, "rows"), factors(frame, "keys")
    launch(jvp_kernel, programs, frame, (*tensors, lse, tau, stats, of_rows, of_keys, strides, call), static, tile)
    return to, tau, None if do is None else Left(whole, stats)
