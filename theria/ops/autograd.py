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
both of LogSumExp                     Forward and Vjp with the keys as values
====================================  =====================================================================

Hvp needs what Jvp gives along the same direction, and a backend may have one kernel for both: wherever both are wanted
they are one Function, JvpHvp, whose derivatives are those of its two halves.

``o``, ``lse``, ``dq``, ``to`` and ``tau`` enter as residuals: functions of the operands whose own gradient slots return
None, because the formulas are already total derivatives. The rules give ``lse`` and ``tau`` without derivatives;
:func:`log_sum_exp` and :func:`log_sum_exp_tangent` have them, for a caller who is given these, too.

Third order is guarded by backwards that raise; :class:`Refused` raises exactly where a derivative with respect to an
operand of Hvp is asked for. ``once_differentiable`` would not do: under ``autograd.grad(inputs=)`` it drops terms
without an error.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch._C._functorch import unwrap_if_dead
from torch.autograd import Function
from torch.func import functionalize

from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents, batch_shape, sum_to
from theria.ops.sweep import compute_dtype
from theria.ops.transforms import recorded, without_autocast

# The modules that implement forward, vjp, jvp, hvp, jvp_jvp and, if they can do better than one after the other,
# jvp_hvp (jvp, hvp; with `uses_dq`, which calls need less for it given dQ) and forward_jvp (forward, jvp:
# :mod:`theria.ops.duals`). Each is imported when it is first used:
# the kernels need Triton, the others do not.
RULES = {"custom": "theria.ops.blockwise", "triton": "theria.ops.triton.rules"}


@cache
def rules(backend: str) -> ModuleType:
    """The module of a backend's rules."""
    return import_module(RULES[backend])


def call(name: str, spec: AttentionSpec, *args: Any) -> Any:
    """Run a rule."""
    rule = getattr(rules(spec.backend), name, _jvp_then_hvp)
    if recorded():  # torch.func.linearize folds what is constant in a graph, and loses what was written in place there
        rule = functionalize(rule)
    return without_autocast(rule, *args)


def _jvp_then_hvp(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, dq: Tensor | None, t: Tangents, *rest: Any) -> Any:
    """The rule jvp_hvp of a backend that has none of its own."""
    del dq
    tdo, spec, shapes = rest
    backend = rules(spec.backend)
    to, tau = backend.jvp(ops, o, lse, t, spec)
    return (to, tau, *backend.hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes))


def _uses_dq(spec: AttentionSpec, ops: Operands, o: Tensor, do: Tensor, dq: Tensor | None) -> bool:
    """Whether the backend computes jvp and hvp with less, if dQ of the vjp is kept for them."""
    uses = getattr(rules(spec.backend), "uses_dq", None)
    return uses is not None and uses(ops, o, do, dq)


def _third_order(name: str, spec: AttentionSpec) -> NotImplementedError:
    message = (
        f"third-order derivative: backend '{spec.backend}' has exact first and second derivatives, and this call "
        f"differentiates its {name} rule once more. Use backend='reference', which has every order (materialised)."
    )
    if fwad._current_level >= 0 and not torch._C._are_functorch_transforms_active():
        message += (
            " Inside forward_ad.dual_level a gradient gets a tangent too, one order more: where that is not wanted, "
            "take the gradient of a tangent after the level has ended."
        )
    return NotImplementedError(message)


