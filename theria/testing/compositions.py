"""Every way of composing first and second derivatives that the operator promises.

Each composition is a function ``(attend, sample) -> tuple of tensors`` that takes derivatives of ``attend`` by
``torch.func`` or ``torch.autograd``; two implementations of attention must give the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from theria.testing.samples import Attend, Sample

Results = tuple[Tensor, ...]
Composition = Callable[[Attend, Sample], Results]

ARGS = (0, 1, 2)


def _call(attend: Attend, s: Sample) -> Callable[..., Tensor]:
    return lambda *x: attend(*x, **s.options)


def _loss(attend: Attend, s: Sample) -> Callable[..., Tensor]:
    """A scalar with its own curvature, so that second derivatives hold the operator's first and second terms."""
    return lambda *x: (attend(*x, **s.options) * s.do).sin().sum()


def _as_tuple(x: Any) -> Results:
    return tuple(tree_leaves(x))


def forward(attend: Attend, s: Sample) -> Results:
    return (attend(*s.x, **s.options),)


def backward(attend: Attend, s: Sample) -> Results:
    x = s.leaves()
    return torch.autograd.grad(attend(*x, **s.options), x, s.do)


def double_backward(attend: Attend, s: Sample) -> Results:
    """Cotangents of (dQ, dK, dV) to gradients of Q, K, V and dO, through autograd."""
    x, do = s.leaves(), s.do.clone().requires_grad_()
    grads = torch.autograd.grad(attend(*x, **s.options), x, do, create_graph=True)
    return torch.autograd.grad(grads, (*x, do), s.t)


def forward_ad(attend: Attend, s: Sample) -> Results:
    with fwad.dual_level():
        out = attend(*(fwad.make_dual(x, t) for x, t in zip(s.x, s.t, strict=True)), **s.options)
        primal, tangent = fwad.unpack_dual(out)
    assert tangent is not None
    return primal, tangent


def func_vjp(attend: Attend, s: Sample) -> Results:
    out, pull, *_ = vjp(_call(attend, s), *s.x)
    return (out, *pull(s.do))


def func_jvp(attend: Attend, s: Sample) -> Results:
    return jvp(_call(attend, s), s.x, s.t)


def partial_tangents(attend: Attend, s: Sample) -> Results:
    q, k, v = s.x
    f = _call(attend, s)
    return (
        jvp(lambda q: f(q, k, v), (q,), (s.t[0],))[1],
        jvp(lambda k: f(q, k, v), (k,), (s.t[1],))[1],
        jvp(lambda v: f(q, k, v), (v,), (s.t[2],))[1],
    )


def forward_over_reverse(attend: Attend, s: Sample) -> Results:
    return _as_tuple(jvp(grad(_loss(attend, s), ARGS), s.x, s.t))


def reverse_over_reverse(attend: Attend, s: Sample) -> Results:
    def directional(*x: Tensor) -> Tensor:
        return sum(
            ((g * t).sum() for g, t in zip(grad(_loss(attend, s), ARGS)(*x), s.t, strict=True)), x[0].new_zeros(())
        )

    return grad(directional, ARGS)(*s.x)


def reverse_over_forward(attend: Attend, s: Sample) -> Results:
    return grad(lambda *x: jvp(_loss(attend, s), x, s.t)[1], ARGS)(*s.x)


def reverse_over_forward_tangents(attend: Attend, s: Sample) -> Results:
    """Gradient with respect to the tangents of a jvp, together with that of the operands."""

    def f(x: Any, t: Any) -> Tensor:
        return (jvp(_call(attend, s), x, t)[1] * s.do).sin().sum()

    return _as_tuple(grad(f, (0, 1))(s.x, s.t))


def forward_over_forward(attend: Attend, s: Sample) -> Results:
    """Mixed second tangent with both directions, and with the inner direction moving too."""
    inner = jvp(lambda *x: jvp(_call(attend, s), x, s.t)[1], s.x, s.u)[1]
    moving = jvp(lambda x, t: jvp(_call(attend, s), x, t)[1], (s.x, s.t), (s.u, s.x))[1]
    return inner, moving


def along_the_direction(attend: Attend, s: Sample) -> Results:
    """A Hessian-vector product is linear in its direction, and may be differentiated along it in both modes."""

    def product(*t: Tensor) -> Any:
        return jvp(grad(_loss(attend, s), ARGS), s.x, t)[1]

    _, pull, *_ = vjp(product, *s.t)
    return (*pull(s.u), *jvp(product, s.t, s.u)[1])


def functional_hvp(attend: Attend, s: Sample) -> Results:
    """``torch.autograd.functional``: its hvp differentiates a vjp along a dummy cotangent."""
    return (
        *torch.autograd.functional.hvp(_loss(attend, s), s.x, s.t)[1],
        *torch.autograd.functional.vhp(_loss(attend, s), s.x, s.t)[1],
    )


