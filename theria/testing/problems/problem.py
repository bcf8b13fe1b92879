"""A bilevel problem whose answer is known: min over x of h(x) = f(z*(x), x) with z*(x) = argmin over z of g(z, x).

Names of all problems: z inner, x outer, g the inner loss, f the outer loss, H the Hessian of g in z,
v = -H^-1 df/dz. Then dh/dx = df/dx + (d2g / dx dz) v.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
SampleLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
Exact = Callable[[Tensor], Tensor]
Device = torch.device | str


@dataclass(frozen=True)
class Samples:
    """The losses as means over samples: `inner(z, x, i)` of one sample (i a scalar) or the mean of several (i 1-d)."""

    inner: SampleLoss
    outer: SampleLoss
    n_inner: int
    n_outer: int


@dataclass(frozen=True)
class Problem:
    """Losses, and the exact answers to them. Every variable is one tensor.

    The exact answers are computed in float64 from the data as rounded to the dtype of the problem, and returned in that
    dtype: they are the truth for the very numbers that the losses read.

    Attributes:
        name: of the function that makes it.
        inner_loss: (z, x) -> scalar, strongly convex in z.
        outer_loss: (z, x) -> scalar.
        inner0: where an inner solver begins.
        outer0: the outer point at which to compare.
        inner_solution: x -> z*(x); where `steps` is given, the z after that many steps instead.
        hypergradient: x -> dh/dx, exact; where `steps` is given, of f after that many steps.
        least, largest: the extreme eigenvalues of H at `outer0`, or bounds of them.
        steps: None when the inner problem is to be solved; else the problem is that of exactly so many steps of
            gradient descent of rate `rate` from `start(x)`, and its exact answers are those.
        start: x -> z_0, a differentiable function of x (MAML: z_0 = x); None: the constant `inner0`.
        chosen_rate: None for the best constant rate of gradient descent.
        outer_solution: argmin of h, where it is known.
        samples: the same losses as finite sums, where they are.
    """

    name: str
    inner_loss: Loss
    outer_loss: Loss
    inner0: Tensor
    outer0: Tensor
    inner_solution: Exact
    hypergradient: Exact
    least: float
    largest: float
    steps: int | None = None
    start: Exact | None = None
    chosen_rate: float | None = None
    outer_solution: Tensor | None = None
    samples: Samples | None = None

    @property
    def rate(self) -> float:
        """The rate of inner gradient descent: 2 / (least + largest) contracts fastest."""
        return 2 / (self.least + self.largest) if self.chosen_rate is None else self.chosen_rate

    @property
    def contraction(self) -> float:
        """The factor by which a step of gradient descent of rate `rate` shrinks the distance to z*, at least."""
        return max(abs(1 - self.rate * self.least), abs(1 - self.rate * self.largest))

    def steps_to(self, tolerance: float) -> int:
        """Steps T with T c^T <= tolerance, c the contraction: what is left of the first error of z*, and of a gradient.

        Unrolled, the error of the gradient falls as T c^T; that of z as c^T.
        """
        if self.steps is not None:
            return self.steps
        rate = -math.log(max(self.contraction, 0.1))
        steps = -math.log(tolerance) / rate
        return math.ceil(steps + math.log(steps) / rate)

    def initial(self, outer: Tensor) -> Tensor:
        """z_0, a differentiable function of `outer` where the problem says so."""
        return self.inner0 if self.start is None else self.start(outer)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(source: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def spd(source: torch.Generator, n: int, least: float, largest: float) -> Tensor:
    """(n, n), symmetric positive definite, eigenvalues evenly from `least` to `largest`, random eigenvectors."""
    basis = torch.linalg.qr(normal(source, n, n))[0]
    return basis * torch.linspace(least, largest, n, dtype=torch.float64) @ basis.T


def rounded(tensors: list[Tensor], dtype: torch.dtype, device: Device) -> tuple[list[Tensor], list[Tensor]]:
    """The data as the losses read them, and the same numbers in float64 for the exact answers."""
    working = [t.to(device=device, dtype=dtype) for t in tensors]
    return working, [t.double() for t in working]


def in_float64(exact: Exact) -> Exact:
    """`exact` computed in float64 and returned in the dtype of its argument, as a constant."""

    def answer(outer: Tensor) -> Tensor:
        return exact(outer.detach().double()).to(outer.dtype)

    return answer
