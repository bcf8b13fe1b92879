"""What the tests of the implicit functions share: seeded numbers, and maps with a known radius."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1e-10  # float64, solves to 1e-12 of systems with condition numbers below 1e2
N = 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def zeros(n: int = N) -> Tensor:
    return torch.zeros(n, dtype=torch.float64)


def close(actual, expected, tol=EXACT):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def contraction(radius: float, n: int = N, seed: int = 0) -> Tensor:
    """A matrix with eigenvalues in [-radius, radius], the largest met, and far from symmetric."""
    basis = torch.eye(n, dtype=torch.float64) + 0.3 * randn(n, n, seed=seed)
    return basis @ torch.diag(torch.linspace(-0.5, 1, n, dtype=torch.float64) * radius) @ torch.linalg.inv(basis)
