"""The output and its tangent at once (README (1)-(4), (10)-(12)): online softmax over the keys, scores computed once.

6 products where the forward and then the jvp take 7, and half the exponentials. The sums behind o and lse are in the
order of this kernel's tiles: they are as accurate as those of the forward and need not have its bits. Every derivative
computes P from the lse that comes with its o.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands, Tangents
from theria.ops.triton.dropout import drop, keep_factor
from theria.ops.triton.forward import with_positive_scale
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.masks import key_range, own_rows
from theria.ops.triton.parts import factors, load_factors, with_parts
from theria.ops.triton.products import left_operand, load_operand, score_product, weighted_sum
from theria.ops.triton.softmax import logarithm, online_weights
from theria.ops.triton.tensors import at, at_row, constexpr, coordinates, store, store_row
from theria.ops.triton.tiles import select


@triton.jit
def _step(acc, tacc, total, tau, top, q, tq, keys, common, row, col, edge, S: constexpr):
    """One tile of keys: the maxima of the rows so far and, relative to them, the sums of the weights and of the weights
    times tS, the weighted sums of V, and those of tS∘V and tV."""
    k, v, tk, tv, key_factors = keys
    mask, seed, strides, head, lead, call = common
    of_keys = load_factors(key_factors, head, col, call.M, S.BLOCK_N)
    k = load_operand(k, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
    tk = load_operand(tk, strides.tk, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 1, S)
    weight, shrink, higher = online_weights(top, q, k, mask, strides, lead, row, col, call, edge, S)
    ts = score_product(tq, k, None, False, S)
    ts = score_product(q, tk, ts, False, S)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, False)
    v = load_operand(v, strides.v, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 2, S)
    total = total * shrink + tl.sum(weight, 1)
    acc = weighted_sum(drop(weight, keep), v, acc * shrink[:, None], S)
    tacc = tacc * shrink[:, None]
    if ts is not None:
        w = weight * (ts * call.scale)
        tau = tau * shrink + tl.sum(w, 1)
        tacc = weighted_sum(drop(w, keep), v, tacc, S)
    if tv is not None:
        tv = load_operand(tv, strides.tv, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 3, S)
        tacc = weighted_sum(drop(weight, keep), tv, tacc, S)
    return acc, tacc, total, tau, higher


@triton.jit(do_not_specialize=["strides", "call"])
def forward_jvp_kernel(q, k, v, mask, seed, tq, tk, tv, o, to, lse, tau, row_factors, key_factors, strides, call,
                       S: constexpr):  # fmt: skip
    """``o``, ``to`` (*L, N, E) and ``lse``, ``tau`` (*L, N) of one block of rows."""
    head, row = own_rows(call, S)
    lead = coordinates(head, call)
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q_tile = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    tq_tile = load_operand(tq, strides.tq, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 1, S)
    q_tile = left_operand(q_tile, S)
    tq_tile = left_operand(tq_tile, S)
    keys = (k, v, tk, tv, key_factors)
    common = (mask, seed, strides, head, lead, call)
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_E), tl.float32)
    tacc = tl.zeros((S.BLOCK_M, S.BLOCK_E), tl.float32)
    total = tl.zeros((S.BLOCK_M,), tl.float32)
    sums = tl.zeros((S.BLOCK_M,), tl.float32)
    top = tl.full((S.BLOCK_M,), float("-inf"), tl.float32)
    plain, end = key_range(row, call, S)
    for col in range(0, end, S.BLOCK_N):
        acc, tacc, total, sums, top = _step(acc, tacc, total, sums, top, q_tile, tq_tile, keys, common, row, col,
                                            col >= plain, S)  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees no key: o = 0, lse = −∞
    sums /= total
    acc /= total[:, None]
    store(at(o, strides.o, lead, S.VEC), acc, row, call.N, strides.o, S.BLOCK_M, "E", S.EVEN_N, S)
    tacc = tacc / total[:, None] - sums[:, None] * acc
    store(at(to, strides.to, lead, S.VEC), tacc, row, call.N, strides.to, S.BLOCK_M, "E", S.EVEN_N, S)
    store_row(at_row(lse, head, call), logarithm(top, total, S), row, call.N, S.BLOCK_M, S.EVEN_N)
    store_row(at_row(tau, head, call), sums, row, call.N, S.BLOCK_M, S.EVEN_N)


OPERANDS = ("q", "k", "v", "tq", "tk", "tv")
NAMES = ("q", "k", "v", "mask", "seed", "tq", "tk", "tv", "o", "to")


def forward_jvp(ops: Operands, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, lse, to, tau; see :func:`theria.ops.reference.forward` and :func:`theria.ops.reference.jvp`."""
    ops, tq, spec = with_positive_scale(ops, t.q, spec)
    frame = with_parts(Frame(ops, spec, tq=tq, tk=t.k, tv=t.v), OPERANDS)
    tile = select("forward_jvp", frame)
    o, lse, to, tau = frame.new_output(), frame.new_rows(), frame.new_output("to"), frame.new_rows()
    tensors, strides, call, static = frame.describe(NAMES, tile)
    programs = -(-frame.N // tile.rows) * frame.heads
    parts = factors(frame, "rows"), factors(frame, "keys")
    launch(forward_jvp_kernel, programs, frame, (*tensors, lse, tau, *parts, strides, call), static, tile)
    return o, lse, to, tau
