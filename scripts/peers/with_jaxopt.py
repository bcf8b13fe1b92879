"""JAXopt: implicit differentiation of a root, and of its own solvers; unrolling by reverse mode."""
# pyright: reportMissingImports=false

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
from given import ITERATIONS, RESIDUAL, Given
from jaxopt import implicit_diff, linear_solve

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
VERSION = version("jaxopt")


def unrolled(given: Given) -> Callable[[], np.ndarray]:
    inner, outer = given.losses(jnp, jnp.asarray)

    def value(x: Any) -> Any:
        z = jnp.broadcast_to(x, given.inner0.shape) if given.starts_at_outer else jnp.asarray(given.inner0)
        step = jax.grad(inner)
        z, _ = jax.lax.scan(lambda z, _: (z - given.rate * step(z, x), None), z, length=given.steps)
        return outer(z, x)

    return compiled(value, given)


def implicit(given: Given, solver: Any) -> Callable[[], np.ndarray]:
    inner, outer = given.losses(jnp, jnp.asarray)
    solve = implicit_diff.custom_root(jax.grad(inner), solve=solver)(lambda _, x: jnp.asarray(given.solution))
    return compiled(lambda x: outer(solve(None, x), x), given)


def descent(given: Given) -> Callable[[], np.ndarray]:
    """Its own gradient descent, differentiated as it does by default."""
    inner, outer = given.losses(jnp, jnp.asarray)
    solver = jaxopt.GradientDescent(inner, stepsize=given.rate, acceleration=False, maxiter=given.steps, tol=RESIDUAL)
    return compiled(lambda x: outer(solver.run(jnp.asarray(given.inner0), x).params, x), given)


def compiled(value: Callable[[Any], Any], given: Given) -> Callable[[], np.ndarray]:
    """A gradient that is compiled at its first call."""
    gradient = jax.jit(jax.grad(value))
    return lambda: np.asarray(gradient(jnp.asarray(given.outer0)))


def methods(given: Given) -> Mapping[str, Callable[[], np.ndarray]]:
    found = {"lax.scan, unrolled": unrolled(given)}
    if given.solved:
        settled = {"maxiter": ITERATIONS, "tol": RESIDUAL}
        found |= {
            "custom_root(cg)": implicit(given, partial(linear_solve.solve_cg, **settled)),
            "custom_root(normal_cg)": implicit(given, partial(linear_solve.solve_normal_cg, **settled)),
            "GradientDescent": descent(given),
        }
    return found
