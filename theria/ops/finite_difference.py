"""Second derivatives by differences of exact first ones: a check that shares no formula with the HVP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from theria.ops.checks import ArgumentError, require_like
from theria.ops.explicit import ExplicitCall, sdpa_vjp
from theria.ops.operands import default_scale


def central_step(x: tuple[Tensor, ...], t: tuple[Tensor, ...], scale: float | None = None) -> float:
    """Step h of a central difference of the VJP at ``x`` = (query, key, value) along ``t``.

    The error is O((hr)²) from truncation plus O(εs/(hr)) from rounding; h = (εs)^(1/3) / r balances them (Nocedal and
    Wright, Numerical Optimization, 2nd ed., section 8.1). Attention varies with its scores, so that r is the rate of
    the scores along t, estimated from root mean squares as for independent entries, and s the size of the scores,
    whose rounding is amplified by the exponential.
    """
    q, k, v, tq, tk, tv = (a.detach().double().square().mean().sqrt().item() if a.numel() else 0.0 for a in (*x, *t))
    width = x[0].shape[-1]
    factor = (default_scale(width) if scale is None else abs(scale)) * width**0.5
    rate = max(factor * (tq * k + q * tk), (factor * tq * tk) ** 0.5)
    rounding = torch.finfo(x[0].dtype).eps * max(factor * q * k, 1.0)
    if rate > 0:
        return rounding ** (1 / 3) / rate
    return v / tv if v > 0 and tv > 0 else 1.0  # linear in the values: the step need not be small


def hvp_fd_vjp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tangent_query: Tensor,
    tangent_key: Tensor,
    tangent_value: Tensor,
    eps: float | None = None,
    *,
    grad_out: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hessian-vector product by a central difference of the explicit VJP.

    The softmax statistics are recomputed at both points. Holding them fixed ("frozen statistics") would differentiate
    another function.

    Args:
        query, key, value: (..., N, D), (..., M, D), (..., M, E), floating.
        tangent_query, tangent_key, tangent_value: the direction, shaped like the operands.
        eps: step along the direction; :func:`central_step` by default.
        grad_out: (..., N, E), the cotangent that is held fixed; ones by default (the loss is then ``sdpa(...).sum()``).
        **options: ``attn_mask``, ``is_causal``, ``scale``, ... as in :func:`theria.ops.sdpa`.

    Returns:
        The product, shaped like (query, key, value). Expect a relative error of 1e-10 in float64 and 1e-4 in float32.
    """
    if refused := {"out", "lse", "mask_grad"} & set(options):
        raise ArgumentError(
            f"hvp_fd_vjp was given {', '.join(sorted(refused))}; the statistics are computed again at both points, and "
            f"the product is that of query, key and value. Leave it out."
        )
    x, t = (query, key, value), (tangent_query, tangent_key, tangent_value)
    call = ExplicitCall(query, key, value, options)
    for name, a, b in zip(("query", "key", "value"), x, t, strict=True):
        require_like(f"tangent of {name}", b, a.shape, a.dtype, a.device)
    h = central_step(x, t, options.get("scale")) if eps is None else eps
    plus, minus = ([a + sign * h * b for a, b in zip(x, t, strict=True)] for sign in (1, -1))
    if grad_out is None:
        grad_out = query.new_ones(call.out_shape)
    grads = (sdpa_vjp(a, b, c, grad_out, **options) for a, b, c in (plus, minus))
    pairs = zip(*grads, strict=True)
    dq, dk, dv = ((a - b) / (2 * h) for a, b in pairs)
    return dq, dk, dv
