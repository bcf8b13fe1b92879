"""Forward mode where PyTorch 2.13 leaves gaps.

NOTE [The jvp of a Function and the levels below]. PyTorch calls the `jvp` of a custom Function with forward mode
switched off, so that plain operations in it lose the tangents of every outer level, without an error:
`jvp(jvp(Square.apply))` of the textbook's Square is 0. With it switched on again they would mix with the tangents of
the level itself. So the tensors are first taken out of that one level, as PyTorch does it for `forward`.

NOTE [One open level]. `torch.func.jvp` inside `torch.autograd.forward_ad.dual_level()` raises that nested forward mode
is not supported. The same derivative is then taken by reverse mode twice: u -> J'u is linear, and its transpose is J.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from theria.meta.constant import plain_gradient
from theria.meta.levels import carries_derivative, unshared

Tree = Any  # a pytree of tensors


@contextmanager
def below_the_tangent(*groups: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Inside the `jvp` of a Function: its tensors without the level it is called for, in which others go on."""
    level = _tangent_level()
    lowered = groups if level is None else tuple([_without(x, level) for x in group] for group in groups)
    with forward_ad._set_fwd_grad_enabled(level is not None):
        yield lowered


def _tangent_level() -> int | None:
    """The innermost level of `torch.func.jvp`; levels of vmap above it are those of the Function's own vmap rule."""
    for interpreter in reversed(_functorch.get_interpreter_stack() or []):
        if interpreter.key() == _functorch.TransformType.Jvp:
            return interpreter.level()
    return None


def _without(x: Any, level: int) -> Any:
    if not isinstance(x, Tensor) or not _functorch.is_functorch_wrapped_tensor(x):
        return x
    if _functorch.is_batchedtensor(x):
        inner = _without(_functorch.get_unwrapped(x), level)
        return _functorch._add_batch_dim(inner, _functorch.maybe_get_bdim(x), _functorch.maybe_get_level(x))
    return _functorch.get_unwrapped(x) if _functorch.maybe_get_level(x) == level else x


def push_forward(function: Callable[[Tree], Tree], x: Tree, tangent: Tree) -> Tree:
    """The derivative of `function` at x along `tangent`, also where a dual level of `torch.autograd` is open."""
    if _forward_mode_is_free():
        return torch.func.jvp(function, (unshared(x),), (tangent,))[1]
    value, pull = torch.func.vjp(function, x)[:2]
    return torch.func.vjp(lambda u: pull(u)[0], pytree.tree_map(torch.zeros_like, value))[1](tangent)[0]


def hessian_product(loss: Callable[[Tree], Tensor], x: Tree, v: Tree, constant: bool) -> Tree:
    """H v, forward over reverse.

    Args:
        constant: nothing will differentiate it in reverse, so that each activation is freed as the pass is beyond it.
            A v that carries a derivative says otherwise: a solver that transposes the product has to see H', not 0.
    """
    transposed = any(carries_derivative(leaf) for leaf in pytree.tree_leaves(v))
    # Where forward mode is taken, the gradient itself is differentiated in reverse.
    once = constant and not transposed and _forward_mode_is_free()
    gradient = (lambda x: plain_gradient(loss, x)) if once else torch.func.grad(loss)
    return push_forward(gradient, x, v)


def _forward_mode_is_free() -> bool:
    return forward_ad._current_level < 0 or bool(eager_transforms.JVP_NESTING)
