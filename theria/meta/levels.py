"""The levels of `torch.func` around a tensor: whether it is being differentiated or mapped over, and what is inside.

PyTorch keeps a tensor that a transform works on in a wrapper with the number of its level. Here alone they are taken
apart.
"""

from typing import Any

from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from theria.ops.transforms import at_some_level, differentiated, tangent

Tree = Any  # a pytree


def freeze(tree: Tree) -> Tree:
    """The pytree with every tensor a constant; no memory is copied."""
    return pytree.tree_map_only(Tensor, _freeze, tree)


def _freeze(x: Tensor) -> Tensor:
    if _functorch.is_batchedtensor(x):
        level, dim = _functorch.maybe_get_level(x), _functorch.maybe_get_bdim(x)
        return _functorch._add_batch_dim(_freeze(_functorch.get_unwrapped(x)), dim, level)
    if _functorch.is_functorch_wrapped_tensor(x):
        return _freeze(_functorch.get_unwrapped(x))
    with temporarily_clear_interpreter_stack():  # else the innermost level would wrap what leaves here
        if forward_ad._current_level >= 0:
            x = forward_ad.unpack_dual(x).primal
        return x.detach()


def unshared(tree: Tree) -> Tree:
    """The pytree with a copy of each tensor whose entries share memory (`expand`): forward mode refuses those."""
    return pytree.tree_map_only(Tensor, lambda x: x.clone() if _shares(x) else x, tree)


def _shares(x: Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def first_task(x: Tensor) -> Tensor:
    """A constant without its levels of vmap."""
    with temporarily_clear_interpreter_stack():
        inner, levels = tasks_first(x)
        return inner[(0,) * len(levels)] if levels else inner


def mapped(x: Tensor) -> bool:
    """Whether a level of vmap maps over it."""
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def tasks_first(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The plain tensor behind x, the dimensions of its levels of vmap in front; those levels, outermost first."""
    if not _functorch.is_batchedtensor(x):
        return x, ()
    inner, levels = tasks_first(_functorch.get_unwrapped(x))
    n = len(levels)
    return inner.movedim(_functorch.maybe_get_bdim(x) + n, n), (*levels, _functorch.maybe_get_level(x))


def carries_derivative(tensor: Tensor) -> bool:
    """Whether a tensor has a gradient to compute or a tangent, at any level of torch.func."""
    return differentiated(tensor) is not None


def carries_tangent(tensor: Tensor) -> bool:
    """Whether a tensor has a tangent, at any level of torch.func."""
    return at_some_level(tangent, tensor) is not None
