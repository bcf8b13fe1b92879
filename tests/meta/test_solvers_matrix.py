"""Every solver on every kind of system, what each does when it cannot go on, and where its tensors are made."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.meta.solver_cases import ALL, F64, GENERAL, TIGHT, N, close, parametrize, randn, symmetric, times
from theria.meta.solvers import CG, GMRES, MINRES, BiCGSTAB, Dense, Neumann, NormalCG, Nystrom, Result

# --- kind of system × solver ----------------------------------------------------------------------------------------

SOLVERS: dict[str, Any] = {
    "CG": CG(rtol=1e-9, check_every=1),
    "MINRES": MINRES(rtol=1e-9, check_every=1),
    "GMRES": GMRES(rtol=1e-9, check_every=1, restart=60),
    "BiCGSTAB": BiCGSTAB(rtol=1e-9, check_every=1),
    "NormalCG": NormalCG(rtol=1e-9, check_every=1),
    "Neumann": Neumann(rtol=1e-9, check_every=1, scale=0.6, max_iterations=400),
    "Nystrom": Nystrom(20, damping=0.5, rtol=1e-9),
    "Dense": Dense(rtol=1e-9),
}
SPECTRA: dict[str, list[float]] = {
    "definite": torch.linspace(0.6, 3.0, 8).tolist(),
    "multiple of the identity": [2.0] * 8,
    "condition 1e6": [0.5, *torch.logspace(-6, 0, 7).tolist()],
    "singular": [0.0, 0.0, 0.7, 1, 1.5, 2, 2.5, 3],
    "indefinite": [-3.0, -2, -1, 1, 1.5, 2, 2.5, 3],
}
OK, MAX, BREAK, INDEF = Result.converged, Result.max_iterations, Result.breakdown, Result.indefinite
# What must come out where it is not "converged": Neumann needs 0 < 0.6 lambda < 2, CG and Nystrom definiteness (of
# A - 0.5 I for Nystrom).
EXPECTED: dict[tuple[str, str], set[Result]] = {
    ("condition 1e6", "Neumann"): {MAX},
    ("condition 1e6", "Nystrom"): {INDEF},
    ("singular", "Nystrom"): {INDEF},
    ("singular", "Dense"): {OK, BREAK},  # rounding decides whether a pivot is exactly zero
    ("indefinite", "CG"): {INDEF},
    ("indefinite", "Nystrom"): {INDEF},
    ("indefinite", "Neumann"): {BREAK, MAX},
    ("indefinite", "BiCGSTAB"): {OK, BREAK, MAX},  # it may break down: GMRES and MINRES are for this
}


@pytest.mark.parametrize(("kind", "name"), list(itertools.product(SPECTRA, SOLVERS)))
@pytest.mark.parametrize("seed", range(3))
def test_consistent_systems(kind: str, name: str, seed: int) -> None:
    A, _ = symmetric(SPECTRA[kind], seed)
    b = A @ randn(8, seed=seed + 50)
    solution = SOLVERS[name].solve(times(A), b, throw=False)
    result = Result(solution.result.item())
    assert result in EXPECTED.get((kind, name), {OK})
    assert solution.value.isfinite().all()
    residual = torch.linalg.vector_norm(b - A @ solution.value)
    close(solution.residual, residual, 1e-12)  # what it says is what it is
    if result is OK:
        assert residual <= 1e-9 * torch.linalg.vector_norm(b) * (1 + 1e-6)
        exact = torch.linalg.pinv(A, hermitian=True) @ b
        if (kind, name) != ("singular", "Dense"):  # any solution will do for LU; the others start in the range
            assert torch.linalg.vector_norm(solution.value - exact) <= 1e-9 * torch.linalg.vector_norm(b) * 2e6


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("seed", range(3))
def test_inconsistent_systems_are_never_answered(name: str, seed: int) -> None:
    A, _ = symmetric(SPECTRA["singular"], seed)
    b = randn(8, seed=seed + 50)
    solution = SOLVERS[name].solve(times(A), b, throw=False)
    assert solution.result.item() in (MAX, BREAK, INDEF)
    least = torch.linalg.vector_norm(b - A @ (torch.linalg.pinv(A, hermitian=True) @ b))
    assert solution.residual >= least * (1 - 1e-9)
    if name in ("MINRES", "GMRES", "NormalCG"):  # the value is of least squares, or near it
        assert solution.residual <= least * (1 + 1e-6)


# An exactly singular matrix has no LU: Dense reports it, see test_solvers.py.
ZEROS = [cell for cell in itertools.product(SPECTRA, SOLVERS) if cell != ("singular", "Dense")]


@pytest.mark.parametrize(("kind", "name"), ZEROS)
def test_zero_right_hand_sides_are_answered_by_zero(kind: str, name: str) -> None:
    A, _ = symmetric(SPECTRA[kind])
    solution = SOLVERS[name].solve(times(A), torch.zeros(8, **F64), randn(8), throw=False)
    assert not solution.value.any()
    assert solution.residual == 0
    if name != "Nystrom" or kind in ("definite", "multiple of the identity"):
        assert solution.result.item() == OK


@parametrize({"BiCGSTAB": BiCGSTAB, "NormalCG": NormalCG})
@pytest.mark.parametrize("n", [1, 2, 4])
def test_exact_in_n_iterations(solver: Any, n: int) -> None:
    """In exact arithmetic; n is small for that, and A near a rotation for NormalCG. The others: test_solvers.py."""
    A = 2 * torch.linalg.qr(randn(n, n))[0] + 0.1 * randn(n, n, seed=1)
    A = A if solver is NormalCG else A @ A.mT + randn(n, n, seed=2) / 10
    b = randn(n, seed=3)
    solution = solver(rtol=1e-9, max_iterations=n).solve(times(A), b)
    close(solution.value, torch.linalg.solve(A, b), 1e-7)


# --- breakdowns -----------------------------------------------------------------------------------------------------


def test_gmres_goes_on_after_a_convergence_that_was_only_believed() -> None:
    """The operator is in single precision during the first cycle: the recurrence converges, the residual does not."""
    A, _ = symmetric(torch.linspace(1, 3, 8))
    b, calls = randn(8), itertools.count()

    def matvec(v: Tensor) -> Tensor:
        return (A.float() @ v.float()).double() if next(calls) < 8 else A @ v

    solution = GMRES(rtol=1e-12, check_every=1).solve(matvec, b)
    assert 8 < solution.iterations <= 16
    close(solution.value, torch.linalg.solve(A, b))


@pytest.mark.parametrize(
    "spectrum", [[0.0, 0.0, 0.7, 1, 1.5, 2, 2.5, 3], [0.0] * 3 + torch.linspace(0.5, 4, 17).tolist()]
)
def test_gmres_finds_a_singularity_that_no_diagonal_shows(spectrum: list[float]) -> None:
    """R of the last dimension has condition 1e16 with diagonals of 1e-9: solved with, it gives values of 1e15."""
    for seed in range(20):
        A, Q = symmetric(spectrum, seed)
        b, null = randn(len(spectrum), seed=seed + 50), spectrum.count(0.0)
        solution = GMRES(rtol=1e-9, check_every=1, restart=60).solve(times(A), b, throw=False)
        assert solution.result.item() == BREAK
        close(solution.residual, torch.linalg.vector_norm(Q[:, :null].mT @ b))  # least squares
        assert torch.linalg.vector_norm(solution.value) < 1e2


def test_gmres_restarted_on_a_singular_operator_does_not_run_away() -> None:
    """The first cycle ends at least squares; the next starts in the null space, where every product is rounding."""
    A, Q = symmetric([0.0, 0.0, 0.7, 1, 1.5, 2, 2.5, 3])
    b = randn(8, seed=50)
    solution = GMRES(rtol=1e-9, restart=6, check_every=1).solve(times(A), b, throw=False)
    assert solution.result.item() == BREAK
    close(solution.residual, torch.linalg.vector_norm(Q[:, :2].mT @ b))
    close(solution.value, torch.linalg.pinv(A, hermitian=True) @ b + Q[:, :2] @ (Q[:, :2].mT @ solution.value), 1e-8)
    assert torch.linalg.vector_norm(solution.value) < 1e2


def test_gmres_on_a_nilpotent_operator() -> None:
    """b = e_1 is mapped to 0; b = e_3 to e_2 to e_1 to 0, and never back: singular, at the dimension of the chain."""
    shift = torch.diag(torch.ones(2, **F64), 1)
    for start in range(3):
        b = torch.eye(3, **F64)[start]
        solution = GMRES(check_every=1).solve(times(shift), b, throw=False)
        assert solution.result.item() == BREAK
        assert solution.iterations == start + 1
        close(solution.residual, torch.linalg.vector_norm(b))  # nothing is gained, and nothing is made up
        assert torch.linalg.vector_norm(solution.value) <= 1


@pytest.mark.parametrize("small", [0.0, 1e-18])
@pytest.mark.parametrize("seed", range(3))
def test_bicgstab_reports_r_v_near_zero_at_once(small: float, seed: int) -> None:
    """<b, A b> is zero to rounding while every other quantity is not: alpha is rounding, and is not used."""
    A = randn(5, 5, seed=seed)
    A[0, 0] = small
    solution = BiCGSTAB(check_every=1).solve(times(A), torch.eye(5, **F64)[0], throw=False)
    assert solution.result.item() == BREAK
    assert solution.iterations == 1
    assert not solution.value.any()
    close(GMRES().solve(times(A), torch.eye(5, **F64)[0]).value, torch.linalg.inv(A)[:, 0], 1e-5)


def test_bicgstab_reports_omega_near_zero() -> None:
    """A skew-symmetric beside a little of the identity in the first step's plane: <t, s> = 0, yet r.v is not."""
    skew = torch.zeros(4, 4, **F64)
    skew[1, 2], skew[2, 1] = 1.0, -1.0
    A = skew + torch.diag(torch.tensor([1.0, 0, 0, 1.0], **F64))
    b = torch.tensor([1.0, 1.0, 0.0, 0.0], **F64)
    solution = BiCGSTAB(check_every=1).solve(times(A), b, throw=False)
    exact = torch.linalg.solve(A, b)
    if solution.result.item() == OK:
        close(solution.value, exact, 1e-5)
    else:
        assert solution.result.item() == BREAK
        assert solution.value.isfinite().all()


