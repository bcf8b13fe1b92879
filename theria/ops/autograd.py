"""The derivative wiring: the only file with ``torch.autograd.Function``, and it only routes.

One Function per rule. Each ``backward`` and ``jvp`` calls the *other Functions*, so that autograd and ``torch.func``
may differentiate what they return; every second-order composition is one of four rules:

====================================  =====================================================================
backward of Forward                   Vjp
jvp of Forward                        Jvp
backward of Vjp (grad of grad)        for dO: Jvp along the cotangents; for the operands: Hvp with tdO = 0
jvp of Vjp (forward over reverse)     Hvp with all tangents
backward of Jvp (reverse over fwd.)   for the tangents: Vjp; for the operands: Hvp with tdO = 0
jvp of Jvp                            JvpJvp + Jvp of the mixed tangents, in one rule
backward of Hvp                       for its tangents, in which it is linear: Hvp (it is symmetric) and Jvp
jvp of Hvp                            along its tangents alone: Hvp
anything else of Hvp and JvpJvp       third order: raises
====================================  =====================================================================

``o``, ``lse``, ``to`` and ``tau`` enter as residuals: functions of the operands whose own gradient slots return None,
because the formulas are already total derivatives.

Third order is guarded by backwards that raise; :class:`ThirdOrder` raises exactly where a derivative with respect to an
operand of Hvp is asked for. ``once_differentiable`` would not do: under ``autograd.grad(inputs=)`` it drops terms
without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from theria.ops import blockwise
from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents

RULES = {"custom": blockwise}  # the modules that implement forward, vjp, jvp, hvp and jvp_jvp


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device (some, such as meta, do not know it)."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _call(name: str, spec: AttentionSpec, *args: Any) -> Any:
    """Run a rule. Its dtypes are its own business: autocast must not reach into it."""
    rule = getattr(RULES[spec.backend], name)
    device = next(x.device.type for x in args[0] if x is not None)
    if autocasts(device):
        with torch.autocast(device, enabled=False):
            return rule(*args)
    return rule(*args)


def _third_order(name: str, spec: AttentionSpec) -> NotImplementedError:
    return NotImplementedError(
        f"third-order derivative: backend '{spec.backend}' has exact first and second derivatives, and this call "
        f"differentiates its {name} rule once more. Use backend='reference', which has every order (materialised)."
    )


class _Rule(Function):
    """A Function whose ``vmap`` adds one leading dimension to the canonical operands and calls itself."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:  # type: ignore[override]
        size = info.batch_size
        inputs = tuple(_lift(x, dim, size) for x, dim in zip(args, in_dims, strict=True))
        outputs = cls.apply(*inputs)
        single = isinstance(outputs, Tensor)
        outputs = tuple(
            None if x is None else x.expand(size, *x.shape[1:]) for x in ((outputs,) if single else outputs)
        )
        dims = tuple(None if x is None else 0 for x in outputs)
        return (outputs[0], dims[0]) if single else (outputs, dims)


class _Shapes(tuple):
    """Shapes in which cotangents are wanted; a type of its own so that ``vmap`` can tell it from data."""


def _lift(x: Any, dim: int | None, size: int) -> Any:
    """An argument with the mapped dimension in front: of size one, not expanded, where it is not mapped."""
    if isinstance(x, Tensor):
        return x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
    if isinstance(x, _Shapes):
        return _Shapes(None if shape is None else torch.Size((size, *shape)) for shape in x)
    return x


def _wanted(ops: Operands | Tangents, needed: tuple[bool, ...]) -> Shapes:
    """Shapes of q, k, v and mask where autograd asks for their cotangent."""
    return _Shapes(x.shape if need and x is not None else None for x, need in zip(ops[:4], needed, strict=False))


def _any(xs: tuple[Any, ...]) -> bool:
    return any(x is not None for x in xs)


