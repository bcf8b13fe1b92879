"""The errors of a hypergradient at one point: the bound, the estimate, the constants. Derived in `certify`."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from theria.curvature.lanczos import Extremes, extreme_eigenvalues
from theria.curvature.vectors import VectorMap
from theria.meta.certificate.derivatives import Derivatives, central, norm, step_for
from theria.meta.certificate.report import Constants, Terms
from theria.meta.solvers import MINRES, LinearSolver, Result


@dataclass(frozen=True)
class Point:
    """z (n,), x (m,), the adjoint vector v (n,) and the hypergradient p (m,) that is looked at."""

    d: Derivatives
    z: Tensor
    x: Tensor
    v: Tensor
    p: Tensor

    @cached_property
    def gradient(self) -> Tensor:
        """grad_z g, (n,)."""
        return self.d.gradient(self.z, self.x)

    @cached_property
    def lagrangian(self) -> tuple[Tensor, Tensor]:
        """r = H v + grad_z f (n,) and grad_x f + B v (m,)."""
        return self.d.lagrangian(self.z, self.x, self.v)

    @property
    def exact(self) -> LinearSolver:
        """What the estimates solve with: as exactly as the dtype allows, minima or not."""
        return MINRES(rtol=torch.finfo(self.z.dtype).eps ** 0.6, check_every=1)

    def hessian(self, w: Tensor) -> Tensor:
        return self.d.hessian(self.z, self.x, w)

    def constants(self, ends: Extremes, steps: int, seed: torch.Generator) -> Constants:
        """The norms from `steps` products each; those of changes only where the inner gradient is not zero."""

        def cross_squared(w: Tensor) -> Tensor:
            return self.d.cross_transposed(self.z, self.x, self.d.cross(self.z, self.x, w))

        def inner_change(w: Tensor) -> Tensor:
            return self._change(w, 0)

        def outer_change_squared(w: Tensor) -> Tensor:
            return self._change_transposed(self._change(w, 1))

        cross = largest(cross_squared, self.z, steps, seed) ** 0.5
        change = (0.0, 0.0)
        if norm(self.gradient):
            change = (
                largest(inner_change, self.z, steps, seed),
                largest(outer_change_squared, self.z, steps, seed) ** 0.5,
            )
        return Constants(float(ends.smallest), float(ends.smallest_error), float(ends.largest), cross, *change)

    def bound(self, c: Constants) -> Terms:
        """Infinite where the curvature may be zero or negative."""
        formula, residual, inner = norm(self.p - self.lagrangian[1]), norm(self.lagrangian[0]), norm(self.gradient)
        mu = c.mu - c.mu_error
        if mu <= c.zero(torch.finfo(self.z.dtype).eps):
            return Terms(formula, math.inf, math.inf)
        return Terms(formula, c.cross * residual / mu, (c.outer_change + c.cross * c.inner_change / mu) * inner / mu)

    def estimate(self) -> tuple[Terms, Tensor]:
        """The errors to first order in the inner error, and the corrected hypergradient (m,)."""
        d, z, x, direct = self.d, self.z, self.x, self.lagrangian[1]
        solved = d.solve(self.exact, z, x, -self.lagrangian[0])
        here = direct + d.cross(z, x, solved.value)  # Phi(z) = grad_x f + B (v - H^-1 r)
        floor = d.rounding(z, x)
        z = z - d.solve(self.exact, z, x, self.gradient).value
        there = d.lagrangian(z, x, d.solve(self.exact, z, x, -d.outer_gradients(z, x)[0]).value)[1]  # Phi after a step
        lower = norm(d.gradient(z, x)) <= max(norm(self.gradient), floor)
        usable = lower and solved.result != Result.non_finite and bool(there.isfinite().all())
        inner = norm(there - here) if usable else math.nan
        return Terms(norm(self.p - direct), norm(here - direct), inner), there if usable else here

    def _change(self, w: Tensor, part: int) -> Tensor:
        """grad^2_zz l w (part 0) or grad^2_xz l w (part 1)."""
        step = step_for(self.z, w, 1 / 3)
        return central(lambda a: self.d.lagrangian(a, self.x, self.v)[part], self.z, w, step)

    def _change_transposed(self, e: Tensor) -> Tensor:
        """(grad^2_xz l)' e."""
        step = step_for(self.x, e, 1 / 3)
        return central(lambda a: self.d.lagrangian(self.z, a, self.v)[0], self.x, e, step)


def largest(matvec: VectorMap, like: Tensor, steps: int, seed: torch.Generator) -> float:
    """The largest |eigenvalue| as Lanczos sees it, plus its error."""
    ends = extreme_eigenvalues(matvec, like, steps=steps, seed=seed)
    return max(float(ends.largest.abs() + ends.largest_error), float(ends.smallest.abs() + ends.smallest_error))