def test_warm_starts_save_what_they_know() -> None:
    """From x0 with an error 1e-6 times that of zero, the iterations for 1e-6 are saved."""
    A, _ = symmetric(torch.linspace(1, 100, 60))
    exact = randn(60)
    near = exact + 1e-6 * randn(60, seed=1)
    options: dict[str, Any] = {"rtol": 1e-10, "check_every": 1, "max_iterations": 3000}
    for solver in (CG(**options), MINRES(**options), Neumann(**options, scale=0.0198)):
        cold = solver.solve(times(A), A @ exact).iterations
        warm = solver.solve(times(A), A @ exact, near).iterations
        assert 0 < warm <= 0.65 * cold  # 4 of 10 digits are left, and CG speeds up towards the end


def test_least_squares_stops_by_its_own_tolerance() -> None:
    """|A'r| <= rtol |A'b|, in the same number of iterations whatever the scale of A, and no later than it holds."""
    A, b = randn(30, 10) * torch.linspace(1, 30, 10, **F64), randn(30, seed=1)
    counts = {}
    for rtol, scale in itertools.product((1e-2, 1e-10), (1e-3, 1.0, 1e3)):
        solver = NormalCG(rtol=rtol, least_squares=True, check_every=1)
        solution = solver.solve(times(scale * A), b, torch.zeros(10, **F64))
        gradient = scale * A.mT @ (b - scale * A @ solution.value)
        assert torch.linalg.vector_norm(gradient) <= rtol * torch.linalg.vector_norm(scale * A.mT @ b) * (1 + 1e-9)
        counts[rtol, scale] = solution.iterations.item()
    assert len({counts[1e-2, scale] for scale in (1e-3, 1.0, 1e3)}) == 1
    assert counts[1e-2, 1.0] < counts[1e-10, 1.0] - 2


