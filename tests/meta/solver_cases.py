"""What the tests of the linear solvers share: matrices with known spectra, and every solver at a tight tolerance.

THERIA_TEST_DEVICE=cuda runs them all on a GPU. The default device stays the CPU, so that a tensor made without its
inputs' device is found there; `test_solvers_matrix.py` finds it without a GPU.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from theria.meta.solvers import CG, GMRES, MINRES, BiCGSTAB, Dense, Neumann, NormalCG, Nystrom

DEVICE = torch.device(os.environ.get("THERIA_TEST_DEVICE", "cpu"))
F64: dict[str, Any] = {"dtype": torch.float64, "device": DEVICE}
EXACT = 1e-10  # float64 with condition numbers of at most 1e3
N = 12
TIGHT: dict[str, Any] = {"rtol": 1e-13, "check_every": 1}  # times a condition of at most 1e2: errors below EXACT
SPECTRUM = torch.linspace(0.6, 3.0, N, **F64)  # within the bounds of Neumann(0.5) and of Nystrom's 0.5

SPD = {"CG": CG(**TIGHT), "MINRES": MINRES(**TIGHT)}
GENERAL = {
    "GMRES": GMRES(**TIGHT),
    "BiCGSTAB": BiCGSTAB(**TIGHT),
    "NormalCG": NormalCG(**TIGHT),
    "Dense": Dense(rtol=1e-13),
}
ANY = {**SPD, **GENERAL}
ALL = {**ANY, "Neumann": Neumann(**TIGHT, scale=0.5), "Nystrom": Nystrom(N, damping=0.5, rtol=1e-12)}


def parametrize(solvers: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("solver", solvers.values(), ids=list(solvers))


def randn(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def symmetric(eigenvalues: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with these eigenvalues and random eigenvectors, and the eigenvectors."""
    eigenvalues = torch.as_tensor(eigenvalues, **F64)
    Q = torch.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    return (Q * eigenvalues) @ Q.mT, Q


def times(A: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: A @ v


def close(actual: Any, expected: Any, tol: float = EXACT) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)