def differentiable() -> bool:
    """Whether what is computed now may be differentiated; not inside most backward passes, nor under ``no_grad``."""
    return torch.is_grad_enabled() or fwad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _Rule(Function):
    """A Function whose ``vmap`` adds one leading dimension to the canonical operands and calls itself."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Outside of ``torch.func`` without what ``Function.apply`` does for default arguments, of which none are."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        args = [unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args]  # type: ignore[assignment]
        return super(Function, cls).apply(*args)  # type: ignore[misc]

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
    return _Shapes([x.shape if need and x is not None else None for x, need in zip(ops[:4], needed, strict=False)])


NO_GRADS = (None,) * 4


def _any(xs: tuple[Any, ...]) -> bool:
    return any(x is not None for x in xs)


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


class Forward(_Rule):
    """(q, k, v, mask, seed), spec -> o, lse."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *ops, spec = args
        return call("forward", spec, Operands(*ops), spec)

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
        *tensors, o, lse = ctx.saved_tensors
        ops = Operands(*tensors)
        return (*vjp(ops, o, lse, do, ctx.spec, _wanted(ops, ctx.needs_input_grad)), None, None)

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
        return call("vjp", spec, Operands(*ops), o, lse, do, spec, shapes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.spec, ctx.shapes = inputs
        ctx.set_materialize_grads(False)
        ops, (o, _, do), dq = Operands(*tensors[:5]), tensors[5:], output[0]
        dq = dq if _uses_dq(ctx.spec, ops, o, do, dq) else None
        ctx.save_for_backward(*tensors, dq)
        ctx.save_for_forward(*tensors, dq)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if not _any(cotangents):
            return (None,) * 10
        ops, (o, lse, do, dq), t = Operands(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:], Tangents(*cotangents)
        to, grads = along(ops, o, lse, do, dq, t, ctx.spec, _wanted(ops, ctx.needs_input_grad))
        return (*grads, None, None, None, to if ctx.needs_input_grad[7] else None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        ops, (o, lse, do, dq) = Operands(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:]
        t, tdo = Tangents(*tangents[:4]), tangents[7]
        return jvp_hvp(ops, o, lse, do, dq, t, tdo, ctx.spec, ctx.shapes)[2:]


class Jvp(_Rule):
    """(q, k, v, mask, seed), o, lse, (tq, tk, tv, tmask), spec -> to, tau."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, spec = args
        return call("jvp", spec, Operands(*tensors[:5]), *tensors[5:7], Tangents(*tensors[7:]), spec)

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
        wanted = _wanted(ops, ctx.needs_input_grad), _wanted(t, ctx.needs_input_grad[7:11])
        grads, tangent_grads = _pull_jvp(ops, o, lse, t, to, tau, w, ctx.spec, *wanted)
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


def _pull_jvp(
    ops: Operands, o: Tensor, lse: Tensor, t: Tangents, to: Tensor, tau: Tensor, w: Tensor, spec: AttentionSpec,
    shapes: Shapes, tangent_shapes: Shapes,
) -> tuple[Any, Any]:  # fmt: skip
    """Adjoint of :func:`jvp` at a cotangent ``w`` of ``to``: for the operands (an hvp) and for the tangents (a vjp)."""
    grads = hvp(ops, o, lse, w, t, None, to, tau, spec, shapes) if _any(shapes) else NO_GRADS
    tangent_grads = vjp(ops, o, lse, w, spec, tangent_shapes) if _any(tangent_shapes) else NO_GRADS
    return grads, tangent_grads


class Refused(_Rule):
    """x, what else it depends on, error -> x, whose derivative raises ``error()``."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return args[0].view_as(args[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.error, ctx.count = inputs[-1], len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        if _any(cotangents):
            raise ctx.error()
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise ctx.error()


class Hvp(_Rule):
    """(q, k, v, mask, seed), o, lse, do, (tq, tk, tv, tmask), tdo, to, tau, spec, shapes -> tdq, tdk, tdv, tdmask.

    In (t, tdo) it is the linear map t, tdo ↦ H t + Jᵀ tdo with H symmetric, whose adjoint is w ↦ (H w, J w).
    The operands come through :class:`Refused`.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, spec, shapes = args
        ops, (o, lse, do), t = Operands(*tensors[:5]), tensors[5:8], Tangents(*tensors[8:12])
        return call("hvp", spec, ops, o, lse, do, t, *tensors[12:], spec, shapes)

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
        shapes = _wanted(Tangents(*ctx.saved_tensors[8:12]), ctx.needs_input_grad[8:12])
        jw, hw = along(ops, o, lse, do, None, w, ctx.spec, shapes)
        *operands, ddo = _third_order_zeros((*ops[:4], do), (*ctx.needs_input_grad[:4], ctx.needs_input_grad[7]))
        jw = jw if ctx.needs_input_grad[12] else None
        return (*operands, None, None, None, ddo, *hw, jw, None, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if _any(tangents[:5]) or tangents[7] is not None:
            raise _third_order("hvp", ctx.spec)
        ops, (o, lse, do) = Operands(*ctx.saved_tensors[:5]), ctx.saved_tensors[5:8]
        return jvp_hvp(ops, o, lse, do, None, Tangents(*tangents[8:12]), tangents[12], ctx.spec, ctx.shapes)[2:]


def _third_order_zeros(tensors: tuple[Any, ...], needed: tuple[bool, ...]) -> Any:
    """Gradients of operands that came through :class:`Refused`, which raises at them, and only if it is asked."""
    return (torch.zeros_like(x) if need and x is not None else None for x, need in zip(tensors, needed, strict=True))


class JvpHvp(_Rule):
    """(q, k, v, mask, seed), o, lse, (tq, tk, tv, tmask), tdo, (q, k, v, mask), do, dq, spec, shapes
    -> (to, tau), (tdq, tdk, tdv, tdmask).

    Its first half is Jvp of the operands. Its second half is Hvp of the second copy of them, which comes through
    :class:`Refused`, as ``do`` does.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, spec, shapes = args
        ops, (o, lse), t = Operands(*tensors[:5]), tensors[5:7], Tangents(*tensors[7:11])
        return call("jvp_hvp", spec, ops, o, lse, *tensors[16:], t, tensors[11], spec, shapes)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.spec, ctx.shapes = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[:2])
        ctx.save_for_forward(*tensors, *output[:2])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        w, _, *of_cotangents = cotangents
        saved, need = ctx.saved_tensors, ctx.needs_input_grad
        ops, (o, lse), t, (to, tau) = Operands(*saved[:5]), saved[5:7], Tangents(*saved[7:11]), saved[18:]
        grads, tangent_grads, guarded, jw = NO_GRADS, NO_GRADS, (None,) * 5, None
        tangent_shapes = _wanted(t, need[7:11])
        if w is not None:
            shapes = _wanted(ops, need)
            grads, tangent_grads = _pull_jvp(ops, o, lse, t, to, tau, w, ctx.spec, shapes, tangent_shapes)
        if _any(tuple(of_cotangents)):
            last = ops._replace(q=saved[12], k=saved[13], v=saved[14], mask=saved[15])
            do, dq = saved[16:18]
            jw, hw = along(last, o, lse, do, dq, Tangents(*of_cotangents), ctx.spec, tangent_shapes)
            tangent_grads = tuple(map(_add, tangent_grads, hw))
            guarded = _third_order_zeros(saved[12:17], need[12:17])
        return (*grads, None, None, None, *tangent_grads, jw if need[11] else None, *guarded, None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if _any(tangents[:5]) or _any(tangents[12:17]):
            raise _third_order("hvp", ctx.spec)
        saved = ctx.saved_tensors
        to, _, *cotangents = JvpHvp.apply(*saved[:7], *tangents[7:12], *saved[12:18], ctx.spec, ctx.shapes)
        return (to, None, *cotangents)


class JvpJvp(_Rule):
    """(q, k, v, mask, seed), o, lse, t1, t2, t12 (four each), tau1, tau2, spec -> tto."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, spec = args
        ops, (o, lse), t = Operands(*tensors[:5]), tensors[5:7], tensors[7:19]
        directions = Tangents(*t[:4]), Tangents(*t[4:8]), Tangents(*t[8:])
        return call("jvp_jvp", spec, ops, o, lse, *directions, *tensors[19:], spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.spec = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _third_order("jvp_jvp", ctx.spec)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _third_order("jvp_jvp", ctx.spec)


def _of_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, spec: AttentionSpec) -> tuple[Any, AttentionSpec]:
    """Operands with other values ``v`` (*L, M, D), and without dropout, which lse does not know."""
    return Operands(q, k, v, mask, None), replace(spec, dropout_p=0.0)


class LogSumExp(_Rule):
    """q, k, mask, lse, spec -> lse with its derivatives (23), (24)."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *_, lse, _ = args
        return lse.view_as(lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.spec = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:3])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (w,), (q, k, mask) = cotangents, ctx.saved_tensors
        if w is None:
            return (None,) * 5
        if ctx.needs_input_grad[2]:
            raise _of_mask(ctx.spec)
        ops, spec = _of_keys(q, k, k, mask, ctx.spec)
        means, lse = forward(ops, spec)
        w = spec.scale * sum_to(w, lse.shape)[..., None]  # lse also has the leading dimensions that only V has
        dq = sum_to(w * means, q.shape).to(q.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dq, None, None, None, None
        *_, dk, _ = vjp(ops, means, lse, (w * q).to(q.dtype), spec, (None, None, k.shape, None))
        return dq, dk, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        q, k, mask, lse = ctx.saved_tensors
        tq, tk, tmask, *_ = tangents
        tau = log_sum_exp_tangent(Operands(q, k, k, mask, None), Tangents(tq, tk, mask=tmask), ctx.spec)
        return tau.expand_as(lse)


def _of_mask(spec: AttentionSpec) -> NotImplementedError:
    return NotImplementedError(
        f"backend '{spec.backend}' has no derivative of lse with respect to attn_mask, nor of its tangent along one of "
        f"attn_mask. Use backend='reference', or detach lse or its tangent."
    )


def log_sum_exp(ops: Operands, lse: Tensor, spec: AttentionSpec) -> Tensor:
    """``lse`` of :func:`forward` with its first and second derivatives, for which P is computed again."""
    if not differentiable():
        return lse
    return LogSumExp.apply(ops.q, ops.k, ops.mask, lse, spec)


def log_sum_exp_tangent(ops: Operands, t: Tangents, spec: AttentionSpec, tau: Tensor | None = None) -> Tensor:
    """tau (24), which is (11), by outputs that can be differentiated.

    Along a tangent of the mask it is that of :func:`jvp` (``tau``, where it is known), and its derivative raises
    NotImplementedError.
    """
    if t.mask is not None:
        if tau is None:
            of_keys, spec = _of_keys(ops.q, ops.k, ops.k, ops.mask, spec)
            _, tau = jvp(of_keys, *forward(of_keys, spec), t._replace(v=None), spec)
        return Refused.apply(tau, ops.q, ops.k, ops.mask, *t, partial(_of_mask, spec))
    dtype = compute_dtype(ops.q.dtype)
    total = ops.q.new_zeros((*batch_shape(*ops, *t), ops.q.shape[-2]), dtype=dtype)
    for x, values in ((t.q, ops.k), (ops.q, t.k)):
        if x is not None and values is not None:
            means, _ = forward(*_of_keys(ops.q, ops.k, values, ops.mask, spec))
            total = total + spec.scale * (x.to(dtype) * means.to(dtype)).sum(-1)
    return total


# The five rules under the signatures of the reference, differentiable as far as the closure goes. Where nothing can be
# differentiated they are called without their Function.


def forward(ops: Operands, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """o, lse; see :func:`theria.ops.reference.forward`."""
    if not differentiable():
        return call("forward", spec, ops, spec)
    return Forward.apply(*ops, spec)  # type: ignore[return-value]


def vjp(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes) -> Any:
    """dq, dk, dv, dmask; see :func:`theria.ops.reference.vjp`."""
    if not differentiable():
        return call("vjp", spec, ops, o, lse, do, spec, shapes)
    return Vjp.apply(*ops, o, lse, do, spec, _Shapes(shapes))


def jvp(ops: Operands, o: Tensor, lse: Tensor, t: Tangents, spec: AttentionSpec) -> Any:
    """to, tau; see :func:`theria.ops.reference.jvp`."""
    if not differentiable():
        return call("jvp", spec, ops, o, lse, t, spec)
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
    if not differentiable():
        return call("hvp", spec, ops, o, lse, do, t, tdo, to, tau, spec, shapes)
    *operands, guarded = _guarded(ops, do, spec)
    return Hvp.apply(*operands, ops.seed, o, lse, guarded, *t, tdo, to, tau, spec, _Shapes(shapes))


def _guarded(ops: Operands, do: Tensor, spec: AttentionSpec) -> Any:
    error = partial(_third_order, "hvp", spec)
    return (None if x is None else Refused.apply(x, error) for x in (*ops[:4], do))


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
) -> Any:
    """to, tau, tdq, tdk, tdv, tdmask: :func:`jvp` and then :func:`hvp` along the same direction.

    ``dq`` is that of :func:`vjp` at the same ``do``, where it is at hand: a backend may need less for tdq then.
    """
    if not differentiable():
        return call("jvp_hvp", spec, ops, o, lse, do, dq, t, tdo, spec, shapes)
    return JvpHvp.apply(*ops, o, lse, *t, tdo, *_guarded(ops, do, spec), dq, spec, _Shapes(shapes))


def along(
    ops: Operands,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    dq: Tensor | None,
    t: Tangents,
    spec: AttentionSpec,
    shapes: Shapes,
) -> tuple[Tensor, Any]:
    """J t and H t, the latter where its ``shapes`` are wanted; ``dq`` as in :func:`jvp_hvp`."""
    if not _any(shapes):
        return jvp(ops, o, lse, t, spec)[0], NO_GRADS
    to, _, *cotangents = jvp_hvp(ops, o, lse, do, dq, t, None, spec, shapes)
    return to, cotangents


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
    if not differentiable():
        return call("jvp_jvp", spec, ops, o, lse, t1, t2, t12, tau1, tau2, spec)
    return JvpJvp.apply(*ops, o, lse, *t1, *t2, *t12, tau1, tau2, spec)
