"""TorchOpt: differentiable optimisers, and implicit differentiation of a root."""
# pyright: reportMissingImports=false

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torchopt
from given import ITERATIONS, RESIDUAL, Given
from torches import Inner, gradient, leaf, losses, start
from torchopt import linear_solve
from torchopt.diff.implicit import custom_root

VERSION = torchopt.__version__


def unrolled(given: Given) -> np.ndarray:
    inner, outer = losses(given)
    x = leaf(given.outer0)
    z0 = start(given, x)
    module = Inner(z0.detach(), inner)
    optimiser = torchopt.MetaSGD(module, lr=given.rate)
    if given.starts_at_outer:
        module._parameters["z"] = z0  # pyright: ignore[reportArgumentType]
    for _ in range(given.steps):
        optimiser.step(module(x))
    return gradient(outer(module.z, x), x)


def implicit(given: Given, solver: Any) -> np.ndarray:
    """The derivative at the exact solution."""
    inner, outer = losses(given)
    x = leaf(given.outer0)
    optimality = torch.func.grad(inner)
    solution = torch.from_numpy(given.solution)

    @custom_root(optimality, argnums=1, solve=solver)
    def solve(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return solution.clone()

    return gradient(outer(solve(torch.from_numpy(given.inner0), x), x), x)


def methods(given: Given) -> Mapping[str, Callable[[], np.ndarray]]:
    found = {"MetaSGD": partial(unrolled, given)}
    solvers = {}
    if given.solved:
        solvers = {
            "custom_root(cg)": linear_solve.solve_cg(maxiter=ITERATIONS, rtol=RESIDUAL, atol=0.0),
            "custom_root(normal_cg)": linear_solve.solve_normal_cg(maxiter=ITERATIONS, rtol=RESIDUAL, atol=0.0),
            "custom_root(inv)": linear_solve.solve_inv(),
        }
    elif given.series is not None:
        solvers = {"custom_root(ns)": linear_solve.solve_inv(ns=True, maxiter=given.series, alpha=given.rate)}
    return found | {name: partial(implicit, given, solver) for name, solver in solvers.items()}
