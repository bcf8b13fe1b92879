"""A function whose derivatives run it again instead of keeping what it computed, to every order and in both modes.

For f: tensors -> tensors let pull_f(x, y') = (df/dx)^T y' and push_f(x, x') = (df/dx) x'. They are functions of tensors
too, so that recomputation is closed under differentiation:

    backward of recompute(f)(x) = recompute(pull_f)(x, y'),        jvp of recompute(f)(x) = recompute(push_f)(x, x')

and each of the two has a backward and a jvp of the same form. Only x (and y', x') is kept, at every order.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.levels import unshared

Function = Callable[..., tuple[Tensor, ...]]


def recompute(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`function(*tensors)`, a tuple of tensors, of which nothing but the arguments is kept for its derivatives.

    Args:
        function: pure; every tensor that it depends on differentiably is an argument, and its outputs are new
            floating-point tensors. Where it has an attribute `once`, that runs instead of it when nothing will
            differentiate through the operations themselves, so that it may free what it needs no more.

    Forward mode is that of `torch.func.jvp`; inside `torch.autograd.forward_ad.dual_level` PyTorch raises, because it
    does not nest such levels.
    """
    return _Recompute.apply(function, *tensors)  # type: ignore[return-value]


class _Recompute(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(function, "once", function)(*(tensor.detach() for tensor in tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *tensors = inputs
        ctx.outputs = len(output)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        needed = tuple(ctx.needs_input_grad[1:])
        with _nested():
            gradients = iter(recompute(_Pull(ctx.function, needed), *tensors, *cotangents))
        return None, *(next(gradients) if need else None for need in needed)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        tensors, tangents = ctx.saved_tensors, tangents[1:]  # the function has none
        moving = tuple(tangent is not None for tangent in tangents)
        return recompute(_Push(ctx.function, moving), *tensors, *(t for t in tangents if t is not None))


@contextmanager
def _nested() -> Iterator[None]:
    """Say what it means that functorch gives up inside."""
    try:
        yield
    except RuntimeError as error:
        if "INTERNAL ASSERT" in str(error) and "functorch" in str(error):
            raise NotImplementedError(
                "the inner loss has an implicit derivative (DeepEquilibrium, root, argmin, ..), and PyTorch cannot run "
                "it again in a backward of tasks under torch.func.vmap: use adjoint=MixedMode(), Unrolled() without "
                "checkpoint_every, or give the tasks one by one (batched=False)"
            ) from error
        raise


@dataclass(frozen=True)
class _Pull:
    """(x, y') -> (df/dx)^T y' for the x marked in `needed`."""

    function: Function
    needed: tuple[bool, ...]

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self._pull(values, keep=True)

    def once(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The same, freeing each activation as soon as the backward is past it."""
        return self._pull(values, keep=False)

    def _pull(self, values: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
        tensors, cotangents = values[: len(self.needed)], values[len(self.needed) :]
        chosen, function = _of(self.function, tensors, self.needed)
        pull = torch.func.vjp(function, *chosen)[1]
        return pull(tuple(cotangents), retain_graph=keep, create_graph=keep)


@dataclass(frozen=True)
class _Push:
    """(x, x') -> (df/dx) x' with the tangents x' of the x marked in `moving`."""

    function: Function
    moving: tuple[bool, ...]

    def __call__(self, *values: Tensor) -> tuple[Tensor, ...]:
        tensors, tangents = values[: len(self.moving)], values[len(self.moving) :]
        chosen, function = _of(self.function, tensors, self.moving)
        return torch.func.jvp(function, tuple(unshared(chosen)), tuple(tangents))[1]


def _of(function: Function, tensors: Sequence[Tensor], marked: Sequence[bool]) -> tuple[list[Tensor], Function]:
    """The marked arguments, and the function of them alone."""
    chosen = [tensor for tensor, mark in zip(tensors, marked, strict=True) if mark]

    def partial(*chosen: Tensor) -> tuple[Tensor, ...]:
        given = iter(chosen)
        return function(*(next(given) if mark else x for x, mark in zip(tensors, marked, strict=True)))

    return chosen, partial


@dataclass(frozen=True)
class Layout:
    """How a pytree is made of its tensors: its structure and the leaves that are none."""

    spec: pytree.TreeSpec
    where: tuple[int, ...]
    others: tuple[Any, ...]

    @classmethod
    def split(cls, tree: Any) -> tuple[list[Tensor], "Layout"]:
        """The tensors of a pytree, and its layout."""
        leaves, spec = pytree.tree_flatten(tree)
        where = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return [leaves[i] for i in where], cls(spec, where, others)

    def join(self, tensors: Sequence[Tensor]) -> Any:
        """The pytree with these tensors."""
        leaves = list(self.others)
        for i, tensor in zip(self.where, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self.spec)
