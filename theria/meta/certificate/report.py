"""What a certificate says: numbers, what they mean, what to do."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from theria.curvature.vectors import Tree
from theria.meta.certificate.spot_check import SpotCheck


class Fault(Enum):
    """What can be wrong with a hypergradient; the value is the advice."""

    asymmetric_hessian = (
        "<u, Hw> differs from <w, Hu>: the operator is no Hessian; a custom product or backward is transposed or wrong"
    )
    wrong_hessian = (
        "the Hessian product differs from differences of the inner gradient: a second-order term is dropped (detach, "
        "a backward without a derivative of its own, Gauss-Newton in place of the Hessian) or has the wrong sign"
    )
    wrong_cross_derivative = (
        "the product with the cross derivative differs from differences of the inner gradient in the outer "
        "parameters: a second-order term of the inner loss is dropped there"
    )
    negative_curvature = (
        "the inner Hessian has a negative eigenvalue: the inner solution is a saddle or not yet near a minimum; move "
        "along negative_curvature_direction and optimise further, or add a proximal or weight-decay term"
    )
    flat_curvature = (
        "the smallest eigenvalue of the inner Hessian is zero to within its error, so that no bound holds: add damping "
        "or regularisation to the inner loss, or raise lanczos_steps"
    )
    wrong_formula = "the hypergradient is not grad_x f + B v for this inner solution and adjoint vector"
    linear_solve_not_converged = (
        "the adjoint system H v = -grad_z f is not solved well enough: lower rtol, raise max_iterations, give a "
        "preconditioner, or use another solver"
    )
    inner_not_converged = (
        "the inner problem is not solved well enough: more inner steps, or a second-order method near the end"
    )
    spot_check_failed = (
        "differences of the outer objective disagree with the hypergradient by more than its estimated error: a "
        "derivative of a loss is wrong, or the solver of the inner problem finds another solution"
    )
    inconclusive_spot_check = (
        "differences of the outer objective are too noisy to say anything: use float64, or a more exact solve="
    )


class Finding(NamedTuple):
    """A fault, how large it is (relative, an eigenvalue for curvature), and what else is known of it."""

    fault: Fault
    size: float
    detail: str = ""

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.fault.name} [{self.size:.1e}]: {self.fault.value}{detail}"


class Terms(NamedTuple):
    """The three sources of error, in units of the hypergradient.

    Attributes:
        formula: the given hypergradient against grad_x f + B v at the given z and v.
        solve: from v against -H^-1 grad_z f at the given z.
        inner: from z against the solution z*.
    """

    formula: float
    solve: float
    inner: float

    @property
    def total(self) -> float:
        return sum(self)


class Constants(NamedTuple):
    """Of the problem at the given point, by Lanczos; see the module `certify` for where they enter.

    Attributes:
        mu: the smallest Ritz value of H; no eigenvalue is known to be below it, one is within `mu_error` of it.
        mu_error: see `mu`.
        L: the largest Ritz value of H.
        cross: |B|, B the cross derivative of the inner loss.
        inner_change: |grad^2_zz l|.
        outer_change: |grad^2_xz l|.
    """

    mu: float
    mu_error: float
    L: float
    cross: float
    inner_change: float
    outer_change: float

    def zero(self, eps: float) -> float:
        """What rounding may make of an eigenvalue of 0."""
        return eps**0.75 * max(abs(self.mu), abs(self.L))


class Checks(NamedTuple):
    """Relative errors of the derivatives themselves, each along random directions.

    Attributes:
        symmetry: |<u, Hw> - <w, Hu>| / (|u||Hw| + |w||Hu|).
        hessian: H u against differences of grad_z g along u.
        cross: B and B' against differences of grad_z g in the outer parameters.
    """

    symmetry: float
    hessian: float
    cross: float


@dataclass(frozen=True)
class Certificate:
    """What is known of the error of a hypergradient.

    Attributes:
        hypergradient: what is certified, a pytree like `outer`.
        size: its norm.
        inner_residual: |grad_z g|.
        solve_residual: |H v + grad_z f|.
        constants: of the bound.
        bound: of the error of each source, from the residuals and the constants.
        estimate: of the same errors, to first order; NaN where a Newton step does not lower the inner gradient.
        corrected: the hypergradient after one Newton step on the inner problem and a new linear solve, a pytree. Its
            error is of second order in that of the inner solution.
        checks: of the derivatives.
        negative_curvature_direction: a pytree like `inner` of norm 1 along which the curvature is `mu` < 0, or None.
        spot_check: against differences of the outer objective, or None where none was asked for.
        findings: what is wrong.
        tolerance: the relative error that is accepted.
    """

    hypergradient: Tree = field(repr=False)
    size: float
    inner_residual: float
    solve_residual: float
    constants: Constants
    bound: Terms
    estimate: Terms
    corrected: Tree = field(repr=False)
    checks: Checks
    negative_curvature_direction: Tree = field(repr=False)
    spot_check: SpotCheck | None
    findings: tuple[Finding, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        """Nothing is found wrong, and the estimated error is within the tolerance."""
        return not self.findings

    @property
    def faults(self) -> frozenset[Fault]:
        return frozenset(finding.fault for finding in self.findings)

    @property
    def dominant(self) -> str:
        """The source of most of the error: "formula", "solve" or "inner"; by the estimate, or else by the bound."""
        known = self.bound if any(map(math.isnan, self.estimate)) else self.estimate
        return Terms._fields[known.index(max(known))]

    @property
    def advice(self) -> str:
        """What to do: a line for each finding."""
        return "\n".join(map(str, self.findings)) or "nothing to do: the error is within the tolerance"

    def __str__(self) -> str:
        verdict = "certified" if self.ok else "NOT certified"
        constants, checks = self.constants, self.checks
        rows = zip(Terms._fields, self.estimate, self.bound, strict=True)
        lines = [
            f"hypergradient of norm {self.size:.6e}, {verdict} to {self.tolerance:.0e}",
            f"error: estimated {self.estimate.total:.2e}, bound {self.bound.total:.2e}, most of it: {self.dominant}",
            *(f"  {name}: estimated {estimate:.2e}, bound {bound:.2e}" for name, estimate, bound in rows),
            f"|grad_z g| = {self.inner_residual:.2e}, |H v + grad_z f| = {self.solve_residual:.2e}",
            f"curvature {constants.mu:.3e} +- {constants.mu_error:.0e} to {constants.L:.3e}, |B| {constants.cross:.2e}",
            f"symmetry {checks.symmetry:.0e}, Hessian {checks.hessian:.0e}, cross derivative {checks.cross:.0e}",
        ]
        return "\n".join([*lines, *([str(self.spot_check)] if self.spot_check else []), self.advice])
