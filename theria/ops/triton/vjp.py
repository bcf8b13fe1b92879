"""Cotangents of the operands (README (5)-(8)): dQ by blocks of query rows, dK and dV by blocks of keys.

Two kernels, so that every sum stays in the registers of one program: nothing is added atomically, and every run gives
the same bits. What is not wanted is not compiled in.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Size, Tensor

from theria.ops.operands import AttentionSpec, Operands, Shapes
from theria.ops.triton.dropout import drop, keep_factor
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.masks import key_range, row_range
from theria.ops.triton.softmax import pivot, probabilities, product, scaled_scores, score_product
from theria.ops.triton.tensors import at, at_row, coordinates, load, load_row, store, store_row
from theria.ops.triton.tiles import select


@triton.jit
def _dot_rows(a, b):
    """rowsum(a∘b) in float32; 0 where one is absent."""
    if a is None or b is None:
        return 0.0
    else:
        return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)


@triton.jit(do_not_specialize=["strides", "call"])
def row_dots_kernel(o, do, tdo, to, delta, tdelta, strides, call, S: tl.constexpr):
    """``delta`` (6) and ``tdelta`` (15) of one block of rows."""
    blocks = tl.cdiv(call.N, S.BLOCK_M)
    head = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * S.BLOCK_M
    lead = coordinates(head, call)
    o = load(at(o, strides.o, lead, S.VEC), row, call.N, strides.o, S.BLOCK_M, "E", S.EVEN_N, S)
    do = load(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, S)
    store_row(at_row(delta, head, call), _dot_rows(do, o), row, call.N, S.BLOCK_M, S.EVEN_N)
    if tdelta is not None:
        tdo = load(at(tdo, strides.tdo, lead, S.VEC), row, call.N, strides.tdo, S.BLOCK_M, "E", S.EVEN_N, S)
        to = load(at(to, strides.to, lead, S.VEC), row, call.N, strides.to, S.BLOCK_M, "E", S.EVEN_N, S)
        tangent = _dot_rows(do, to) + _dot_rows(tdo, o)
        store_row(at_row(tdelta, head, call), tangent, row, call.N, S.BLOCK_M, S.EVEN_N)


def row_dots(frame: Frame) -> tuple[Tensor, Tensor | None]:
    """delta and tdelta (*L, N), float32, from what the frame holds of o, do, to and tdo; no tdelta without to."""
    tile = select("row_dots", frame)
    delta, tdelta = frame.new_rows(), frame.new_rows() if "to" in frame.tensors else None
    tensors, strides, call, static = frame.describe(("o", "do", "tdo", "to"), tile)
    programs = -(-frame.N // tile.rows) * frame.heads
    launch(row_dots_kernel, programs, frame, (*tensors, delta, tdelta, strides, call), static, tile)
    return delta, tdelta


@triton.jit
def _dq_step(acc, rows, keys, mask, seed, strides, lead, head, row, col, call, EDGE: tl.constexpr, S: tl.constexpr):
    """One tile of keys: adds dS K."""
    q, do, pivots, delta = rows
    k_at, v_at = keys
    EVEN: tl.constexpr = S.EVEN_M or not EDGE
    k = load(k_at, col, call.M, strides.k, S.BLOCK_N, "D", EVEN, S)
    v = load(v_at, col, call.M, strides.v, S.BLOCK_N, "E", EVEN, S)
    x = scaled_scores(q, k, mask, strides, lead, row, col, call, EDGE, False, S)
    dp = score_product(do, v, None, False, S)
    p = probabilities(x, pivots[:, None], q.dtype)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, False)
    ds = p * (drop(dp, keep) - delta[:, None])
    return product(ds.to(k.dtype), k, acc, S)


@triton.jit(do_not_specialize=["strides", "call"])
def vjp_dq_kernel(q, k, v, mask, seed, do, dq, lse, delta, strides, call, S: tl.constexpr):
    """dQ (8) of one block of rows."""
    blocks = tl.cdiv(call.N, S.BLOCK_M)
    head = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if S.CAUSAL:  # the longest first
        block = blocks - 1 - block
    row = block * S.BLOCK_M
    lead = coordinates(head, call)
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    lse_tile = load_row(at_row(lse, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N)
    rows = (
        load(at(q, strides.q, lead, S.VEC), row, call.N, strides.q, S.BLOCK_M, "D", S.EVEN_N, S),
        load(at(do, strides.do, lead, S.VEC), row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, S),
        pivot(lse_tile, q.dtype.element_ty),
        load_row(at_row(delta, head, call), row, call.N, 0.0, S.BLOCK_M, S.EVEN_N),
    )
    keys = (at(k, strides.k, lead, S.VEC), at(v, strides.v, lead, S.VEC))
    acc = tl.zeros((S.BLOCK_M, S.BLOCK_D), tl.float32)
    plain, end = key_range(row, call, S)
    for col in range(0, plain, S.BLOCK_N):
        acc = _dq_step(acc, rows, keys, mask, seed, strides, lead, head, row, col, call, False, S)
    if S.CAUSAL or not S.EVEN_M:
        for col in range(plain, end, S.BLOCK_N):
            acc = _dq_step(acc, rows, keys, mask, seed, strides, lead, head, row, col, call, True, S)
    store(at(dq, strides.dq, lead, S.VEC), acc * call.scale, row, call.N, strides.dq, S.BLOCK_M, "D", S.EVEN_N, S)


@triton.jit
def _dkv_step(
    acc_k, acc_v, keys, rows, lse, delta, mask, seed, strides, lead, head, row, col, call,
    EDGE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One tile of rows: adds dSᵀQ and P̃ᵀdO. Tiles of scores are (keys, rows)."""
    k, v = keys
    q_at, do_at = rows
    q = load(q_at, row, call.N, strides.q, S.BLOCK_M, "D", S.EVEN_N, S)
    do = load(do_at, row, call.N, strides.do, S.BLOCK_M, "E", S.EVEN_N, S)
    # a row past the end has lse = ∞ and with it P = 0
    pivots = pivot(load_row(lse, row, call.N, float("inf"), S.BLOCK_M, S.EVEN_N), q.dtype)
    x = scaled_scores(q, k, mask, strides, lead, row, col, call, EDGE, True, S)
    p = probabilities(x, pivots[None, :], q.dtype)
    keep = keep_factor(seed, head, row, col, call, S.BLOCK_M, S.BLOCK_N, True)
    if DV:
        acc_v = product(drop(p, keep).to(do.dtype), do, acc_v, S)
    if DK:
        centre = load_row(delta, row, call.N, 0.0, S.BLOCK_M, S.EVEN_N)
        ds = p * (drop(score_product(do, v, None, True, S), keep) - centre[None, :])
        acc_k = product(ds.to(q.dtype), q, acc_k, S)
    return acc_k, acc_v


