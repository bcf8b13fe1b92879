"""A gradient against central differences of its function, along a few directions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.func import grad

from theria.curvature.vectors import Layout, Tree, check_count, generator_of, normal
from theria.meta.certificate.derivatives import norm


@dataclass(frozen=True)
class SpotCheck:
    """Directional derivatives: the first along the gradient itself, the others along random unit vectors.

    Attributes:
        predicted: <gradient, d> for each direction d.
        measured: the central difference, extrapolated from two steps.
        uncertainty: of `measured`: by how much differences with several steps and those of the two sides disagree, and
            the rounding of the objective.
        scale: of a directional derivative: max(|measured|, |gradient| / sqrt(entries)).
        tolerance: the relative difference that passes.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    uncertainty: tuple[float, ...]
    scale: tuple[float, ...]
    tolerance: float

    @property
    def differences(self) -> tuple[float, ...]:
        return tuple(abs(p - m) for p, m in zip(self.predicted, self.measured, strict=True))

    @property
    def ok(self) -> bool:
        """Whether all directions agree within tolerance and uncertainty; never with NaN."""
        rows = zip(self.differences, self.scale, self.uncertainty, strict=True)
        return all(d <= self.tolerance * s + u for d, s, u in rows)

    @property
    def conclusive(self) -> bool:
        """Whether the differences are exact enough to say anything: to a tenth."""
        return all(u <= 0.1 * s for u, s in zip(self.uncertainty, self.scale, strict=True))

    @property
    def advice(self) -> str:
        """What was seen and what to do, in one sentence."""
        if not self.conclusive:
            return (
                "differences of the objective with several steps disagree, and say nothing: use float64, solve the "
                "inner problem more exactly, fix every random draw, or give a step (larger against noise, smaller "
                "against kinks such as those of ReLU)"
            )
        if self.ok:
            return "the gradient agrees with differences of the objective"
        return (
            "the gradient is not that of the objective: a term is dropped (FirstOrder and Truncated do so by choice), "
            "has the wrong sign, or a derivative of a loss is wrong; compare with Unrolled, or look at certify(...)"
        )

    def __str__(self) -> str:
        rows = zip(self.predicted, self.measured, self.uncertainty, strict=True)
        return "\n".join(f"<gradient, d> = {p:.6e}, difference = {m:.6e} +- {u:.1e}" for p, m, u in rows)


def spot_check(
    objective: Callable[[Tree], Tensor],
    outer: Tree,
    hypergradient: Tree | None = None,
    *,
    directions: int = 3,
    tolerance: float = 1e-3,
    step: float | None = None,
    seed: int | torch.Generator = 0,
) -> SpotCheck:
    """Compare a hypergradient with central differences of its objective, whatever way it was computed.

    The objective runs everything anew: the inner solution, or all inner steps of an unrolled learner. Five evaluations
    a direction where gradient and differences agree at once; up to fifteen, with ever smaller steps, where they do not.
    A function with kinks (ReLU, max-pooling) is judged by steps that meet none; where there is no such step it is
    inconclusive.

    Args:
        objective: outer -> scalar, the same at every call with the same argument: without random draws of its own.
        outer: a pytree of tensors of one dtype on one device.
        hypergradient: a pytree like `outer`; default `torch.func.grad(objective)(outer)`.
        directions: at least 1.
        tolerance: the relative difference that passes.
        step: of the differences, along a direction of norm 1, which takes it and its half alone; default from
            eps^(1/5) (1 + |outer|) down to eps^(1/2) (1 + |outer|).
        seed: of the random directions; a number, or a generator, which is advanced.

    Raises:
        ValueError: arguments that do not fit.
    """
    check_count("directions", directions, 1)
    layout, generator = Layout.of(outer, "outer"), generator_of(seed)
    x = layout.ravel(outer, "outer").detach()
    given = grad(objective)(layout.unravel(x)) if hypergradient is None else hypergradient
    gradient = layout.ravel(given, "hypergradient").detach()
    size = norm(gradient)
    lines = [gradient if size > 0 else normal(layout, generator)]
    lines += [normal(layout, generator) for _ in range(directions - 1)]
    lines = [d / norm(d) for d in lines]
    predicted = tuple(float(gradient @ d) for d in lines)
    least = max(size / layout.size**0.5, torch.finfo(x.dtype).tiny)
    found = []
    for d, p in zip(lines, predicted, strict=True):

        def value_at(t: float, d: Tensor = d) -> float:
            return float(objective(layout.unravel(x + t * d)).detach())

        def agrees(slope: float, u: float, p: float = p) -> bool:
            return max(abs(p - slope), u) <= tolerance * max(abs(slope), least)

        found.append(_along(value_at, _steps(x, step), torch.finfo(x.dtype).eps, agrees))
    measured, uncertainty = (tuple(f[i] for f in found) for i in (0, 1))
    return SpotCheck(predicted, measured, uncertainty, tuple(max(abs(m), least) for m in measured), tolerance)


