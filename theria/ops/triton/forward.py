"""The output and lse (README (1)-(4)): one program per block of query rows, online softmax over the keys."""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands
from theria.ops.triton.dropout import drop, keep_factor
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.masks import key_range, own_rows
from theria.ops.triton.parts import factors, load_factors, with_parts
from theria.ops.triton.products import left_operand, load_operand, weighted_sum
from theria.ops.triton.softmax import logarithm, online_weights
from theria.ops.triton.tensors import at, at_row, constexpr, coordinates, store, store_row
from theria.ops.triton.tiles import select


@triton.jit
def _step(acc, total, top, q, keys, common, row, col, edge, S: constexpr):
    """One tile of keys: the maxima of the rows so far, in the unit of the scores; the sums of their weights and the
    weighted sums of V relative to them."""
    k, v, key_factors = keys
    mask, seed, strides, head, lead, call = common
    of_keys = load_factors(key_factors, head, col, call.M, S.BLOCK_N)
    k = load_operand(k, strides.k, lead, col, call.M, S.BLOCK_N, "D", S.EVEN_M, of_keys, 0, S)
    weight, shrink, higher = online_weights(top, q, k, mask, strides, lead, row, col, call, edge, S)
    total = total * shrink + tl.sum(weight, 1)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, False)
    v = load_operand(v, strides.v, lead, col, call.M, S.BLOCK_N, "E", S.EVEN_M, of_keys, 2, S)
    acc = weighted_sum(drop(weight, keep), v, acc * shrink[:, None], S)
    return acc, total, higher


@triton.jit(do_not_specialize=["strides", "call"])
def forward_kernel(q, k, v, mask, seed, o, lse, row_factors, key_factors, strides, call, S: constexpr):
    """``o`` (*L, N, E) and ``lse`` (*L, N) of one block of rows."""
    head, row = own_rows(call, S)
    lead = coordinates(head, call)
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    of_rows = load_factors(row_factors, head, row, call.N, S.BLOCK_M)
    q_tile = load_operand(q, strides.q, lead, row, call.N, S.BLOCK_M, "D", S.EVEN_N, of_rows, 0, S)
    q_tile = left_operand(q_tile, S)
    keys = (k, v, key_factors)
    common = (mask, seed, strides, head, lead, call)
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_E), tl.float32)
    total = tl.zeros((S.BLOCK_M,), tl.float32)
    top = tl.full((S.BLOCK_M,), float("-inf"), tl.float32)
    plain, end = key_range(row, call, S)
    for col in range(0, end, S.BLOCK_N):
        acc, total, top = _step(acc, total, top, q_tile, keys, common, row, col, col >= plain, S)
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees no key: o = 0, lse = −∞
    store(at(o, strides.o, lead, S.VEC), acc / total[:, None], row, call.N, strides.o, S.BLOCK_M, "E", S.EVEN_N, S)
    store_row(at_row(lse, head, call), logarithm(top, total, S), row, call.N, S.BLOCK_M, S.EVEN_N)


NAMES = ("q", "k", "v", "mask", "seed", "o")


def with_positive_scale(
    ops: Operands, tq: Tensor | None, spec: AttentionSpec
) -> tuple[Operands, Tensor | None, AttentionSpec]:
    """The same call with a positive scale and its sign in q and tq: the maximum of a row is taken before the scale."""
    if spec.scale > 0:
        return ops, tq, spec
    sign = -1 if spec.scale < 0 else 0
    spec = replace(spec, scale=-spec.scale or 1.0)
    return ops._replace(q=sign * ops.q), None if tq is None else sign * tq, spec


def forward(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """o, lse; see :func:`theria.ops.reference.forward`."""
    ops, _, spec = with_positive_scale(ops, None, spec)
    frame = with_parts(Frame(ops, spec), NAMES)
    tile = select("forward", frame)
    o, lse = frame.new_output(), frame.new_rows()
    tensors, strides, call, static = frame.describe(NAMES, tile)
    programs = -(-frame.N // tile.rows) * frame.heads
    launch(
        forward_kernel,
        programs,
        frame,
        (*tensors, lse, factors(frame, "rows"), factors(frame, "keys"), strides, call),
        static,
        tile,
    )
    return o, lse