def vectorized_hessian(attend: Attend, s: Sample) -> Results:
    """``torch.autograd.functional.hessian(vectorize=True)``, which maps cotangents by ``is_grads_batched``."""
    return _as_tuple(torch.autograd.functional.hessian(_loss(attend, s), s.x, vectorize=True))


def full_hessian(attend: Attend, s: Sample) -> Results:
    return _as_tuple(hessian(_loss(attend, s), ARGS)(*s.x))


def jacobians(attend: Attend, s: Sample) -> Results:
    f = _call(attend, s)
    return (*_as_tuple(jacrev(f, ARGS)(*s.x)), *_as_tuple(jacfwd(f, ARGS)(*s.x)))


def nested_jacobians(attend: Attend, s: Sample) -> Results:
    loss = _loss(attend, s)
    return (*_as_tuple(jacrev(jacrev(loss, 0), 1)(*s.x)), *_as_tuple(jacfwd(jacfwd(loss, 2), 0)(*s.x)))


def _stacked(s: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """Query and value batched by two, key shared."""
    q, k, v = s.x
    return torch.stack([q, 2 * q]), k, torch.stack([v, 3 * v])


BATCHED = (0, None, 0)


def vmap_grad(attend: Attend, s: Sample) -> Results:
    return _as_tuple(vmap(grad(_loss(attend, s), ARGS), BATCHED)(*_stacked(s)))


def grad_vmap(attend: Attend, s: Sample) -> Results:
    """The shared operand's gradient is summed over the mapped dimension."""
    batched = vmap(_loss(attend, s), BATCHED)
    return _as_tuple(grad(lambda *x: batched(*x).sum(), ARGS)(*_stacked(s)))


def vmap_hvp(attend: Attend, s: Sample) -> Results:
    def product(*x: Tensor) -> Any:
        return jvp(grad(_loss(attend, s), ARGS), x, s.t)[1]

    return _as_tuple(vmap(product, BATCHED)(*_stacked(s)))


def vmap_directions(attend: Attend, s: Sample) -> Results:
    """Operands shared, directions mapped: for every one of the three orders, and for jvp of jvp."""
    directions = tuple(torch.stack(pair) for pair in zip(s.t, s.u, strict=True))
    loss = _loss(attend, s)

    def products(*t: Tensor) -> Any:
        reverse = grad(lambda *x: jvp(loss, x, t)[1], ARGS)(*s.x)
        second = jvp(lambda *x: jvp(_call(attend, s), x, t)[1], s.x, s.u)[1]
        return jvp(grad(loss, ARGS), s.x, t)[1], reverse, second

    return _as_tuple(vmap(products)(*directions))


def vmap_double_backward(attend: Attend, s: Sample) -> Results:
    def product(*x: Tensor) -> Any:
        return grad(
            lambda *y: sum((g * t).sum() for g, t in zip(grad(_loss(attend, s), ARGS)(*y), s.t, strict=True)), ARGS
        )(*x)

    return _as_tuple(vmap(product, BATCHED)(*_stacked(s)))


def nested_vmap(attend: Attend, s: Sample) -> Results:
    q, k, v = s.x
    inner = vmap(grad(_loss(attend, s), ARGS), (0, None, None))
    return _as_tuple(vmap(inner, (None, 0, None))(torch.stack([q, -q]), torch.stack([k, 0.5 * k, 2 * k]), v))


COMPOSITIONS: dict[str, Composition] = {
    f.__name__: f
    for f in (
        forward,
        backward,
        double_backward,
        forward_ad,
        func_vjp,
        func_jvp,
        partial_tangents,
        forward_over_reverse,
        reverse_over_reverse,
        reverse_over_forward,
        reverse_over_forward_tangents,
        forward_over_forward,
        along_the_direction,
        functional_hvp,
        vectorized_hessian,
        full_hessian,
        jacobians,
        nested_jacobians,
        vmap_grad,
        grad_vmap,
        vmap_hvp,
        vmap_directions,
        vmap_double_backward,
        nested_vmap,
    )
}
# Cheap enough for every sample; the others build whole Jacobians.
WHOLE_MATRICES = ("vectorized_hessian", "full_hessian", "jacobians", "nested_jacobians")
DIRECTIONAL = tuple(name for name in COMPOSITIONS if name not in WHOLE_MATRICES)


def third_order(attend: Attend, s: Sample) -> Results:
    """Not among the promises: exact with a backend that has every order, an error with any other."""
    return (jvp(lambda *x: grad(lambda *y: jvp(_loss(attend, s), y, s.t)[1])(*x), s.x, s.u)[1],)
