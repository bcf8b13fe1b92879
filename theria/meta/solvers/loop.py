"""One loop for all iterative solvers: a fixed bound, masked updates, no synchronisation unless asked for.

Each task stops on its own: its state is frozen by `torch.where` while others go on, so that `vmap` of a solve equals
the loop of solves. Frozen tasks still cost their share of every operator product.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]

RUNNING = -1  # beside the values of Result
CONVERGED, MAX_ITERATIONS, BREAKDOWN, INDEFINITE, NON_FINITE = range(5)

Vectors = tuple[Tensor, ...]
Stepped = tuple[Tensor, Vectors]  # code, new state; a name because torch.compile cannot evaluate the subscript
Step = Callable[[Vectors], Stepped]


def readable(x: Tensor) -> Tensor:
    """The plain tensor behind all levels of `torch.func`, with the dimensions of every `vmap` it depends on."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def any_running(status: Tensor) -> bool:
    """Whether a task of any enclosing `vmap` still runs: one synchronisation with the device."""
    if torch.compiler.is_compiling():
        return True  # a traced loop has a fixed length
    return bool((readable(status) == RUNNING).any())


def classify(like: Tensor, *rules: tuple[Tensor, int]) -> Tensor:
    """int64 (): the code of the first rule that holds, else RUNNING."""
    code = torch.full_like(like, RUNNING, dtype=torch.int64)
    for condition, value in reversed(rules):
        code = torch.where(condition, value, code)
    return code


def first_status(norm: Tensor, goal: Tensor) -> Tensor:
    """The status before the first iteration, from the norm of the first residual."""
    return classify(norm, (~norm.isfinite(), NON_FINITE), (norm <= goal, CONVERGED))


def iterate(
    step: Step, status: Tensor, state: Vectors, bound: int, check_every: int | None
) -> tuple[Tensor, Tensor, Vectors]:
    """Apply `step` at most `bound` times to each running task.

    A step that ends in a failure is not taken: the state stays that of the last good iterate.

    Returns:
        status (RUNNING where the bound was met), iterations, state.
    """
    iterations = torch.zeros_like(status)
    for k in range(bound):
        if check_every is not None and k % check_every == 0 and not any_running(status):
            break
        running = status == RUNNING
        code, new = step(state)
        accepted = running & (code <= CONVERGED)
        state = tuple(torch.where(accepted, a, b) for a, b in zip(new, state, strict=True))
        status = torch.where(running, code, status)
        iterations = iterations + running
    return status, iterations, state


def norm(x: Tensor) -> Tensor:
    """||x||_2 of a vector, without overflow or underflow of the squares."""
    largest = nonzero(x.abs().amax())
    return largest * torch.linalg.vector_norm(x / largest)


def nonzero(x: Tensor) -> Tensor:
    """x with 1 in the place of 0, for divisions whose numerator is 0 there, or whose result is not used."""
    return torch.where(x == 0, torch.ones_like(x), x)


def epsilon(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps
