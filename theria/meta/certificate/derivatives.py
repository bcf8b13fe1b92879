"""The derivatives of a bilevel problem that a certificate needs, on vectors z (n,) and x (m,)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, jvp

from theria.curvature.second_order import second_order
from theria.curvature.vectors import Layout, Tree
from theria.meta.solvers import LinearSolver, Solution

Loss = Callable[[Tree, Tree], Tensor]


@dataclass(frozen=True)
class Derivatives:
    """Of the inner loss g(z, x) and the outer loss f(z, x): none higher than the second, which fused kernels have."""

    inner_loss: Loss
    outer_loss: Loss
    inner: Layout
    outer: Layout

    def g(self, z: Tensor, x: Tensor) -> Tensor:
        return self._value(self.inner_loss, z, x, "inner_loss")

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return self._value(self.outer_loss, z, x, "outer_loss")

    def gradient(self, z: Tensor, x: Tensor) -> Tensor:
        """grad_z g, (n,)."""
        return grad(self.g)(z, x)

    def hessian(self, z: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """H w with H = grad^2_zz g, (n,)."""
        return jvp(lambda a: self.gradient(a, x), (z,), (w,))[1]

    def cross(self, z: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """B w with B = grad^2_xz g, (m,)."""
        return grad(lambda a: self.gradient(z, a) @ w)(x)

    def cross_transposed(self, z: Tensor, x: Tensor, e: Tensor) -> Tensor:
        """B'e, (n,)."""
        return jvp(lambda a: self.gradient(z, a), (x,), (e,))[1]

    def outer_gradients(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """grad_z f (n,), grad_x f (m,)."""
        return grad(self.f, argnums=(0, 1))(z, x)

    def lagrangian(self, z: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients (n,), (m,) of l(z, x) = f(z, x) + <grad_z g(z, x), v>: grad_z f + H v and grad_x f + B v."""
        return grad(lambda a, b: self.f(a, b) + self.gradient(a, b) @ v, argnums=(0, 1))(z, x)

    def solve(self, solver: LinearSolver, z: Tensor, x: Tensor, b: Tensor) -> Solution:
        """H^-1 b, as far as the solver gets."""
        return solver.solve(lambda w: self.hessian(z, x, w), b, throw=False)

    def rounding(self, z: Tensor, x: Tensor) -> float:
        """What is left of grad_z g at a solution: the rounding of terms that cancel, each about as large as H z."""
        return 64 * torch.finfo(z.dtype).eps * norm(self.hessian(z, x, z))

    def resolve(self, solver: LinearSolver, z: Tensor, x: Tensor, most: int = 30) -> Tensor:
        """Newton's method on grad_z g(., x) = 0 from z, until the gradient is rounding or falls no more.

        A step is halved until it lowers the gradient's norm, so that what the Hessian is wrong in costs steps, not
        correctness.
        """
        gradient, floor = self.gradient(z, x), self.rounding(z, x)
        for _ in range(most):
            if norm(gradient) <= floor:
                break
            step, t = self.solve(solver, z, x, gradient).value, 1.0
            trial = self.gradient(z - step, x)
            while not norm(trial) < norm(gradient) and t > 1e-3:
                t /= 2
                trial = self.gradient(z - t * step, x)
            if not norm(trial) < norm(gradient):
                break
            z, gradient = z - t * step, trial
        return z

    def _value(self, loss: Loss, z: Tensor, x: Tensor, name: str) -> Tensor:
        value = second_order(loss)(self.inner.unravel(z), self.outer.unravel(x))
        if not isinstance(value, Tensor) or value.ndim:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} returned {given}; a scalar tensor is needed. Reduce it, e.g. by .mean().")
        return value


def norm(x: Tensor) -> float:
    """||x||_2 on the host."""
    return float(torch.linalg.vector_norm(x))


def central(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float) -> Tensor:
    """The central difference of `function` along `direction`."""
    return (function(at + step * direction) - function(at - step * direction)) / (2 * step)


def step_for(at: Tensor, direction: Tensor, power: float) -> float:
    """eps^power in units of the point: what balances truncation (step^2) with rounding (eps / step) at power 1/3."""
    return torch.finfo(at.dtype).eps ** power * (1 + norm(at)) / max(norm(direction), torch.finfo(at.dtype).tiny)
