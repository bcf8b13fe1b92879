"""Second derivatives by differences of exact first ones: a check that shares no formula with the HVP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from theria.ops.explicit import sdpa_vjp


def central_step(x: tuple[Tensor, ...], t: tuple[Tensor, ...]) -> float:
    """Step h of a central difference at ``x`` along ``t``.

    The error is O(h²) from truncation plus O(ε/h) from rounding, both relative to the size of the input: h = ε^(1/3)
    balances them (Nocedal and Wright, Numerical Optimization, 2nd ed., section 8.1), in units of ‖x‖ per ‖t‖.
    """
    size = torch.stack([a.detach().double().norm() for a in x]).norm()
    length = torch.stack([a.detach().double().norm() for a in t]).norm()
    if not length > 0:
        return 1.0  # the difference along a zero direction is zero whatever the step
    count = sum(a.numel() for a in x) ** 0.5
    unit = max(size.item(), 1e-3 * count)  # inputs near zero still have a scale: that of their entries
    return torch.finfo(x[0].dtype).eps ** (1 / 3) * unit / length.item()


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
        **options: keyword arguments of :func:`theria.ops.explicit.sdpa_vjp`.

    Returns:
        The product, shaped like (query, key, value). Expect a relative error of 1e-10 in float64 and 1e-4 in float32.
    """
    x, t = (query, key, value), (tangent_query, tangent_key, tangent_value)
    h = central_step(x, t) if eps is None else eps
    plus, minus = ([a + sign * h * b for a, b in zip(x, t, strict=True)] for sign in (1, -1))
    if grad_out is None:
        grouped = options.get("enable_gqa", False)
        lead = query.shape[:-2] if grouped else torch.broadcast_shapes(*(a.shape[:-2] for a in x))
        grad_out = query.new_ones(*lead, query.shape[-2], value.shape[-1])
    grads = (sdpa_vjp(a, b, c, grad_out, **options) for a, b, c in (plus, minus))
    pairs = zip(*grads, strict=True)
    dq, dk, dv = ((a - b) / (2 * h) for a, b in pairs)
    return dq, dk, dv
