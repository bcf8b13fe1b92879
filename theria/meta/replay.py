"""What an adjoint has to know of an inner loop before it runs it twice: random draws, precision, what lies outside."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from theria.meta.levels import carries_derivative, first_task, freeze, mapped
from theria.meta.optimisers import Hyper, InnerOptimiser, Params
from theria.meta.outside import Outside


class RandomStates:
    """The generators' states before each step, so that the way back draws the same dropout masks."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self._states: dict[int, list[Tensor]] = {}

    def current(self) -> list[Tensor]:
        """The states of the CPU generator and of the GPUs in use."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in self.devices)]

    @contextmanager
    def step(self, t: int) -> Iterator[None]:
        """The first time step t draws what comes next; from then on what it drew then, leaving the generators alone."""
        if t not in self._states:
            self._states[t] = self.current()
            yield
            return
        with torch.random.fork_rng(self.devices):
            cpu, *gpus = self._states[t]
            torch.set_rng_state(cpu)
            for i, state in zip(self.devices, gpus, strict=True):
                torch.cuda.set_rng_state(state, i)
            yield


class Autocast:
    """The mixed precision of now, to be entered again by a backward, which runs after the user's block was left."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds = sorted({t.device.type for t in tensors if torch.amp.is_autocast_available(t.device.type)})
        self._states = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Run with it."""
        with ExitStack() as stack:
            for kind, enabled, dtype in self._states:
                if enabled or torch.is_autocast_enabled(kind):
                    # Without the cache of casts, which would keep those of another derivative's level.
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


class Replay:
    """The surroundings of every inner step, at its first run and at each later one.

    Args:
        tensors: those of the loop, whose devices matter.
        random: whether the inner loss draws random numbers.
        outside: what the inner loss and the optimiser read that is no argument.
    """

    def __init__(self, tensors: Sequence[Tensor], random: bool, outside: Outside) -> None:
        self._outside = outside
        self._autocast = Autocast(tensors)
        self._random = RandomStates(tensors) if random else None

    @contextmanager
    def step(self, t: int) -> Iterator[None]:
        """Everything as it was, or is, when step t runs for the first time.

        Raises:
            RuntimeError: when a tensor that the loss reads from outside is not what it was.
        """
        with ExitStack() as stack:
            stack.enter_context(self._outside.again())
            stack.enter_context(self._autocast.again())
            if self._random is not None:
                stack.enter_context(self._random.step(t))
            yield


def probe(
    adjoint: object,
    inner_loss: Callable[[Params, Any], Tensor],
    params: Params,
    context: Any,
    optimiser: InnerOptimiser,
    hyper: Hyper,
) -> Replay:
    """Evaluate the loss and an update once on constants; the surroundings to repeat.

    Raises:
        ValueError: when a value needs a gradient all the same: something reads a tensor that is not an argument, and
            a derivative with respect to it would be lost without a word.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((params, context, hyper)) if isinstance(leaf, Tensor)]
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return Replay(tensors, False, Outside())  # nothing is differentiated, so nothing runs twice or can be lost
    params, context, hyper = pytree.tree_map_only(Tensor, first_task, freeze((params, context, hyper)))
    states, outside = RandomStates(tensors), Outside(inner_loss)
    with torch.random.fork_rng(states.devices):
        before = states.current()
        with outside.watched():
            loss = inner_loss(params, context)
        random = not all(torch.equal(a, b) for a, b in zip(before, states.current(), strict=True))
    if carries_derivative(loss):
        raise ValueError(_LOST.format(adjoint=adjoint, what="the inner loss"))
    # A backward under another vmap would take it for that one's. Draws that differ from task to task are mapped, too.
    if mapped(loss) and not random:
        raise ValueError(_MAPPED.format(adjoint=adjoint))
    with outside.watched():  # of any gradient, such as the parameters
        moved = optimiser.update(params, optimiser.init(params), params, hyper)
    if any(carries_derivative(leaf) for leaf in pytree.tree_leaves(moved)):
        raise ValueError(_LOST.format(adjoint=adjoint, what="an update of the inner optimiser"))
    return Replay(tensors, random, outside)


_LOST = (
    "{adjoint}: {what} depends on a tensor that is being differentiated (requires_grad=True, or a tangent) and is "
    "neither in params nor in context nor in hyper: a closed-over variable, or a parameter of the loss function. Its "
    "derivative would be lost. Pass it through context, detach it, or use adjoint=Unrolled()"
)


_MAPPED = (
    "{adjoint}: the inner loss reads a closed-over tensor that torch.func.vmap maps over, which PyTorch cannot bring "
    "into an autograd.Function. Pass it through context, or use adjoint=Unrolled()"
)


@contextmanager
def closed_over_vmap(adjoint: object) -> Iterator[None]:
    """Say what it means that functorch gives up inside: a tensor that is mapped over and is not an argument."""
    try:
        yield
    except RuntimeError as error:
        if "INTERNAL ASSERT" in str(error) and "functorch" in str(error):
            raise ValueError(_MAPPED.format(adjoint=adjoint)) from error
        raise
