"""Constants for the iterations of a solver: what has neither gradient nor tangent, at any level of `torch.func`.

`Tensor.detach` stops one level of reverse mode and no forward mode. A solver's iterations are not to be differentiated
at all (an implicit rule gives the derivative of their limit), so each of its inputs is taken out of every level of
`grad` and `jvp`; the levels of `vmap` stay, in which tasks stop one by one.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from theria.meta.levels import carries_derivative, first_task, freeze, mapped, tasks_first
from theria.meta.replay import RandomStates

Tree = Any  # a pytree


def differentiating() -> bool:
    """Whether a derivative could be asked for here: outside of `no_grad`, in forward mode or in a `torch.func` one."""
    active = torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or active


def check_function(function: Callable[..., Tree], arguments: Sequence[Tree], what: str) -> Tree:
    """The value of `function` at the constants of the first task, when an implicit rule may differentiate it.

    Args:
        arguments: what is given to it, with their derivatives.

    Raises:
        ValueError: for one that reads a tensor that is being differentiated and is no argument: a rule knows nothing of
            it, so that its derivative would be lost without a word. For one that reads a tensor over which
            `torch.func.vmap` maps and that is no argument: a backward under another vmap would take it for that one's
            (PyTorch tells levels apart by their number alone). For one that draws random numbers: its derivative would
            be that of another function than the one that was solved.
    """
    constants = pytree.tree_map_only(Tensor, first_task, freeze(arguments))
    value = _repeatable(function, constants, what)
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    if any(carries_derivative(leaf) for leaf in leaves):
        raise ValueError(
            f"{what} depends on a tensor that is being differentiated (requires_grad=True, or a tangent) and is not "
            f"among its arguments: a closed-over variable, or a parameter of a module. Its derivative would be lost. "
            f"Pass it as an argument (for a module: torch.func.functional_call with its parameters), or detach it"
        )
    if any(mapped(leaf) for leaf in leaves) and any(
        carries_derivative(leaf) for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)
    ):
        raise ValueError(
            f"{what} depends on a tensor that torch.func.vmap maps over and that is not among its arguments, which "
            f"PyTorch cannot bring into an autograd.Function: pass it as an argument"
        )
    return value


def _repeatable(function: Callable[..., Tree], arguments: Sequence[Any], what: str) -> Tree:
    states = RandomStates([x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)])
    with torch.random.fork_rng(states.devices):
        before = states.current()
        value = function(*arguments)
        drew = not all(torch.equal(a, b) for a, b in zip(before, states.current(), strict=True))
    if drew:
        raise ValueError(
            f"{what} draws random numbers (dropout?), so there is no one equation that its solution satisfies: use "
            f"eval(), give the noise as an argument, or take an adjoint that follows the steps, such as Unrolled()"
        )
    return value


def each_task(function: Callable[..., Tree], *arguments: Tree) -> Tree:
    """`function` on frozen pytrees, task after task under `vmap`: it sees plain tensors only, which have a memory.

    So it may be anything on the host: numpy, scipy, a loop that writes in place.
    """
    leaves, spec = pytree.tree_flatten(arguments)
    with temporarily_clear_interpreter_stack():
        pairs = [tasks_first(x) if isinstance(x, Tensor) else (x, ()) for x in leaves]
        sizes = {level: x.shape[i] for x, levels in pairs for i, level in enumerate(levels)}
        levels = sorted(sizes)
        values = []
        for index in product(*(range(sizes[level]) for level in levels)):
            at = dict(zip(levels, index, strict=True))
            task = [x[tuple(at[level] for level in own)] if own else x for x, own in pairs]
            values.append(freeze(function(*pytree.tree_unflatten(task, spec))))
        return pytree.tree_map(lambda *xs: _batched(xs, sizes), *values)


def _batched(tasks: Sequence[Tensor], sizes: dict[int, int]) -> Tensor:
    """One tensor for each combination of tasks, in their order -> the tensor at all levels of vmap."""
    levels = sorted(sizes)
    x = torch.stack(list(tasks)).unflatten(0, [sizes[level] for level in levels]) if levels else tasks[0]
    for level in levels:
        x = _functorch._add_batch_dim(x, 0, level)
    return x