# --- devices --------------------------------------------------------------------------------------------------------


@parametrize(ALL)
def test_every_tensor_is_made_on_the_device_of_the_inputs(solver: Any) -> None:
    """Under another default device whatever is made without a device lands there, and does not mix."""
    A, _ = symmetric(torch.linspace(0.6, 3.0, N))
    b, x0 = randn(N), randn(N, seed=1)
    batch = torch.stack([A, 1.1 * A])
    with torch.device("meta"):
        alone = solver.solve(times(A), b, x0)
        blind = solver.solve(times(A), b, throw=False)
        many = torch.func.vmap(lambda a: solver.solve(times(a), b, throw=False))(batch)
    for solution in (alone, blind, many):
        assert {t.device for t in solution} == {b.device}
    close(alone.value, torch.linalg.solve(A, b))


def test_preconditioners_and_transposes_are_made_on_the_device_of_the_inputs() -> None:
    A, _ = symmetric(torch.linspace(0.6, 3.0, N))
    b = randn(N)
    with torch.device("meta"):
        made = Nystrom(4, damping=0.5).preconditioner(times(A), b)
        value = CG(**TIGHT, preconditioner=made).solve(times(A), b).value
        least = NormalCG(rtol=1e-13, least_squares=True).solve(times(A[:, :5]), b, b[:5]).value
    close(value, torch.linalg.solve(A, b))
    close(least, torch.linalg.pinv(A[:, :5]) @ b)


@parametrize({k: v for k, v in GENERAL.items() if k != "Dense"})
def test_failures_leave_the_last_good_iterate(solver: Any) -> None:
    """The operator turns into NaN after some products: the value is finite and better than nothing."""
    A, _ = symmetric(torch.linspace(1, 20, N))
    b, calls = randn(N), itertools.count()

    def matvec(v: Tensor) -> Tensor:
        return A @ v * (float("nan") if 8 <= next(calls) < 11 else 1.0)

    solution = type(solver)(rtol=1e-12, check_every=1, max_iterations=30).solve(
        matvec, b, throw=False, **({"rmatvec": times(A)} if isinstance(solver, NormalCG) else {})
    )
    assert solution.value.isfinite().all()
    assert torch.linalg.vector_norm(b - A @ solution.value) < torch.linalg.vector_norm(b)
