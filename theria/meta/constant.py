"""Gradients that nothing will differentiate in reverse, and constants that nothing differentiates at all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def plain_gradient(loss: Callable[[Any], Tensor], tree: Any) -> Any:
    """The gradient of `loss` at a pytree, for callers that will not differentiate it in reverse again.

    `torch.func.grad` keeps the graph of its own backward in case it is differentiated again; here each activation is
    freed as soon as the backward is past it.
    """
    value, pull = torch.func.vjp(loss, tree)[:2]
    (gradient,) = pull(torch.ones_like(value), retain_graph=False, create_graph=False)
    return gradient


class _Constant(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return torch.zeros_like(tangents[0])


def constant(tree: Any) -> Any:
    """A copy of every floating-point tensor of a pytree that nothing differentiates through.

    `Tensor.detach` stops reverse mode only: a forward-mode tangent passes through it.
    """
    return pytree.tree_map_only(Tensor, _stop, tree)


def _stop(x: Tensor) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()):
        return x
    stopped: Tensor = _Constant.apply(x)  # type: ignore[assignment]
    return stopped.detach()
