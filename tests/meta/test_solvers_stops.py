"""When a solve stops: the tolerance as it is written, and a breakdown that is one. In float64."""

import pytest
import torch

from theria.meta.solvers import CG, GMRES, MINRES, BiCGSTAB, LinearSolver, Neumann, NormalCG, Result


@pytest.mark.parametrize("kind", [CG, GMRES, MINRES, BiCGSTAB, NormalCG, Neumann])
def test_the_larger_tolerance_counts_and_not_the_sum(kind: type[LinearSolver]) -> None:
    """Half of what is allowed is aimed at: a residual of 0.08, with 0.1 allowed by each of the two, is not enough."""
    b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    diagonal = torch.tensor([1.0, 0.5], dtype=torch.float64)
    solution = kind(rtol=0.1, atol=0.1).solve(lambda v: diagonal * v, b, 0.92 * b)  # type: ignore[call-arg]
    assert solution.iterations > 0
    assert solution.residual <= 0.05


def test_bicgstab_reports_that_rho_vanishes() -> None:
    """r_0 = e_1 and A lower triangular: r_1 = (0, -0.2, 0.4), orthogonal to r_0, where the recursion cannot go on."""
    A = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    b = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    solution = BiCGSTAB(check_every=1).solve(lambda v: A @ v, b, throw=False)
    assert solution.result == Result.breakdown
    assert solution.iterations == 1
    torch.testing.assert_close(GMRES(rtol=1e-12).solve(lambda v: A @ v, b).value, torch.linalg.solve(A, b))
