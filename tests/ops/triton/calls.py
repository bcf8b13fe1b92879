"""Calls of the kernels, and what a test compares them with: the reference in float64."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton sees a kernel

from theria.ops import reference
from theria.ops.operands import AttentionSpec, Operands, Tangents, batch_shape, default_scale, with_dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEG_INF = float("-inf")
Call = tuple[Operands, AttentionSpec]
# (N, M, D, E): one row, one key, one column; nothing a multiple of a tile; N < M and N > M; E ≠ D; whole tiles.
SHAPES = [(5, 7, 3, 4), (33, 70, 40, 24), (70, 33, 8, 17), (1, 129, 16, 16), (9, 1, 1, 1), (64, 128, 16, 16)]


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, p: float = 0.0, **options: Any) -> Call:
    """A call in canonical form; ``options`` are fields of AttentionSpec."""
    fields: dict[str, Any] = {"scale": default_scale(q.shape[-1])} | options
    spec = AttentionSpec("triton", **fields, dropout_p=p)
    ops = Operands(q, k, v, mask, None)
    return with_dropout(ops, spec, 7) if p else (ops, spec)


def random_call(N: int, M: int, D: int, E: int, lead=(2,), dtype=torch.float32, mask=None, **options: Any) -> Call:
    q, k, v = (make(*lead, *shape, dtype=dtype) for shape in ((N, D), (M, D), (M, E)))
    return call(q, k, v, mask, **options)


class Case(NamedTuple):
    """A call, the cotangent of its output, a direction of both, and the shapes of the wanted results."""

    ops: Operands
    spec: AttentionSpec
    do: Tensor
    t: Tangents
    tdo: Tensor | None
    shapes: tuple


def case(ops: Operands, spec: AttentionSpec, present=(True,) * 4, wanted=(True,) * 3) -> Case:
    """``present``: which of tq, tk, tv, tdo are given; ``wanted``: which of tdq, tdk, tdv."""
    lead = batch_shape(*ops)
    do, tdo = (make(*lead, ops.q.shape[-2], ops.v.shape[-1], dtype=ops.q.dtype) for _ in range(2))
    t = (make(*x.shape, dtype=x.dtype) if given else None for x, given in zip(ops[:3], present[:3], strict=True))
    shapes = (*(x.shape if want else None for x, want in zip(ops[:3], wanted, strict=True)), None)
    return Case(ops, spec, do, Tangents(*t), tdo if present[3] else None, shapes)


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def exact(ops: Operands) -> Operands:
    """The same operands in float64."""
    return Operands(*(None if x is None else double(x) for x in ops))  # type: ignore[arg-type]


def exact_tangents(t: Tangents) -> Tangents:
    """The same direction in float64."""
    return Tangents(*(None if x is None else double(x) for x in t))


def by_reference(c: Case) -> tuple[Any, ...]:
    """to, tau, tdq, tdk, tdv by the reference in the dtype of the case, where every array is rounded."""
    o, lse = reference.forward(c.ops, c.spec)
    to, tau = reference.jvp(c.ops, o, lse, c.t, c.spec)
    return to, tau, *reference.hvp(c.ops, o, lse, c.do, c.t, c.tdo, to, tau, c.spec, c.shapes)[:3]


def truth_of(c: Case) -> tuple[Any, ...]:
    """The same in float64."""
    tdo = None if c.tdo is None else c.tdo.double()
    return by_reference(c._replace(ops=exact(c.ops), do=c.do.double(), t=exact_tangents(c.t), tdo=tdo))


def error(actual: Tensor, truth: Tensor) -> float:
    """Relative, in the norm; infinite where a NaN is or the infinities differ."""
    assert actual.shape == truth.shape
    finite = truth.isfinite()
    if not torch.equal(actual[~finite].double(), truth[~finite]) or not actual[finite].isfinite().all():
        return float("inf")
    difference = (actual.double() - truth)[finite].norm()
    return float(difference / truth[finite].norm().clamp_min(1e-30))


def masks(N: int, M: int) -> dict[str, Tensor]:
    """Masks of every kind for operands with leading shape (2, 2)."""
    boolean = torch.rand(2, 2, N, M, device=DEVICE) > 0.3
    additive = make(2, 2, N, M)
    return {
        "boolean": boolean,
        "boolean, all heads": boolean[:, :1],
        "boolean, rows": boolean[:1, :1, :, :1],
        "key padding": (torch.arange(M, device=DEVICE) < torch.tensor([[M // 2], [M]], device=DEVICE))[:, None, None],
        "strided": (torch.rand(2, 2, M, N, device=DEVICE) > 0.3).mT,
        "additive": additive,
        "additive, keys": additive[:, :1, :1],
        "additive, with -inf": additive.masked_fill(boolean, NEG_INF),
    }


MASKS = tuple(masks(1, 1))