class Forward(_Rule):
    """(q, k, v, mask, seed), spec -> o, lse."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *ops, spec = args
        return _call("forward", spec, Operands(*ops), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *ops, ctx.spec = inputs
        o, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*ops, o, lse)
        ctx.save_for_forward(*ops, o, lse)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        do, _ = cotangents
        if do is None:
            return (None,) * 6
        *ops, o, lse = ctx.saved_tensors
        shapes = _wanted(Operands(*ops), ctx.needs_input_grad)
        return (*vjp(Operands(*ops), o, lse, do, ctx.spec, shapes), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        *ops, o, lse = ctx.saved_tensors
        to, _ = jvp(Operands(*ops), o, lse, Tangents(*tangents[:4]), ctx.spec)
        return to, None


class Vjp(_Rule):
    """(q, k, v, mask, seed), o, lse, do, spec, shapes -> dq, dk, dv, dmask."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *ops, o, lse, do, spec, shapes = args
        return _call("vjp", spec, Operands(*ops), o, lse, do, spec, shapes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.spec, ctx.shapes = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if not _any(cotangents):
            return (None,) * 10
        ops, (o, lse, do), t = Operands(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:], Tangents(*cotangents)
        to, tau = jvp(ops, o, lse, t, ctx.spec)
        shapes = _wanted(ops, ctx.needs_input_grad)
        grads = hvp(ops, o, lse, do, t, None, to, tau, ctx.spec, shapes) if _any(shapes) else (None,) * 4
        return (*grads, None, None, None, to if ctx.needs_input_grad[7] else None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        ops, (o, lse, do) = Operands(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:]
        t, tdo = Tangents(*tangents[:4]), tangents[7]
        to, tau = jvp(ops, o, lse, t, ctx.spec)
        return hvp(ops, o, lse, do, t, tdo, to, tau, ctx.spec, ctx.shapes)


class Jvp(_Rule):
    """(q, k, v, mask, seed), o, lse, (tq, tk, tv, tmask), spec -> to, tau."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, spec = args
        return _call("jvp", spec, Operands(*tensors[:5]), *tensors[5:7], Tangents(*tensors[7:]), spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.spec = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        w, _ = cotangents
        if w is None:
            return (None,) * 12
        ops, t = Operands(*ctx.saved_tensors[:5]), Tangents(*ctx.saved_tensors[7:11])
        (o, lse), (to, tau) = ctx.saved_tensors[5:7], ctx.saved_tensors[11:]
        grads = tangent_grads = (None,) * 4
        if any(ctx.needs_input_grad[:4]):
            shapes = _wanted(ops, ctx.needs_input_grad)
            grads = hvp(ops, o, lse, w, t, None, to, tau, ctx.spec, shapes)
        if any(ctx.needs_input_grad[7:11]):
            shapes = _wanted(t, ctx.needs_input_grad[7:11])
            tangent_grads = vjp(ops, o, lse, w, ctx.spec, shapes)
        return (*grads, None, None, None, *tangent_grads, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        ops, t = Operands(*ctx.saved_tensors[:5]), Tangents(*ctx.saved_tensors[7:11])
        (o, lse), tau = ctx.saved_tensors[5:7], ctx.saved_tensors[12]
        second, mixed = Tangents(*tangents[:4]), Tangents(*tangents[7:11])
        if not _any(second):  # linear in the tangents, and still differentiable once more
            return jvp(ops, o, lse, mixed, ctx.spec)[0], None
        _, tau2 = jvp(ops, o, lse, second, ctx.spec)
        return jvp_jvp(ops, o, lse, t, second, mixed, tau, tau2, ctx.spec), None


class ThirdOrder(_Rule):
    """Identity on an operand of Hvp; its derivative would be of third order."""

    @staticmethod
    def forward(*args: Any) -> Any:
        x, _ = args
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.spec = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _third_order("hvp", ctx.spec)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _third_order("hvp", ctx.spec)


class Hvp(_Rule):
    """(q, k, v, mask, seed), o, lse, do, (tq, tk, tv, tmask), tdo, to, tau, spec, shapes -> tdq, tdk, tdv, tdmask.

    In (t, tdo) it is the linear map t, tdo ↦ H t + Jᵀ tdo with H symmetric, whose adjoint is w ↦ (H w, J w).
    The operands come through :class:`ThirdOrder`.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, spec, shapes = args
        ops, (o, lse, do), t = Operands(*tensors[:5]), tensors[5:8], Tangents(*tensors[8:12])
        return _call("hvp", spec, ops, o, lse, do, t, *tensors[12:], spec, shapes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.spec, ctx.shapes = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:13])
        ctx.save_for_forward(*tensors[:13])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if not _any(cotangents):
            return (None,) * 17
        ops, (o, lse, do), w = Operands(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:8], Tangents(*cotangents)
        t = Tangents(*ctx.saved_tensors[8:12])
        jw, tau = jvp(ops, o, lse, w, ctx.spec)
        shapes = _wanted(t, ctx.needs_input_grad[8:12])
        hw = hvp(ops, o, lse, do, w, None, jw, tau, ctx.spec, shapes) if _any(shapes) else (None,) * 4
        # a gradient that reaches ThirdOrder raises there, and only if it is asked for
        *operands, ddo = (None if x is None else torch.zeros_like(x) for x in (*ops[:4], do))
        jw = jw if ctx.needs_input_grad[12] else None
        return (*operands, None, None, None, ddo, *hw, jw, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if _any(tangents[:5]) or tangents[7] is not None:
            raise _third_order("hvp", ctx.spec)
        ops, (o, lse, do) = Operands(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:8]
        t, tdo = Tangents(*tangents[8:12]), tangents[12]
        to, tau = jvp(ops, o, lse, t, ctx.spec)
        return hvp(ops, o, lse, do, t, tdo, to, tau, ctx.spec, ctx.shapes)


class JvpJvp(_Rule):
    """(q, k, v, mask, seed), o, lse, t1, t2, t12 (four each), tau1, tau2, spec -> tto."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, spec = args
        ops, (o, lse), t = Operands(*tensors[:5]), tensors[5:7], tensors[7:19]
        directions = Tangents(*t[:4]), Tangents(*t[4:8]), Tangents(*t[8:])
        return _call("jvp_jvp", spec, ops, o, lse, *directions, *tensors[19:], spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.spec = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _third_order("jvp_jvp", ctx.spec)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _third_order("jvp_jvp", ctx.spec)


# The five rules under the signatures of the reference, differentiable as far as the closure goes.


def forward(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """o, lse; see :func:`theria.ops.reference.forward`."""
    return Forward.apply(*ops, spec)  # type: ignore[return-value]


def vjp(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes) -> Any:
    """dq, dk, dv, dmask; see :func:`theria.ops.reference.vjp`."""
    return Vjp.apply(*ops, o, lse, do, spec, _Shapes(shapes))


def jvp(ops: Operands, o: Tensor, lse: Tensor, t: Tangents, spec: AttentionSpec) -> Any:
    """to, tau; see :func:`theria.ops.reference.jvp`."""
    return Jvp.apply(*ops, o, lse, *t, spec)


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
) -> Any:
    """tdq, tdk, tdv, tdmask; see :func:`theria.ops.reference.hvp`."""
    *operands, guarded = (None if x is None else ThirdOrder.apply(x, spec) for x in (*ops[:4], do))
    return Hvp.apply(*operands, ops.seed, o, lse, guarded, *t, tdo, to, tau, spec, _Shapes(shapes))


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
) -> Any:
    """tto; see :func:`theria.ops.reference.jvp_jvp`."""
    return JvpJvp.apply(*ops, o, lse, *t1, *t2, *t12, tau1, tau2, spec)
