"""From `theria.testing.problems` to files that every peer can read."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.losses import LOSSES

from theria.testing.problems import PROBLEMS, Problem
from theria.testing.problems.quadratics import Quadratic

UNROLLED = 1e-13  # the distance from z* that unrolling leaves
SAME = 1e-12  # relative: the losses written twice, in float64


def export(name: str, path: Path, seed: int = 0) -> Problem:
    """Write a problem; its losses in `losses.py` are checked against its own.

    Raises:
        ValueError: they differ, or the problem reads data that is not known here.
    """
    problem = PROBLEMS[name](seed)
    x = problem.outer0
    data = _data("inner", problem.inner_loss) | _data("outer", problem.outer_loss)
    _check(problem, data)
    arrays: dict[str, Any] = {f"data_{key}": value for key, value in data.items()}
    np.savez(
        path,
        name=name,
        inner0=problem.initial(x),
        outer0=x,
        solution=problem.inner_solution(x),
        rate=problem.rate,
        steps=problem.steps_to(UNROLLED),
        exactly=problem.steps is not None,
        starts_at_outer=problem.start is not None,
        **arrays,
    )
    return problem


def _data(side: str, loss: Callable[..., Any]) -> dict[str, Any]:
    """The numbers that a loss closes over, by their names in its source."""
    owner = getattr(loss, "__self__", None)
    found = vars(owner) if isinstance(owner, Quadratic) else dict(inspect.getclosurevars(loss).nonlocals)
    if "losses" in found:  # a function of the data beside it
        found.pop("losses")
    return {
        f"{side}_{name}": value.numpy() if isinstance(value, torch.Tensor) else value for name, value in found.items()
    }


def _check(problem: Problem, data: dict[str, Any]) -> None:
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) and v.ndim else v for k, v in data.items()}
    z, x = torch.randn_like(problem.initial(problem.outer0)), problem.outer0
    for loss, own in zip(LOSSES[problem.name], (problem.inner_loss, problem.outer_loss), strict=True):
        written, expected = loss(torch, tensors, z, x), own(z, x)
        if not torch.allclose(written, expected, rtol=SAME, atol=0):
            raise ValueError(
                f"{problem.name}: scripts/peers/losses.py gives {written.item()} where theria.testing.problems gives "
                f"{expected.item()}: bring the two together"
            )
