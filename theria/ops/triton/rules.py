"""The rules of ``backend="triton"``, under the signatures of :mod:`theria.ops.reference`: each chooses its kernels.

A call without a single score (no batch, no row or no key) and a zero direction launch nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from theria.ops.checks import UnsupportedError
from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents, batch_shape
from theria.ops.transforms import traced
from theria.ops.triton import forward as forward_kernels
from theria.ops.triton import forward_jvp as forward_jvp_kernels
from theria.ops.triton import hvp as hvp_kernels
from theria.ops.triton import jvp as jvp_kernels
from theria.ops.triton import jvp_dq as jvp_dq_kernels
from theria.ops.triton import jvp_jvp as jvp_jvp_kernels
from theria.ops.triton import plans, short
from theria.ops.triton import vjp as vjp_kernels
from theria.ops.triton.launch import Frame
from theria.ops.triton.library import operator

Cotangents = tuple[Tensor | None, ...]


@dataclass(slots=True)
class Sizes:
    """What the choice between kernels for short and for long sequences depends on."""

    N: int
    M: int
    D: int
    E: int


# What each rule returns, not written yet: also what a compiler is told about shapes, dtypes and strides.


def new_forward(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    frame = Frame(ops, spec)
    return frame.new_output(), frame.new_rows()


def new_vjp(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes) -> Cotangents:
    return Frame(ops, spec, o=o, do=do).new_cotangents(shapes)


def new_jvp(ops: Operands, o: Tensor, lse: Tensor, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    frame = Frame(ops, spec, o=o, tq=t.q, tk=t.k, tv=t.v)
    return frame.new_output(), frame.new_rows()


def new_forward_jvp(ops: Operands, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, lse = new_forward(ops, spec)
    return (o, lse, *new_jvp(ops, o, lse, t, spec))


def new_hvp(
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
) -> Cotangents:
    return Frame(ops, spec, o=o, do=do, tq=t.q, tk=t.k, tv=t.v, tdo=tdo, to=to).new_cotangents(shapes)


def new_jvp_jvp(
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
    first, second = {"tq": t1.q, "tk": t1.k, "tv": t1.v}, {"tq2": t2.q, "tk2": t2.k, "tv2": t2.v}
    return Frame(ops, spec, o=o, **first, **second, ttq=t12.q, ttk=t12.k, ttv=t12.v).new_output()


def new_jvp_hvp(
    ops: Operands,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dq: Tensor | None,
    t: Tangents,
    tdo: Tensor | None,
    spec: AttentionSpec,
    shapes: Shapes,
) -> tuple[Any, ...]:
    del dq
    to, tau = new_jvp(ops, o, lse, t, spec)
    return (to, tau, *new_hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes))


def _zero(results: Any) -> Any:
    plans.unplanned()
    if isinstance(results, Tensor):
        return results.zero_()
    return tuple(None if x is None else x.zero_() for x in results)


def _empty(ops: Operands) -> bool:
    """Whether a call has no score."""
    return ops.q.numel() == 0 or ops.k.numel() == 0


def _short(ops: Operands) -> bool:
    """Whether one program can hold all keys of a head."""
    sizes = Sizes(ops.q.shape[-2], ops.k.shape[-2], ops.q.shape[-1], ops.v.shape[-1])
    return short.fits(sizes, ops.q.dtype, ops.q.device)


def _still(t: Tangents) -> bool:
    """Whether a direction is zero."""
    return t.q is None and t.k is None and t.v is None


def _refuse_mask(*xs: Any) -> None:
    """A mask that takes part in a derivative is refused with the call; this is for what nests too deep to see there."""
    if any(x is not None for x in xs):
        raise UnsupportedError(
            "backend 'triton' gives no derivative with respect to attn_mask, and one is asked for; "
            "backend='custom' can."
        )


@operator(new_forward)
def forward(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """o, lse; see :func:`theria.ops.reference.forward`."""
    if _empty(ops):
        plans.unplanned()
        o, lse = new_forward(ops, spec)
        return o.zero_(), lse.fill_(float("-inf"))
    return forward_kernels.forward(ops, spec)


@operator(new_vjp)
def vjp(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes) -> Cotangents:
    """dq, dk, dv, None; see :func:`theria.ops.reference.vjp`."""
    _refuse_mask(shapes[3])
    if _empty(ops):
        return _zero(new_vjp(ops, o, lse, do, spec, shapes))
    run = short.vjp_short if _short(ops) else vjp_kernels.vjp
    return run(ops, o, lse, do, spec, shapes)


@operator(new_jvp)
def jvp(ops: Operands, o: Tensor, lse: Tensor, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """to, tau; see :func:`theria.ops.reference.jvp`."""
    _refuse_mask(t.mask)
    if _empty(ops) or _still(t):
        return _zero(new_jvp(ops, o, lse, t, spec))
    return jvp_kernels.jvp(ops, o, lse, t, spec)


@operator(new_forward_jvp)
def forward_jvp(ops: Operands, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, lse, to, tau: forward and jvp."""
    _refuse_mask(t.mask)
    # a map over tangents alone leaves what forward returns smaller than what jvp returns
    if _empty(ops) or _still(t) or batch_shape(*ops) != batch_shape(*ops, *t):
        o, lse = forward(ops, spec)
        return (o, lse, *jvp(ops, o, lse, t, spec))
    return forward_jvp_kernels.forward_jvp(ops, t, spec)


