"""Backtracking line search, for each task on its own."""

from collections.abc import Callable

import torch
from torch import Tensor

from theria.meta.solvers.loop import CONVERGED, RUNNING, Stepped, Vectors, iterate


def backtrack(trial: Callable[[Tensor], tuple[Tensor, Vectors]], t: Tensor, halvings: int) -> tuple[Tensor, Vectors]:
    """The values at the first of t, t/2, t/4, ... that is good, and whether one was; else those of the last.

    Args:
        trial: t -> (good, values at t).
    """

    def status(good: Tensor) -> Tensor:
        return torch.where(good, CONVERGED, torch.full_like(good, RUNNING, dtype=torch.int64))

    def step(state: Vectors) -> Stepped:
        t = state[0] / 2
        good, values = trial(t)
        return status(good), (t, *values)

    good, values = trial(t)
    ended, _, state = iterate(step, status(good), (t, *values), halvings, check_every=1)
    return ended == CONVERGED, state[1:]
