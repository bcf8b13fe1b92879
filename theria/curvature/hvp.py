"""Hessian-vector products on pytrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_flatten, tree_map

from theria.curvature.second_order import second_order
from theria.curvature.vectors import check_count

Mode = Literal["forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"]


def hvp(
    loss_fn: Callable[[Any], Tensor],
    params: Any,
    v: Any,
    mode: Mode = "forward_over_reverse",
    *,
    chunk_size: int | None = None,
) -> Any:
    """H v, with H the Hessian of ``loss_fn`` at ``params``, without forming H.

    The modes are three orders of the same two derivatives and agree to rounding (Pearlmutter, "Fast exact
    multiplication by the Hessian", Neural Computation 1994). PyTorch's fused norms and two of its losses, whose second
    derivatives are wrong or missing in some of them, are mended inside (:mod:`theria.curvature.second_order`):

    - ``"forward_over_reverse"``: ∂/∂ε ∇loss(p + εv). The cheapest in time and memory.
    - ``"reverse_over_reverse"``: ∇⟨∇loss(p), v⟩, the double backward.
    - ``"reverse_over_forward"``: ∇ ∂/∂ε loss(p + εv).

    Args:
        loss_fn: params -> scalar.
        params: pytree of floating tensors.
        v: the direction, a pytree like ``params``. With one more dimension in front of every leaf, K directions at
            once: the Hessian is applied to each under ``vmap``.
        mode: see above.
        chunk_size: how many of K directions run at once (bounds memory); all by default.

    Returns:
        A pytree like ``v``.

    Raises:
        ValueError: unknown mode, ``v`` of another structure or shape than ``params``, a ``chunk_size`` that is no
            integer of at least 1, or a loss that is no scalar.
        TypeError: a leaf of ``params`` that is no floating tensor.
    """
    product = _MODES.get(mode)
    if product is None:
        raise ValueError(f"mode '{mode}' is not known; needed is one of {', '.join(_MODES)}.")
    batched = _check_direction(params, v, chunk_size)

    def scalar_loss(p: Any) -> Tensor:
        loss = second_order(loss_fn)(p)
        if not isinstance(loss, Tensor) or loss.ndim:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn returned {given}; a scalar tensor is needed. Reduce it, e.g. by .mean().")
        return loss

    if not batched:
        return product(scalar_loss, params, v)
    return vmap(lambda u: product(scalar_loss, params, u), chunk_size=chunk_size)(v)


def _forward_over_reverse(loss_fn: Callable[[Any], Tensor], params: Any, v: Any) -> Any:
    return jvp(grad(loss_fn), (params,), (v,))[1]


def _reverse_over_reverse(loss_fn: Callable[[Any], Tensor], params: Any, v: Any) -> Any:
    return grad(lambda p: _dot(grad(loss_fn)(p), v))(params)


def _reverse_over_forward(loss_fn: Callable[[Any], Tensor], params: Any, v: Any) -> Any:
    return grad(lambda p: jvp(loss_fn, (p,), (v,))[1])(params)


_MODES = {
    "forward_over_reverse": _forward_over_reverse,
    "reverse_over_reverse": _reverse_over_reverse,
    "reverse_over_forward": _reverse_over_forward,
}


def _dot(a: Any, b: Any) -> Tensor:
    """⟨a, b⟩ over pytrees."""
    pairs = zip(tree_flatten(a)[0], tree_flatten(b)[0], strict=True)
    return torch.stack([(x * y).sum() for x, y in pairs]).sum()


def _check_direction(params: Any, v: Any, chunk_size: int | None) -> bool:
    """Whether ``v`` is a batch of directions; raises when it fits neither way."""
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, 1)
    leaves, structure = tree_flatten(params)
    directions, given = tree_flatten(v)
    if structure != given:
        raise ValueError(f"v must be a pytree like params; given {given}, needed {structure}.")
    if not leaves:
        raise ValueError("params has no leaves; at least one floating tensor is needed.")
    for x in leaves + directions:
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"params and v must hold floating tensors; given {given}.")
    for x, t in zip(leaves, directions, strict=True):
        if x.dtype != t.dtype:
            raise TypeError(
                f"v must have the dtypes of params; given {t.dtype} for {x.dtype}. Convert it: .to(x.dtype)."
            )
    if all(t.shape == x.shape for x, t in zip(leaves, directions, strict=True)):
        return False
    sizes = {t.shape[0] for t in directions if t.ndim}
    if (
        len(sizes) == 1
        and 0 not in sizes
        and all(t.shape[1:] == x.shape and t.ndim for x, t in zip(leaves, directions, strict=True))
    ):
        return True
    shapes = tree_map(lambda x: tuple(x.shape), v), tree_map(lambda x: tuple(x.shape), params)
    raise ValueError(
        f"v has shapes {shapes[0]}; needed are {shapes[1]}, or those with one more dimension K ≥ 1 in front."
    )
