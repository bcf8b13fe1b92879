"""How far a hypergradient is from the derivative of its bilevel problem, and why.

The problem: h(x) = f(z*(x), x) with grad_z g(z*(x), x) = 0. With H = grad^2_zz g, B = grad^2_xz g let

    Phi(z) = grad_x f - B H^-1 grad_z f   at (z, x),        so that grad h(x) = Phi(z*).

Given are z near z*, v near -H^-1 grad_z f (the sign of `theria.meta.bilevel`), and a hypergradient p, meant to be
grad_x f + B v. With r = H v + grad_z f,

    p - Phi(z*) = [p - (grad_x f + B v)]  +  B H^-1 r  +  [Phi(z) - Phi(z*)]
                        formula               solve             inner

and, where H >= mu I on the way from z to z*: |z - z*| <= |grad_z g| / mu,

    |solve| <= |B| |r| / mu,        |inner| <= (|grad^2_xz l| + |B| |grad^2_zz l| / mu) |grad_z g| / mu,

since DPhi[d] = grad^2_xz l d - B H^-1 grad^2_zz l d with l(z, x) = f + <grad_z g, v>, v held: its two norms are what is
left of the Lipschitz constants of grad f, H and B in Pedregosa 2016 (arXiv 1602.02355, theorem 2) and Grazzi,
Franceschi, Pontil and Salzo 2020 (arXiv 2006.16218, theorem 3.1), at one point and for one v.

mu is the smallest Ritz value of H less its error, the norms are the largest Ritz values of B'B etc. plus theirs, all
by Lanczos at z: estimates of constants that the theorem wants on the whole way. For a quadratic g and f they are
constant, and with as many steps as dimensions the bound is rigorous. Derivatives of l's gradient are central
differences, so that no third derivative is needed, which fused kernels do not have.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from theria.curvature.lanczos import extreme_eigenvalues
from theria.curvature.vectors import Layout, LinearMap, Tree, check_count, generator_of
from theria.meta.certificate.checks import check_derivatives, look
from theria.meta.certificate.derivatives import Derivatives, Loss, norm
from theria.meta.certificate.point import Point
from theria.meta.certificate.report import Certificate, Fault
from theria.meta.certificate.spot_check import SpotCheck, spot_check
from theria.meta.solvers import CG, MINRES, LinearSolver
from theria.meta.solvers.base import check_solver


def certify(
    inner_loss: Loss,
    outer_loss: Loss,
    inner: Tree,
    outer: Tree,
    *,
    hypergradient: Tree | None = None,
    adjoint_vector: Tree | None = None,
    solver: LinearSolver | None = None,
    hessian: LinearMap | None = None,
    solve: Callable[[Tree], Tree] | None = None,
    tolerance: float = 1e-3,
    directions: int = 2,
    lanczos_steps: int = 64,
    seed: int | torch.Generator = 0,
) -> Certificate:
    """Bounds and estimates the error of a hypergradient, names what dominates it, and checks the derivatives.

    It costs some hundreds of gradients and reads numbers on the host: a diagnosis, not a part of a training step. For
    a hypergradient that is not meant to be implicit (an unrolled learner's) see `spot_check`; one can be given here as
    well, to learn how far it is from that of the problem solved to the end.

    Args:
        inner_loss, outer_loss: g and f, (inner, outer) -> scalar; pure.
        inner: the inner solution z, a pytree of tensors of one dtype on one device.
        outer: x, likewise.
        hypergradient: what to certify, a pytree like `outer`; default grad_x f + B v.
        adjoint_vector: v with H v = -grad_z f, a pytree like `inner`, that the hypergradient was made with, such as
            the `linear.value` of `AID`; default by `solver`.
        solver: makes v where none is given; default `CG()`.
        hessian: the operator w -> H w that v was or is made with, where it is not the inner loss's own product; it is
            checked as well.
        solve: outer -> inner, solves the inner problem anew for the spot check; default Newton's method from `inner`.
        tolerance: the relative error of the hypergradient that is accepted.
        directions: of the spot check, see `spot_check`; 0 leaves it out.
        lanczos_steps: products with H for mu and L; the norms take a quarter of it.
        seed: of every random direction; a number, or a generator, which is advanced.

    Raises:
        ValueError: arguments that do not fit.
    """
    check_count("lanczos_steps", lanczos_steps, 1)
    check_count("directions", directions, 0)
    check_solver("solver", solver := CG() if solver is None else solver)
    generator = generator_of(seed)
    Z, X = Layout.of(inner, "inner"), Layout.of(outer, "outer")
    z, x = Z.ravel(inner, "inner").detach(), X.ravel(outer, "outer").detach()
    d = Derivatives(inner_loss, outer_loss, Z, X)
    with torch.no_grad():
        used = (lambda w: d.hessian(z, x, w)) if hessian is None else Z.on_vectors(hessian)
        if adjoint_vector is None:
            v = solver.solve(used, -d.outer_gradients(z, x)[0], throw=False).value
        else:
            v = Z.ravel(adjoint_vector, "adjoint_vector").detach()
        formula = d.lagrangian(z, x, v)[1]
        p = formula if hypergradient is None else X.ravel(hypergradient, "hypergradient").detach()
        point = Point(d, z, x, v, p)
        _check_finite(point)
        ends = extreme_eigenvalues(point.hessian, z, steps=lanczos_steps, seed=generator)
        constants = point.constants(ends, max(lanczos_steps // 4, 1), generator)
        estimate, corrected = point.estimate()
        checks = check_derivatives(d, z, x, used, generator)
        spot = _spot_check(point, solve, directions, tolerance, generator) if directions else None
        findings = look(point, constants, estimate, checks, spot, tolerance)
        negative = any(finding.fault is Fault.negative_curvature for finding in findings)
        return Certificate(
            hypergradient=X.unravel(p),
            size=norm(p),
            inner_residual=norm(point.gradient),
            solve_residual=norm(point.lagrangian[0]),
            constants=constants,
            bound=point.bound(constants),
            estimate=estimate,
            corrected=X.unravel(corrected),
            checks=checks,
            negative_curvature_direction=Z.unravel(ends.smallest_vector) if negative else None,
            spot_check=spot,
            findings=findings,
            tolerance=tolerance,
        )


def _check_finite(point: Point) -> None:
    residual, formula = point.lagrangian
    named = {
        "the hypergradient": point.p,
        "the adjoint vector": point.v,
        "grad_z of the inner loss": point.gradient,
        "H v + grad_z f": residual,
        "grad_x f + B v": formula,
    }
    for name, value in named.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is NaN or infinite: look for it in the inner solution and the two losses.")


def _spot_check(
    point: Point, solve: Callable[[Tree], Tree] | None, directions: int, tolerance: float, generator: torch.Generator
) -> SpotCheck:
    """Of x -> f(z*(x), x), z* solved anew."""
    Z, X = point.d.inner, point.d.outer
    inexact = MINRES(rtol=1e-4, check_every=1)  # a Newton step then gains four digits, in a third of the products

    def objective(outer: Tree) -> Tensor:
        x = X.ravel(outer, "outer")
        z = point.d.resolve(inexact, point.z, x) if solve is None else Z.ravel(solve(outer), "solve(outer)")
        return point.d.f(z, x)

    hypergradient = X.unravel(point.p)
    return spot_check(
        objective, X.unravel(point.x), hypergradient, directions=directions, tolerance=tolerance, seed=generator
    )
