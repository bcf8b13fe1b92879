"""Closed formulas of every order in plain PyTorch: the truth that other backends are held to.

Materialised (an (N, M) matrix at every order), in the dtype of the inputs (float64 in, float64 out), and itself
differentiable by autograd to any order: every rule computes all it needs from the operands, and the residuals that its
signature shares with the other backends are not read, since autograd would take them for constants.

Numbers in parentheses are those of ``theria/ops/README.md``. Operands are in the canonical form of
:mod:`theria.ops.operands`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from theria.ops.dropout import keep_mask, keep_scale
from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents, batch_shape, sum_to
from theria.ops.transforms import without_autocast

NEG_INF = float("-inf")
Rule = TypeVar("Rule", bound=Callable[..., Any])


def _own_dtypes(rule: Rule) -> Rule:
    """The rule in the dtype of its inputs, also under autocast."""

    @wraps(rule)
    def run(*args: Any) -> Any:
        return without_autocast(rule, *args)

    return run  # type: ignore[return-value]


def scores(ops: Operands, spec: AttentionSpec) -> Tensor:
    """S (1), with −inf where a key is hidden; with an additive mask at least float32."""
    S = (ops.q @ ops.k.mT) * spec.scale
    if ops.mask is not None:
        S = S.masked_fill(~ops.mask, NEG_INF) if ops.mask.dtype == torch.bool else S.to(_wider(S, ops.mask)) + ops.mask
    if spec.is_causal:
        N, M = S.shape[-2:]
        S = S.masked_fill(torch.ones(N, M, dtype=torch.bool, device=S.device).triu(1), NEG_INF)
    return S


def _wider(S: Tensor, mask: Tensor) -> torch.dtype:
    """What scores under an additive mask are added up in: half precision would lose them beside a large number."""
    return torch.promote_types(torch.promote_types(S.dtype, mask.dtype), torch.float32)


def softmax(S: Tensor) -> tuple[Tensor, Tensor]:
    """P and lse (2). A row without a visible key gives P = 0 and lse = −inf, and zero derivatives of every order.

    The pivot is a constant: shifting a row by it changes neither P nor lse, whatever it is.
    """
    if S.shape[-1] == 0:
        return S, S.new_full(S.shape[:-1], NEG_INF)
    pivot = S.detach().amax(-1, keepdim=True)
    pivot = pivot.masked_fill(pivot == NEG_INF, 0.0)
    weight = (S - pivot).exp()
    total = weight.sum(-1, keepdim=True)
    hidden = total == 0
    total = total.masked_fill(hidden, 1.0)
    lse = (pivot + total.log()).masked_fill(hidden, NEG_INF)
    return weight / total, lse.squeeze(-1)


def _probabilities(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """P and lse (2) in the dtype of the operands."""
    P, lse = softmax(scores(ops, spec))
    return P.to(ops.q.dtype), lse.to(ops.q.dtype)


def dropout_factor(ops: Operands, spec: AttentionSpec, like: Tensor) -> Tensor | float:
    """R (3): 0 for a dropped entry of P, 1/(1 − p) for a kept one."""
    if ops.seed is None:
        return 1.0
    keep = keep_mask(ops.seed, spec, range(like.shape[-2]), like.shape[-1])
    return keep.to(like.dtype) * keep_scale(spec.dropout_p)


@_own_dtypes
def forward(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """O (4) and lse (2)."""
    P, lse = _probabilities(ops, spec)
    o = (P * dropout_factor(ops, spec, P)) @ ops.v
    return o, lse.expand(o.shape[:-1])


@_own_dtypes
def vjp(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes):
    """Cotangents of q, k, v and mask (5)-(9); ``shapes`` are those to reduce them to, None where not wanted."""
    del o, lse
    P, R = _weights(ops, spec)
    dS = P * _centred(R * (do @ ops.v.mT), P)
    return _reduce(spec.scale * dS @ ops.k, spec.scale * dS.mT @ ops.q, (R * P).mT @ do, dS, ops, shapes)


@_own_dtypes
def jvp(ops: Operands, o: Tensor, lse: Tensor, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """tO (12) and tau (11), the tangent of lse."""
    del o
    P, R = _weights(ops, spec)
    tS = _score_tangent(ops, t, spec, P)
    to = (R * P * _centred(tS, P)) @ ops.v
    if t.v is not None:
        to = to + (R * P) @ t.v
    return to, (P * tS).sum(-1).expand(lse.shape)


@_own_dtypes
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
    """Tangent of :func:`vjp` (13)-(18) along ``t`` and ``tdo``."""
    del o, lse, to, tau
    P, R = _weights(ops, spec)
    tP = P * _centred(_score_tangent(ops, t, spec, P), P)
    dP = R * (do @ ops.v.mT)
    tdP = torch.zeros_like(dP) if t.v is None else R * (do @ t.v.mT)
    tdv = (R * tP).mT @ do
    if tdo is not None:
        tdP = tdP + R * (tdo @ ops.v.mT)
        tdv = tdv + (R * P).mT @ tdo
    dS = P * _centred(dP, P)
    tdelta = (tP * dP + P * tdP).sum(-1, keepdim=True)
    tdS = tP * _centred(dP, P) + P * (tdP - tdelta)
    tdq, tdk = tdS @ ops.k, tdS.mT @ ops.q
    if t.k is not None:
        tdq = tdq + dS @ t.k
    if t.q is not None:
        tdk = tdk + dS.mT @ t.q
    return _reduce(spec.scale * tdq, spec.scale * tdk, tdv, tdS, ops, shapes)


@_own_dtypes
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
    del o, lse, tau1, tau2
    P, R = _weights(ops, spec)
    U1 = _centred(_score_tangent(ops, t1, spec, P), P)
    U2 = _centred(_score_tangent(ops, t2, spec, P), P)
    ttS = _score_tangent(ops, t12, spec, P)
    if t1.q is not None and t2.k is not None:
        ttS = ttS + spec.scale * (t1.q @ t2.k.mT)
    if t2.q is not None and t1.k is not None:
        ttS = ttS + spec.scale * (t2.q @ t1.k.mT)
    tto = (R * P * _centred(U1 * U2 + ttS, P)) @ ops.v
    for weight, tv in ((P * U1, t2.v), (P * U2, t1.v), (P, t12.v)):
        if tv is not None:
            tto = tto + (R * weight) @ tv
    return tto


def _weights(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor | float]:
    """P (2) and R (3)."""
    P, _ = _probabilities(ops, spec)
    return P, dropout_factor(ops, spec, P)


def _centred(x: Tensor, P: Tensor) -> Tensor:
    """x minus its mean under P in each row: what the derivative of softmax does to a tangent and to a cotangent."""
    return x - (P * x).sum(-1, keepdim=True)


def _score_tangent(ops: Operands, t: Tangents, spec: AttentionSpec, like: Tensor) -> Tensor:
    """tS (10) of a direction."""
    tS = torch.zeros_like(like)
    if t.q is not None:
        tS = tS + spec.scale * (t.q @ ops.k.mT)
    if t.k is not None:
        tS = tS + spec.scale * (ops.q @ t.k.mT)
    return tS if t.mask is None else (tS + t.mask).to(tS.dtype)


def _reduce(dq: Tensor, dk: Tensor, dv: Tensor, dS: Tensor, ops: Operands, shapes: Shapes):
    """Sum each cotangent over the dimensions in which its operand was broadcast."""
    batch = batch_shape(dq, dk, dv, ops.mask)
    dmask = dS.expand(*batch, *dS.shape[-2:])
    full = (dq, dk, dv, dmask if ops.mask is None or ops.mask.dtype == torch.bool else dmask.to(ops.mask.dtype))
    return tuple(None if shape is None else sum_to(x, shape) for x, shape in zip(full, shapes, strict=True))
