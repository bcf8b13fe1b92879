"""theria's own answers, by the same road as the peers'."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from given import ITERATIONS, RESIDUAL, Given
from torches import gradient, leaf, losses, start

import theria
from theria.meta import SGD, Adjoint, MixedMode, Unrolled
from theria.meta.implicit import Inexact
from theria.meta.implicit_adjoint import Implicit
from theria.meta.solvers import CG, MINRES, LinearSolver, Neumann, NormalCG

VERSION = theria.__version__


def solve(given: Given, adjoint: Adjoint, steps: int, at_solution: bool = False) -> np.ndarray:
    """`steps` steps from the start, or from the solution, differentiated by an adjoint."""
    inner, outer = losses(given)
    x = leaf(given.outer0)
    z0 = torch.from_numpy(given.solution) if at_solution else start(given, x)

    def inner_loss(params: dict[str, torch.Tensor], context: torch.Tensor) -> torch.Tensor:
        return inner(params["z"], context)

    final = adjoint.solve(inner_loss, {"z": z0.clone()}, x, SGD(given.rate), {}, steps)
    return gradient(outer(final["z"], x), x)


def methods(given: Given) -> Mapping[str, Callable[[], np.ndarray]]:
    found = {
        "Unrolled": partial(solve, given, Unrolled(), given.steps),
        "MixedMode": partial(solve, given, MixedMode(), given.steps),
    }
    solvers: dict[str, LinearSolver] = {}
    if given.solved:
        solvers = {
            "Implicit(CG)": CG(rtol=RESIDUAL, max_iterations=ITERATIONS),
            "Implicit(MINRES)": MINRES(rtol=RESIDUAL, max_iterations=ITERATIONS),
            "Implicit(NormalCG)": NormalCG(rtol=RESIDUAL, max_iterations=ITERATIONS),
        }
    elif given.series is not None:
        solvers = {"Implicit(Neumann)": Inexact(Neumann(scale=given.rate, max_iterations=given.series + 1))}
    for name, solver in solvers.items():
        # One step of gradient descent from the solution stays there.
        found[name] = partial(solve, given, Implicit(solver), 1, at_solution=True)
    return found
