"""The rules of the operator as plain functions: forward, vjp, jvp, hvp, jvp_jvp, without building a graph first.

Each takes the operands of :func:`theria.ops.sdpa` and what its order adds. ``out`` and ``lse`` are residuals of
:func:`sdpa_forward`; without them the forward is computed again. The results are themselves differentiable as far as
the backend goes (two orders of the operator with "custom", any with "reference"), ``lse`` and ``tau`` among them; with
respect to an additive mask these two with "reference" only.

Common keyword arguments: ``attn_mask``, ``dropout_p``, ``is_causal``, ``scale``, ``enable_gqa``, ``seed`` and
``backend`` as in :func:`theria.ops.sdpa`, with the same errors. Formulas: ``theria/ops/README.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from theria.ops import autograd, checks, reference
from theria.ops.duals import output_and_tangent
from theria.ops.operands import Shapes, Tangents, batch_shape
from theria.ops.sdpa import prepare
from theria.ops.sweep import compute_dtype
from theria.ops.transforms import differentiated, in_graph

# One tangent per operand, None for zero: (query, key, value) or (query, key, value, attn_mask).
Direction = Sequence[Tensor | None]


class ExplicitCall:
    """One explicit call: the caller's operands, their canonical form and the rules that compute it."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], mask_gradient: bool = False
    ) -> None:
        if "dropout_p" in options:
            checks.check_replayed(options["dropout_p"], options.get("seed"))
        call = prepare(query, key, value, **options, mask_gradient=mask_gradient)
        if options.get("enable_gqa") and key.shape[-3] != value.shape[-3]:
            raise checks.ArgumentError(
                f"key has {key.shape[-3]} heads and value {value.shape[-3]}; the explicit functions need one number of "
                f"both. Repeat the fewer ones: value.repeat_interleave(n, -3)."
            )
        self.layout, self.ops, self.spec = call.layout, call.ops, call.spec
        self.rules: ModuleType = reference if call.spec.backend == "reference" else autograd
        self.operands = (query, key, value, options.get("attn_mask"))
        lead = self.layout.leave_row(query.new_empty(0).expand(*batch_shape(*self.ops), 0)).shape[:-1]
        self.row_shape = (*lead, query.shape[-2])
        self.out_shape = (*self.row_shape, value.shape[-1])

    def like_out(self, name: str, x: Tensor | None) -> Tensor | None:
        """A cotangent of the output, or its tangent, in canonical form."""
        check = checks.require_like if name == "grad_out" else checks.check_like
        check(name, x, self.out_shape, self.ops.q.dtype, self.ops.q.device)  # type: ignore[arg-type]
        return self.layout.enter(x, grouped=True)

    def direction(self, name: str, direction: Direction) -> Tangents:
        """A direction in canonical form; ``name`` is for messages."""
        checks.check_direction(name, direction)
        given = (*direction, *(None,) * (4 - len(direction)))
        entered = []
        for slot, x, operand in zip(("query", "key", "value", "attn_mask"), given, self.operands, strict=True):
            if operand is not None and operand.dtype == torch.bool and x is not None:
                raise checks.DtypeError(f"{name} has an entry for a boolean attn_mask, which has no tangent.")
            if operand is not None:
                checks.check_like(f"{name} of {slot}", x, operand.shape, operand.dtype, operand.device)
            elif x is not None:
                raise checks.ArgumentError(f"{name} has an entry for attn_mask; without one pass 3 entries.")
            entered.append(self.layout.enter(x, grouped=slot in ("query", "attn_mask")))
        return Tangents(*entered)

    def residuals(self, out: Tensor | None, lse: Tensor | None) -> tuple[Tensor, Tensor]:
        """Canonical o and lse: those given, or computed again."""
        if out is None or lse is None:
            return self.rules.forward(self.ops, self.spec)
        dtype = self.ops.q.dtype if self.rules is reference else compute_dtype(self.ops.q.dtype)
        checks.check_like("lse", lse, self.row_shape, dtype, self.ops.q.device)
        o, row = self.like_out("out", out), self.layout.enter_row(lse)
        assert o is not None
        assert row is not None
        return o, row

    def shapes(self, mask_grad: bool) -> Shapes:
        """Canonical shapes of the wanted cotangents."""
        mask = self.ops.mask
        if mask_grad and (mask is None or mask.dtype == torch.bool):
            raise checks.ArgumentError("mask_grad=True needs an additive attn_mask; none, or a boolean one, was given.")
        q, k, v = (x.shape for x in self.ops[:3])
        return q, k, v, mask.shape if mask_grad and mask is not None else None

    def like_query(self, name: str, x: Tensor | None) -> Tensor | None:
        """A cotangent of the query in canonical form."""
        checks.check_like(name, x, self.operands[0].shape, self.ops.q.dtype, self.ops.q.device)
        return self.layout.enter(x, grouped=True)

    def hvp(
        self, o: Tensor, lse: Tensor, do: Any, dq: Tensor | None, t: Tangents, tdo: Tensor | None, shapes: Shapes
    ) -> Any:
        """Tangents of the cotangents along ``t`` and ``tdo``, canonical."""
        if self.rules is autograd:
            return autograd.jvp_hvp(self.ops, o, lse, do, dq, t, tdo, self.spec, shapes)[2:]
        to, tau = reference.jvp(self.ops, o, lse, t, self.spec)
        return reference.hvp(self.ops, o, lse, do, t, tdo, to, tau, self.spec, shapes)

    def leave_cotangents(self, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The wanted cotangents in the caller's shapes."""
        pairs = zip(grads, self.operands, strict=True)
        return tuple(x.reshape(operand.shape) for x, operand in pairs if x is not None and operand is not None)


@in_graph
def sdpa_forward(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp (README (2)-(4)).

    Args:
        query: (..., N, D). key: (..., M, D). value: (..., M, E).
        **options: see the module.

    Returns:
        ``out`` (..., N, E) and ``lse`` (..., N), the logarithm of each row's sum of exponentials (−inf for a row that
        sees no key), float32 for half precision with "custom" and "triton".
    """
    call = ExplicitCall(query, key, value, options)
    o, lse = call.rules.forward(call.ops, call.spec)
    if call.rules is autograd:
        lse = autograd.log_sum_exp(call.ops, lse, call.spec)
    return call.layout.leave(o), call.layout.leave_row(lse)


@in_graph
def sdpa_vjp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    mask_grad: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Cotangents of the operands (README (5)-(9)).

    Args:
        grad_out: cotangent of the output, (..., N, E).
        out, lse: residuals of :func:`sdpa_forward`.
        mask_grad: also return the cotangent of an additive ``attn_mask``.

    Returns:
        (dquery, dkey, dvalue), with ``mask_grad`` (dquery, dkey, dvalue, dmask), shaped like the operands.
    """
    call = ExplicitCall(query, key, value, options, mask_grad)
    do, shapes = call.like_out("grad_out", grad_out), call.shapes(mask_grad)
    grads = call.rules.vjp(call.ops, *call.residuals(out, lse), do, call.spec, shapes)
    return call.leave_cotangents(grads)


@in_graph
def sdpa_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tangent_query: Tensor | None = None,
    tangent_key: Tensor | None = None,
    tangent_value: Tensor | None = None,
    *,
    tangent_mask: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Tangent of the output and of lse along a direction (README (10)-(12)).

    Args:
        tangent_query, tangent_key, tangent_value, tangent_mask: shaped like their operands; None is zero and free.
        out, lse: residuals of :func:`sdpa_forward`.

    Returns:
        The tangent of the output (..., N, E), and tau (..., N), the tangent of lse.
    """
    call = ExplicitCall(query, key, value, options, tangent_mask is not None)
    t = call.direction("tangent", (tangent_query, tangent_key, tangent_value, tangent_mask))
    if call.rules is autograd and (out is None or lse is None):
        *_, to, tau = output_and_tangent(call.ops, t, call.spec)
    else:
        to, tau = call.rules.jvp(call.ops, *call.residuals(out, lse), t, call.spec)
    moving = (x is not None and differentiated(x) for x in (*call.ops[:4], *t))
    if call.rules is autograd and autograd.differentiable() and any(moving):
        tau = autograd.log_sum_exp_tangent(call.ops, t, call.spec, tau).expand_as(tau)
    return call.layout.leave(to), call.layout.leave_row(tau)


@in_graph
def sdpa_hvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    tangent_query: Tensor | None = None,
    tangent_key: Tensor | None = None,
    tangent_value: Tensor | None = None,
    tangent_grad_out: Tensor | None = None,
    *,
    tangent_mask: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    dquery: Tensor | None = None,
    mask_grad: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Tangent of :func:`sdpa_vjp` along a direction (README (13)-(18)).

    With ``tangent_grad_out=None`` it is the Hessian-vector product of ⟨grad_out, sdpa(query, key, value)⟩.

    Args:
        grad_out: cotangent of the output, (..., N, E).
        tangent_query, tangent_key, tangent_value, tangent_mask: shaped like their operands; None is zero and free.
        tangent_grad_out: tangent of ``grad_out``.
        out, lse: residuals of :func:`sdpa_forward`.
        dquery: the first result of :func:`sdpa_vjp` at the same ``grad_out``, if it is at hand: a residual like
            ``out``, which spares the kernels of "triton" a tenth of their products (25).
        mask_grad: also return the tangent of the cotangent of an additive ``attn_mask``.

    Returns:
        Tangents of (dquery, dkey, dvalue), with ``mask_grad`` also of dmask, shaped like the operands.
    """
    call = ExplicitCall(query, key, value, options, mask_grad or tangent_mask is not None)
    do, tdo = call.like_out("grad_out", grad_out), call.like_out("tangent_grad_out", tangent_grad_out)
    dq = call.like_query("dquery", dquery)
    t = call.direction("tangent", (tangent_query, tangent_key, tangent_value, tangent_mask))
    shapes = call.shapes(mask_grad)
    o, lse = call.residuals(out, lse)
    return call.leave_cotangents(call.hvp(o, lse, do, dq, t, tdo, shapes))


@in_graph
def sdpa_jvp_jvp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Direction,
    second: Direction,
    mixed: Direction = (None, None, None),
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Mixed second tangent of the output (README (19)-(22)).

    Args:
        first, second: directions, (query, key, value) or (query, key, value, attn_mask) tangents, None for zero.
        mixed: second tangents of the operands themselves, ∂²x/∂ε₁∂ε₂.
        out, lse: residuals of :func:`sdpa_forward`.

    Returns:
        ∂²/∂ε₁∂ε₂ of sdpa(x + ε₁ first + ε₂ second + ε₁ε₂ mixed), (..., N, E).
    """
    directions = {"first": first, "second": second, "mixed": mixed}
    for name, t in directions.items():
        checks.check_direction(name, t)
    call = ExplicitCall(query, key, value, options, any(x is not None for t in directions.values() for x in t[3:]))
    t1, t2, t12 = (call.direction(name, t) for name, t in directions.items())
    o, lse = call.residuals(out, lse)
    tau1, tau2 = (call.rules.jvp(call.ops, o, lse, t, call.spec)[1] for t in (t1, t2))
    return call.layout.leave(call.rules.jvp_jvp(call.ops, o, lse, t1, t2, t12, tau1, tau2, call.spec))
