"""A gradient against central differences of its function, along a few directions."""

from collections.abc import Callable
from dataclasses import dataclass

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
        measured: the central difference, extrapolated from steps h and h/2.
        uncertainty: of `measured`: by how much the two steps differ, and the rounding of the objective.
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
                "the differences of the objective are too noisy to say anything: use float64, solve the inner problem "
                "more exactly, fix every random draw, or give a larger step"
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

    The objective runs everything anew: the inner solution, or all inner steps of an unrolled learner. Four evaluations
    a direction.

    Args:
        objective: outer -> scalar, the same at every call with the same argument: without random draws of its own.
        outer: a pytree of tensors of one dtype on one device.
        hypergradient: a pytree like `outer`; default `torch.func.grad(objective)(outer)`.
        directions: at least 1.
        tolerance: the relative difference that passes.
        step: of the differences, along a direction of norm 1; default eps^(1/5) (1 + |outer|).
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
    h = torch.finfo(x.dtype).eps ** 0.2 * (1 + norm(x)) if step is None else step
    lines = [gradient if size > 0 else normal(layout, generator)]
    lines += [normal(layout, generator) for _ in range(directions - 1)]
    lines = [d / norm(d) for d in lines]
    found = [_along(objective, layout, x, d, h) for d in lines]
    predicted = tuple(float(gradient @ d) for d in lines)
    measured, uncertainty = (tuple(f[i] for f in found) for i in (0, 1))
    least = max(size / layout.size**0.5, torch.finfo(x.dtype).tiny)
    return SpotCheck(predicted, measured, uncertainty, tuple(max(abs(m), least) for m in measured), tolerance)


def _along(
    objective: Callable[[Tree], Tensor], layout: Layout, x: Tensor, d: Tensor, step: float
) -> tuple[float, float]:
    """The derivative along d, by Richardson's extrapolation of two central differences, and its uncertainty."""
    values = [[float(objective(layout.unravel(x + s * h * d)).detach()) for s in (1, -1)] for h in (step, step / 2)]
    coarse, fine = ((a - b) / (2 * h) for (a, b), h in zip(values, (step, step / 2), strict=True))
    rounding = 8 * torch.finfo(x.dtype).eps * max(abs(v) for pair in values for v in pair) / step
    return (4 * fine - coarse) / 3, abs(fine - coarse) + rounding
