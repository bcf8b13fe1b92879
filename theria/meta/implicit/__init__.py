"""Solutions of equations as differentiable functions of what the equations contain.

| function | invariant of its value x |
|---|---|
| `linear_solve(matvec, b, *args)` | matvec(x, *args) = b |
| `root(F, x0, *theta)`, `custom_root(F)` | F(x, *theta) = 0 |
| `fixed_point(f, x0, *theta)`, `custom_fixed_point(f)` | f(x, *theta) = x |
| `argmin(loss, x0, *theta)` | dloss/dx(x, *theta) = 0 |

Each returns `Solution(value, result, residual, iterations)`. Derivatives are those of the invariant (see
`theria.meta.implicit.rules`), not of the iterations: reverse and forward, to every order, under vmap.
"""

from theria.meta.implicit.argmin import argmin
from theria.meta.implicit.equation import IterationError, Method
from theria.meta.implicit.fixed_point import Anderson, Picard, custom_fixed_point, fixed_point
from theria.meta.implicit.linear_solve import Inexact, ScaledIdentity, linear_solve
from theria.meta.implicit.minimisers import LBFGS, GradientDescent, NewtonCG
from theria.meta.implicit.root import Newton, custom_root, root

__all__ = [
    "LBFGS",
    "Anderson",
    "GradientDescent",
    "Inexact",
    "IterationError",
    "Method",
    "Newton",
    "NewtonCG",
    "Picard",
    "ScaledIdentity",
    "argmin",
    "custom_fixed_point",
    "custom_root",
    "fixed_point",
    "linear_solve",
    "root",
]
