"""Where an outer step may be cut into pieces: between inner steps, on the way there and on the way back.

`theria.meta.fused` traces a step as one graph of tens of thousands of operations. What lies between two cuts is the
same for most inner steps, and is compiled once. Outside of such a trace nothing here does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

T = TypeVar("T")

_CUTS: ContextVar[list[int] | None] = ContextVar("_CUTS", default=None)


@contextmanager
def collected() -> Iterator[list[int]]:
    """Collect the cuts of a trace: numbers of nodes that its graph has where one is."""
    cuts: list[int] = []
    token = _CUTS.set(cuts)
    try:
        yield cuts
    finally:
        _CUTS.reset(token)


def cut() -> None:
    """The step may be cut here."""
    cuts, mode = _CUTS.get(), get_proxy_mode()
    if cuts is not None and mode is not None:
        cuts.append(len(mode.tracer.graph.nodes))


def cut_both_ways(values: T) -> T:
    """The same values; here and where their derivatives pass on the way back, the step may be cut."""
    if _CUTS.get() is None:
        return values
    leaves, structure = pytree.tree_flatten(values)
    return pytree.tree_unflatten(_Cut.apply(*leaves), structure)  # type: ignore[arg-type]


class _Cut(torch.autograd.Function):
    """The identity, whose backward is called when the derivatives of all its values are known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*leaves: Tensor) -> tuple[Tensor, ...]:
        cut()
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        cut()
        return cotangents

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        return tangents