@operator(new_hvp)
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
) -> Cotangents:
    """tdq, tdk, tdv, None; see :func:`theria.ops.reference.hvp`."""
    _refuse_mask(t.mask, shapes[3])
    if _still(t) and tdo is not None:
        return vjp(ops, o, lse, tdo, spec, shapes)
    if _empty(ops) or _still(t):
        return _zero(new_hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes))
    run = short.hvp_short if _short(ops) else hvp_kernels.hvp
    return run(ops, o, lse, do, t, tdo, to, tau, spec, shapes)


@operator(new_jvp_jvp)
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
    _refuse_mask(t1.mask, t2.mask, t12.mask)
    if _empty(ops):
        return _zero(new_jvp_jvp(ops, o, lse, t1, t2, t12, tau1, tau2, spec))
    return jvp_jvp_kernels.jvp_jvp(ops, o, lse, t1, t2, t12, tau1, tau2, spec)


def uses_dq(ops: Operands, o: Tensor, do: Tensor, dq: Tensor | None) -> bool:
    """Whether :func:`jvp_hvp` of a call has a use for dQ of the vjp; in a graph that is for any length, it may."""
    if dq is None or traced():
        return dq is not None
    return not _empty(ops) and not _short(ops) and jvp_dq_kernels.takes(ops, o, do, dq, dq.shape)


@operator(new_jvp_hvp)
def jvp_hvp(
    ops: Operands,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dq: Tensor | None,
    t: Tangents,
    tdo: Tensor | None,
    spec: AttentionSpec,
    shapes: Shapes,
) -> tuple[Any, ...]:
    """to, tau, tdq, tdk, tdv, None: jvp and hvp along one direction; ``dq`` is that of the vjp, if it is at hand."""
    _refuse_mask(t.mask, shapes[3])
    # a map over cotangents alone leaves what jvp returns smaller than what hvp returns
    own = batch_shape(*ops, o, *t)
    if _still(t) or _empty(ops) or batch_shape(*ops, o, *t, do, tdo) != own:
        to, tau = jvp(ops, o, lse, t, spec)
        return (to, tau, *hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes))
    if _short(ops):
        return short.jvp_hvp_short(ops, o, lse, do, t, tdo, spec, shapes)
    if dq is not None and jvp_dq_kernels.takes(ops, o, do, dq, shapes[0]):
        return jvp_dq_kernels.jvp_hvp(ops, o, lse, do, dq, t, tdo, spec, shapes)
    to, tau, left = jvp_kernels.jvp_before_hvp(ops, o, lse, do, t, tdo, spec)
    return (to, tau, *hvp_kernels.hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes, left))