def _steps(x: Tensor, step: float | None) -> list[float]:
    """From the largest to the smallest: eps^(1/5) balances truncation and rounding after one extrapolation, eps^(1/2)
    is where rounding alone is left."""
    if step is not None:
        return [step, step / 2]
    eps, size = torch.finfo(x.dtype).eps, 1 + norm(x)
    return [size * eps ** (0.2 + 0.05 * i) for i in range(7)]


@dataclass(frozen=True)
class _Difference:
    """What f(x + h d), f(x), f(x - h d) say of the slope along d.

    Attributes:
        slope: the central difference.
        jump: by how much the slopes of the two sides differ: h f'' where f is smooth, constant in h at a kink.
        rounding: of the slope.
    """

    h: float
    slope: float
    jump: float
    rounding: float


def _estimate(window: Sequence[_Difference]) -> tuple[float, float]:
    """The slope by Richardson's extrapolation of the two smallest steps, and its uncertainty.

    A smooth f has central differences that agree but for h^2, and no jump is left as h -> 0; kinks between the steps
    make the former differ, one that is nearer to x than all of them leaves the latter.
    """
    coarse, fine = window[-2:]
    slope, slopes = _limit(coarse, fine, coarse.slope, fine.slope, order=2), [d.slope for d in window]
    jump = max(abs(_limit(a, b, a.jump, b.jump, order=1)) for a, b in pairwise(window))
    return slope, max(slopes) - min(slopes) + jump + fine.rounding


def _limit(coarse: _Difference, fine: _Difference, at_coarse: float, at_fine: float, order: int) -> float:
    """The value at h = 0 of a + b h^order."""
    ratio = (coarse.h / fine.h) ** order
    return (ratio * at_fine - at_coarse) / (ratio - 1)


def _along(
    value_at: Callable[[float], float], steps: Sequence[float], eps: float, agrees: Callable[[float, float], bool]
) -> tuple[float, float]:
    """The slope of t -> value_at(t) at 0, and its uncertainty.

    Args:
        agrees: (slope, uncertainty) -> whether the two largest steps say enough. Smaller ones are taken before a
            gradient is said to be wrong: the three neighbours that agree best then count, and what other neighbours
            say, beyond their own uncertainty, is uncertainty of these.
    """
    centre, found = value_at(0.0), []
    for h in steps:
        ahead, behind = value_at(h), value_at(-h)
        rounding = 8 * eps * max(abs(ahead), abs(behind)) / h
        found.append(_Difference(h, (ahead - behind) / (2 * h), (ahead - 2 * centre + behind) / h, rounding))
        if len(found) == 2 and (len(steps) == 2 or agrees(*_estimate(found))):
            return _estimate(found)
    estimates = [_estimate(found[i : i + 3]) for i in range(len(found) - 2)]
    finite = [(slope, u) for slope, u in estimates if math.isfinite(slope) and math.isfinite(u)]
    if not finite:
        return math.nan, math.nan
    best, least = min(finite, key=lambda e: e[1])
    return best, least + max(max(abs(slope - best) - 3 * u, 0.0) for slope, u in finite)
