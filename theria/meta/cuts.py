"""Where an outer step may be cut into pieces: between inner steps, on the way there and on the way back.

`theria.meta.fused` traces a step as one graph of tens of thousands of operations. What lies between two cuts is the
same for most inner steps, and is compiled once. Outside of such a trace nothing here does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree

T = TypeVar("T")

# Of the trace that is being made. No context variable: on a GPU a backward runs in a thread of autograd, which has the
# modes of the thread that called it, the tracer's among them, and not its context.
_cuts: list[int] | None = None


@contextmanager
def collected() -> Iterator[list[int]]:
    """Collect the cuts of a trace: numbers of nodes that its graph has where one is. One trace at a time."""
    global _cuts
    before, _cuts = _cuts, []
    try:
        yield _cuts
    finally:
        _cuts = before


def cut() -> None:
    """The step may be cut here."""
    mode = get_proxy_mode()
    if _cuts is not None and mode is not None:
        _cuts.append(len(mode.tracer.graph.nodes))


def cut_both_ways(values: T) -> T:
    """The same values; here and where their derivatives pass on the way back, the step may be cut."""
    if _cuts is None:
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
