"""The density of a spectrum and traces of matrix functions by stochastic Lanczos quadrature.

For a unit vector v the weights that A's eigenvalues have in v are a measure; Gauss' quadrature for it has the
eigenvalues of Lanczos' T as nodes and the squared first components of its eigenvectors as weights (Golub and Welsch,
Math. Comp. 23 (1969) 221), exact for polynomials of degree 2k - 1. With random ±1 vectors z, E[z' f(A) z] = tr f(A)
(Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from theria.curvature.lanczos import tridiagonalise
from theria.curvature.trace import Estimate, mean_of
from theria.curvature.vectors import Layout, LinearMap, Tree, check_count, chunks, generator_of, many, rademacher


@dataclass(frozen=True)
class SpectralDensity:
    """One quadrature rule for each probe.

    Attributes:
        nodes: (P, k), places on the axis of eigenvalues.
        weights: (P, k), non-negative, each row adds up to 1.
        dimension: N, the number of eigenvalues.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """tr f(A), with f applied to the nodes elementwise, and its standard error over the probes."""
        return mean_of(self.dimension * (self.weights * function(self.nodes)).sum(-1))

    def density(self, grid: Tensor, width: float) -> Tensor:
        """(G,) -> (G,): the density smoothed by a normal distribution of standard deviation `width`; integral 1."""
        if not width > 0:
            raise ValueError(f"width={width}: give a positive number, such as a hundredth of the spectrum's.")
        z = (grid[:, None, None] - self.nodes) / width
        bell = torch.exp(-0.5 * z.square()) / (width * (2 * torch.pi) ** 0.5)
        return (bell * self.weights).sum(-1).mean(-1)

    def cumulative(self, grid: Tensor) -> Tensor:
        """(G,) -> (G,): the share of the eigenvalues that is at most each entry of `grid`."""
        return ((self.nodes <= grid[:, None, None]) * self.weights).sum(-1).mean(-1)


def spectral_density(
    matvec: LinearMap,
    like: Tree,
    *,
    steps: int = 64,
    probes: int = 8,
    seed: int | torch.Generator = 0,
    chunk_size: int | None = None,
    reorthogonalise: bool = True,
) -> SpectralDensity:
    """The density of the eigenvalues of a symmetric operator.

    Args:
        matvec: v -> A v on pytrees like `like`, symmetric (not checked). Runs under `torch.func.vmap`, unless
            `chunk_size` is 1.
        like: a pytree of tensors of one dtype on one device; its values are not used.
        steps: products with A for each probe; at most N.
        probes: random vectors; at least 2, for a standard error.
        seed: a number, or a generator, which is advanced.
        chunk_size: how many probes run at once (bounds memory); all by default. The result does not depend on it.
        reorthogonalise: against all earlier vectors, which keeps `steps` vectors for each probe that runs. Without it
            copies of converged eigenvalues share the weight of the one, which hardly changes the density.

    Raises:
        ValueError: arguments that do not fit; a product that is NaN or infinite.
    """
    check_count("steps", steps, 1)
    check_count("probes", probes, 2)
    layout, generator = Layout.of(like, "like"), generator_of(seed)
    apply = layout.on_vectors(matvec)
    nodes, weights = [], []
    with torch.no_grad():
        for count in chunks(probes, chunk_size):
            start = rademacher(layout, count, generator)
            found = tridiagonalise(lambda v: many(apply, v, chunk_size), start, steps, reorthogonalise)
            theta, s = torch.linalg.eigh(found.matrix())
            nodes.append(theta)
            weights.append(s[:, 0].square())
    return SpectralDensity(torch.cat(nodes), torch.cat(weights), layout.size)
