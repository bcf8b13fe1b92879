"""What `MixedMode` has to know of an inner loss before it runs it twice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad

from theria.meta.constant import constant
from theria.meta.optimisers import Params


class RandomStates:
    """The generators' states before each step, so that the way back draws the same dropout masks."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self._states: list[list[Tensor]] = []

    def current(self) -> list[Tensor]:
        """The states of the CPU generator and of the GPUs in use."""
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in self.devices)]

    def record(self) -> None:
        """Keep the states before the next step."""
        self._states.append(self.current())

    @contextmanager
    def replay(self, t: int) -> Iterator[None]:
        """Run with the states of step t, then restore those of now."""
        with torch.random.fork_rng(self.devices):
            cpu, *gpus = self._states[t]
            torch.set_rng_state(cpu)
            for i, state in zip(self.devices, gpus, strict=True):
                torch.cuda.set_rng_state(state, i)
            yield


def probe(inner_loss, params: Params, context, tensors: Sequence[Tensor]) -> bool:
    """Evaluate the loss once on constants; says whether it draws random numbers.

    Raises:
        ValueError: when the value needs a gradient all the same: the loss reads a tensor that is not an argument,
            and a derivative with respect to it would be lost without a word.
    """
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return False  # nothing is differentiated, so nothing runs twice and nothing can be lost
    constants = constant((params, context))
    states = RandomStates(tensors)
    with torch.random.fork_rng(states.devices):
        before = states.current()
        loss = inner_loss(*constants)
        random = not all(torch.equal(a, b) for a, b in zip(before, states.current(), strict=True))
    if carries_derivative(loss):
        raise ValueError(
            "MixedMode: the inner loss depends on a tensor that is being differentiated (requires_grad=True, or a "
            "tangent) and is neither in params nor in context: a closed-over variable, or a parameter of the loss "
            "function. Its derivative would be lost. Pass it through context, detach it, or use adjoint=Unrolled()"
        )
    return random


def carries_derivative(tensor: Tensor) -> bool:
    """Whether a tensor has a gradient to compute or a tangent, at any level of torch.func."""
    while True:
        if tensor.requires_grad or _has_tangent(tensor):
            return True
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)


def _has_tangent(tensor: Tensor) -> bool:
    if _functorch.is_batchedtensor(tensor):
        return False  # a level of vmap has none of its own; what it wraps is looked at next
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
