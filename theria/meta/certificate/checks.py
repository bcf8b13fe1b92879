"""The checks of the derivatives themselves, and what a certificate finds wrong."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from theria.curvature.vectors import VectorMap, normal
from theria.meta.certificate.derivatives import Derivatives, central, norm, step_for
from theria.meta.certificate.point import Point
from theria.meta.certificate.report import Checks, Constants, Fault, Finding, Terms
from theria.meta.certificate.spot_check import SpotCheck


def check_derivatives(d: Derivatives, z: Tensor, x: Tensor, hessian: VectorMap, generator: torch.Generator) -> Checks:
    """`hessian` is the operator in use; differences of the inner loss's gradient are the truth."""
    u, w = (normal(d.inner, generator) for _ in range(2))
    e = normal(d.outer, generator)
    Hu, Hw = hessian(u), hessian(w)
    size = norm(u) * norm(Hw) + norm(w) * norm(Hu)
    symmetry = float((u @ Hw - w @ Hu).abs()) / (size or 1.0)
    hessian_error = _against_differences(lambda a: d.gradient(a, x), z, u, Hu)
    transposed = d.cross_transposed(z, x, e)
    pair = float((e @ d.cross(z, x, w) - transposed @ w).abs()) / (norm(transposed) * norm(w) or 1.0)
    return Checks(
        symmetry, hessian_error, max(pair, _against_differences(lambda a: d.gradient(z, a), x, e, transposed))
    )


def _against_differences(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, product: Tensor) -> float:
    """Relative error of a product against central differences (Richardson), less what two steps differ by."""
    step = step_for(at, direction, 0.2)
    coarse, fine = (central(function, at, direction, h) for h in (step, step / 2))
    truth = (4 * fine - coarse) / 3
    error = max(norm(product - truth) - norm(fine - coarse), 0.0)
    return error / (max(norm(truth), norm(product)) or 1.0)


def look(
    point: Point, constants: Constants, estimate: Terms, checks: Checks, spot: SpotCheck | None, tolerance: float
) -> tuple[Finding, ...]:
    """What is wrong, causes before consequences."""
    eps = torch.finfo(point.z.dtype).eps
    scale = _scale(point, estimate)
    found = []
    # Rounding of a product is near eps, of the extrapolated differences near eps^(4/5): room for large networks.
    if not checks.symmetry <= eps**0.5:
        found.append(Finding(Fault.asymmetric_hessian, checks.symmetry))
    if not checks.hessian <= eps**0.25:
        found.append(Finding(Fault.wrong_hessian, checks.hessian))
    if not checks.cross <= eps**0.25:
        found.append(Finding(Fault.wrong_cross_derivative, checks.cross))
    zero = constants.zero(eps)
    if constants.mu < -zero:  # a Rayleigh quotient: some eigenvalue is at most this
        found.append(Finding(Fault.negative_curvature, constants.mu))
    elif constants.mu - constants.mu_error <= zero:
        found.append(Finding(Fault.flat_curvature, constants.mu, f"its error is {constants.mu_error:.1e}"))
    if not estimate.formula <= tolerance * scale:
        found.append(Finding(Fault.wrong_formula, estimate.formula / scale, recognise(point)))
    if not estimate.solve <= tolerance * scale:
        found.append(Finding(Fault.linear_solve_not_converged, estimate.solve / scale))
    if not estimate.inner <= tolerance * scale:
        found.append(Finding(Fault.inner_not_converged, estimate.inner / scale))
    if spot is not None:
        found += _of_spot_check(spot, estimate, scale)
    return tuple(found)


def _scale(point: Point, estimate: Terms) -> float:
    """What errors are relative to: the hypergradient given, or what it should be where that is larger (given as 0)."""
    along_x, formula = point.d.outer_gradients(point.z, point.x)[1], point.lagrangian[1]
    rounding = 100 * torch.finfo(point.z.dtype).eps * max(norm(along_x), norm(formula - along_x))
    known = [term for term in estimate if math.isfinite(term)]
    return max(norm(point.p), norm(formula), *known, rounding, torch.finfo(torch.float64).tiny)


def _of_spot_check(spot: SpotCheck, estimate: Terms, scale: float) -> list[Finding]:
    if not spot.conclusive:
        return [Finding(Fault.inconclusive_spot_check, max(spot.uncertainty) / scale)]
    rows = zip(spot.differences, spot.scale, spot.uncertainty, strict=True)
    # The estimate is of first order: twice of it explains a difference.
    explained = all(d <= spot.tolerance * s + u + 2 * estimate.total for d, s, u in rows)
    return [] if explained else [Finding(Fault.spot_check_failed, max(spot.differences) / scale)]


def recognise(point: Point) -> str:
    """Well-known ways to get a hypergradient wrong."""
    along_z, along_x = point.d.outer_gradients(point.z, point.x)
    implicit = along_x - point.lagrangian[1]  # -B v
    identity = point.d.cross(point.z, point.x, along_z)
    given = along_x - point.p
    near = 1e-2 * norm(implicit)
    cosine = float(given @ identity) / (norm(given) * norm(identity) or 1.0)
    if norm(given) <= near:
        return "it is grad_x f alone: the implicit term is missing"
    if norm(given + implicit) <= near:
        return "the implicit term has the wrong sign"
    if norm(point.p + point.lagrangian[1]) <= near:
        return "it has the wrong sign"
    if cosine > 1 - 1e-4:
        return "a multiple of the identity stands in for the inverse Hessian"
    return "give the adjoint_vector that it was made with, to tell the formula from the linear solve"