@triton.jit
def _dkv_head(
    acc_k, acc_v, keys, q, do, lse, delta, mask, seed, strides, lead, head, col, call,
    DK: tl.constexpr, DV: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """What the rows of one query head add to a block of keys."""
    rows = (at(q, strides.q, lead, S.VEC), at(do, strides.do, lead, S.VEC))
    lse = at_row(lse, head, call)
    delta = at_row(delta, head, call)
    if seed is not None:
        seed = tl.load(at(seed, strides.seed, lead, 1))
    start, plain = row_range(col, call, S)
    if S.CAUSAL:
        for row in range(start, plain, S.BLOCK_M):
            acc_k, acc_v = _dkv_step(
                acc_k, acc_v, keys, rows, lse, delta, mask, seed, strides, lead, head, row, col, call, True, DK, DV, S
            )
    for row in range(plain, call.N, S.BLOCK_M):
        acc_k, acc_v = _dkv_step(
            acc_k, acc_v, keys, rows, lse, delta, mask, seed, strides, lead, head, row, col, call, False, DK, DV, S
        )
    return acc_k, acc_v


@triton.jit(do_not_specialize=["strides", "call"])
def vjp_dkv_kernel(q, k, v, mask, seed, do, dk, dv, lse, delta, strides, call, S: tl.constexpr):
    """dK (8) and dV (7) of one block of keys; with S.GROUPED summed over the query heads of a key head."""
    DK: tl.constexpr = dk is not None
    DV: tl.constexpr = dv is not None
    blocks = tl.cdiv(call.M, S.BLOCK_N)
    head = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * S.BLOCK_N
    if S.GROUPED:
        head = head * call.L3
    lead = coordinates(head, call)
    k_tile = load(at(k, strides.k, lead, S.VEC), col, call.M, strides.k, S.BLOCK_N, "D", S.EVEN_M, S)
    v_tile = load(at(v, strides.v, lead, S.VEC), col, call.M, strides.v, S.BLOCK_N, "E", S.EVEN_M, S)
    keys = (k_tile, v_tile)
    acc_k = tl.zeros((S.BLOCK_N, S.BLOCK_D) if DK else (1, 1), tl.float32)
    acc_v = tl.zeros((S.BLOCK_N, S.BLOCK_E) if DV else (1, 1), tl.float32)
    if S.GROUPED:
        for g in range(call.L3):
            acc_k, acc_v = _dkv_head(
                acc_k, acc_v, keys, q, do, lse, delta, mask, seed, strides, coordinates(head + g, call), head + g, col,
                call, DK, DV, S,
            )  # fmt: skip
    else:
        acc_k, acc_v = _dkv_head(
            acc_k, acc_v, keys, q, do, lse, delta, mask, seed, strides, lead, head, col, call, DK, DV, S
        )
    if DK:
        store(at(dk, strides.dk, lead, S.VEC), acc_k * call.scale, col, call.M, strides.dk, S.BLOCK_N, "D", S.EVEN_M, S)
    if DV:
        store(at(dv, strides.dv, lead, S.VEC), acc_v, col, call.M, strides.dv, S.BLOCK_N, "E", S.EVEN_M, S)


READS = ("q", "k", "v", "mask", "seed", "do")


def vjp(
    ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, None; see :func:`theria.ops.reference.vjp`."""
    frame = Frame(ops, spec, o=o, do=do)
    lse = frame.rows(lse)
    delta = row_dots(frame)[0] if any(shape is not None for shape in shapes[:2]) else None
    dq = _dq(frame, lse, delta, shapes[0])
    dk, dv = _dkv(frame, lse, delta, shapes[1], shapes[2])
    return dq, dk, dv, None


def _dq(frame: Frame, lse: Tensor, delta: Tensor | None, shape: Size | None) -> Tensor | None:
    if shape is None:
        return None
    dq = frame.new_cotangent("dq", shape)
    tile = select("vjp_dq", frame)
    tensors, strides, call, static = frame.describe((*READS, "dq"), tile)
    programs = -(-frame.N // tile.rows) * frame.heads
    launch(vjp_dq_kernel, programs, frame, (*tensors, lse, delta, strides, call), static, tile)
    return frame.finish(dq, shape)


def _dkv(
    frame: Frame, lse: Tensor, delta: Tensor | None, dk_shape: Size | None, dv_shape: Size | None
) -> tuple[Tensor | None, Tensor | None]:
    if dk_shape is None and dv_shape is None:
        return None, None
    tile = select("vjp_dkv", frame)
    if tile.split and dk_shape is not None and dv_shape is not None:
        return _dkv(frame, lse, delta, dk_shape, None)[0], _dkv(frame, lse, None, None, dv_shape)[1]
    grouped = frame.sums_last(dk_shape, dv_shape)
    dk, dv = frame.new_cotangent("dk", dk_shape, grouped), frame.new_cotangent("dv", dv_shape, grouped)
    written = tuple(name for name, x in (("dk", dk), ("dv", dv)) if x is not None)
    tensors, strides, call, static = frame.describe((*READS, *written), tile, grouped)
    programs = -(-frame.M // tile.keys) * (frame.heads // frame.lead[-1] if grouped else frame.heads)
    arguments = (*tensors[: len(READS)], dk, dv, lse, delta, strides, call)
    launch(vjp_dkv_kernel, programs, frame, arguments, static, tile)
    return frame.finish(dk, dk_shape), frame.finish(dv, dv_shape)
