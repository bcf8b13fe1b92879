"""The formulas of :mod:`theria.ops.reference` over blocks of query rows: linear memory on any device, no Triton.

A block of rows holds all M keys, so that no (N, M) array is ever alive for all rows, and each row statistic is exact
within its block: delta is rowsum(P∘dP), not rowsum(dO∘O) of an output that was rounded to half precision, and neither O
nor tO is read. Causal blocks read only the keys that one of their rows sees. bf16 and fp16 are computed in float32.
Signatures are those of the reference; here nothing is recorded by autograd (:mod:`theria.ops.autograd` routes).

Numbers in parentheses are those of ``theria/ops/README.md``.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents
from theria.ops.sweep import NEG_INF, Block, Cotangents, Sweep, add, add_product, cut, matmul, mul, sub


def forward(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """O (4) and lse (2)."""
    sweep = Sweep(ops, spec)
    o = sweep.zeros(sweep.N, sweep.v.shape[-1])
    lse = sweep.zeros(sweep.N).fill_(NEG_INF)
    for rows, cols in sweep.slices() if sweep.M else ():
        S = sweep.scores(rows, cols)
        pivot = S.amax(-1, keepdim=True)
        pivot.masked_fill_(pivot == NEG_INF, 0.0)
        weight = S.sub_(pivot).exp_()
        total = weight.sum(-1, keepdim=True)
        cut(lse, rows, -1).copy_((pivot + total.log()).squeeze(-1))
        if (keep := sweep.keep(rows, cols)) is not None:
            weight = mul(weight, keep)
        row = cut(o, rows)
        matmul(weight, cut(sweep.v, cols), into=row)
        row /= total.masked_fill_(total == 0, 1.0)
    return o.to(sweep.out_dtype), lse


def vjp(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes):
    """Cotangents of q, k, v and mask (5)-(9); ``shapes`` are those to reduce them to, None where not wanted."""
    del o
    sweep = Sweep(ops, spec, lse, (do,))
    do = sweep.read(do)
    out = Cotangents(sweep, shapes, do)
    for b in sweep.blocks():
        do_b = cut(do, b.rows)
        out.add_v(b, b.P, do_b)
        if out.wants_scores:
            dS = b.centred(mul(b.dropped(matmul(do_b, cut(sweep.v, b.cols).mT)), b.P))
            out.add_qk(b, dS, ops.q, ops.k)
            out.add_mask(b, dS)
    return out.results()


def jvp(ops: Operands, o: Tensor, lse: Tensor, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """tO (12) and tau (11), the tangent of lse."""
    sweep = Sweep(ops, spec, lse, t)
    like = sweep.carrier(t)
    to, tau = sweep.zeros(*o.shape[-2:], like=like), sweep.zeros(sweep.N, like=like)
    for b in sweep.blocks():
        row = cut(to, b.rows)
        if (tS := sweep.score_tangent(t, b)) is not None:
            W = mul(tS, b.P)
            cut(tau, b.rows, -1).copy_(W.sum(-1))
            matmul(b.dropped(b.centred(W)), cut(sweep.v, b.cols), into=row)
        if t.v is not None:
            matmul(b.dropped(b.P), sweep.read(cut(t.v, b.cols)), into=row)
    return to.to(sweep.out_dtype), tau


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
):
    """Tangent of :func:`vjp` (13)-(18) along ``t`` and ``tdo``; ``to`` and ``tau`` are what :func:`jvp` gave."""
    del o, to
    sweep = Sweep(ops, spec, lse, (do, tdo, *t))
    do, tdo = sweep.read(do), None if tdo is None else sweep.read(tdo)
    out = Cotangents(sweep, shapes, sweep.carrier(t, do, tdo))
    for b in sweep.blocks():
        do_b, tdo_b = cut(do, b.rows), None if tdo is None else cut(tdo, b.rows)
        U = sweep.score_tangent(t, b)
        if U is not None:
            U = sub(U, cut(tau, b.rows, -1)[..., None])  # tP = P∘U (13)
            out.add_v(b, U * b.P, do_b)
        if tdo_b is not None:
            out.add_v(b, b.P, tdo_b)
        if out.wants_scores:
            dS = b.centred(mul(b.dropped(matmul(do_b, cut(sweep.v, b.cols).mT)), b.P))
            tdS = b.centred(_tangent(b, U, dS, _tdP(sweep, b, t, do_b, tdo_b)))
            out.add_qk(b, tdS, ops.q, ops.k)
            out.add_qk(b, dS, t.q, t.k)
            out.add_mask(b, tdS)
    return out.results()


def _tdP(sweep: Sweep, b: Block, t: Tangents, do: Tensor, tdo: Tensor | None) -> Tensor | None:
    """tdP (14) of a block; None where neither the values nor the cotangent move."""
    tdP = None if t.v is None else matmul(do, sweep.read(cut(t.v, b.cols)).mT)
    if tdo is not None:
        tdP = matmul(tdo, cut(sweep.v, b.cols).mT, into=tdP)
    return None if tdP is None else b.dropped(tdP)


def _tangent(b: Block, U: Tensor | None, dS: Tensor, tdP: Tensor | None) -> Tensor:
    """tP∘(dP − delta) + P∘tdP with tP = P∘U, which is tdS (16) but for its row sums, tdelta."""
    if tdP is None:
        return torch.zeros_like(dS) if U is None else U * dS
    x = mul(tdP, b.P)
    return x if U is None else add_product(x, U, dS)


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
    """Mixed second tangent of O (19)-(22) along ``t1`` and ``t2``, with ``t12`` the mixed tangents of the operands."""
    sweep = Sweep(ops, spec, lse, (*t1, *t2, *t12))
    like = sweep.carrier(t1) + sweep.carrier(t2) + sweep.carrier(t12)
    tto = sweep.zeros(*o.shape[-2:], like=like)
    for b in sweep.blocks():
        row = cut(tto, b.rows)
        U1, U2 = sweep.score_tangent(t1, b), sweep.score_tangent(t2, b)
        U1 = None if U1 is None else sub(U1, cut(tau1, b.rows, -1)[..., None])
        U2 = None if U2 is None else sub(U2, cut(tau2, b.rows, -1)[..., None])
        parts = (
            None if U1 is None or U2 is None else U1 * U2,
            sweep.score_tangent(t12, b),
            sweep.cross_tangent(t1, t2, b),
            sweep.cross_tangent(t2, t1, b),
        )
        if present := [part for part in parts if part is not None]:
            X = b.centred(mul(reduce(add, present), b.P))
            matmul(b.dropped(X), cut(sweep.v, b.cols), into=row)
        for weight, tv in ((U1, t2.v), (U2, t1.v)):
            if weight is not None and tv is not None:
                matmul(b.dropped(b.P * weight), sweep.read(cut(tv, b.cols)), into=row)
        if t12.v is not None:
            matmul(b.dropped(b.P), sweep.read(cut(t12.v, b.cols)), into=row)
    return tto.to(sweep.out_dtype)
