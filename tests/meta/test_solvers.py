"""Linear solvers: closed forms, the published rates, every way to fail, and the same under vmap. All in float64."""

import math
from itertools import product
from typing import Any

import pytest
import torch

from tests.meta.solver_cases import (
    ALL,
    ANY,
    DEVICE,
    EXACT,
    F64,
    GENERAL,
    SPD,
    SPECTRUM,
    TIGHT,
    N,
    close,
    parametrize,
    randn,
    symmetric,
    times,
)
from theria.meta.solvers import (
    CG,
    GMRES,
    MINRES,
    BiCGSTAB,
    Dense,
    IterativeSolver,
    Neumann,
    NormalCG,
    Nystrom,
    Result,
    Solution,
    SolverError,
)

# --- answers -------------------------------------------------------------------------------------------------------


@parametrize(ALL)
def test_spd_system(solver):
    A, _ = symmetric(SPECTRUM)
    b = randn(N)
    solution = solver.solve(times(A), b)
    close(solution.value, torch.linalg.solve(A, b))
    assert solution.result.item() == Result.converged
    close(solution.residual, torch.linalg.vector_norm(b - A @ solution.value), 1e-14)


@parametrize(ALL)
@pytest.mark.parametrize("c", [1.0, 2.5])
def test_multiple_of_the_identity(solver, c):
    b = randn(N)
    close(solver.solve(lambda v: c * v, b).value, b / c)


@parametrize(ANY)
@pytest.mark.parametrize("c", [1e-12, 1e9])
def test_any_scale_of_the_operator(solver, c):
    b = randn(N)
    close(solver.solve(lambda v: c * v, b).value * c, b)


@parametrize(ALL)
@pytest.mark.parametrize("size", [1e-180, 1e-30, 1e30, 1e180])
def test_any_scale_of_b(solver, size):
    """Squares of b would underflow or overflow."""
    A, _ = symmetric(SPECTRUM)
    b = randn(N)
    close(solver.solve(times(A), size * b).value / size, torch.linalg.solve(A, b))


@parametrize(ALL)
def test_zero_b(solver):
    A, _ = symmetric(SPECTRUM)
    for x0 in (None, randn(N)):
        solution = solver.solve(times(A), torch.zeros(N, **F64), x0)
        assert not solution.value.any()
        assert solution.residual == 0
        if not isinstance(solver, Dense | Nystrom):  # direct: their iterations are the products
            assert solution.iterations == 0


@parametrize(ALL)
def test_warm_start(solver):
    A, _ = symmetric(SPECTRUM)
    b = randn(N)
    exact = torch.linalg.solve(A, b)
    close(solver.solve(times(A), b, randn(N, seed=1)).value, exact)
    if not isinstance(solver, Dense | Nystrom):
        close(solver.solve(times(A), b, exact, throw=False).value, exact)
        assert type(solver)(rtol=1e-8).solve(times(A), b, exact).iterations == 0


@parametrize(GENERAL)
@pytest.mark.parametrize("seed", range(3))
def test_non_symmetric(solver, seed):
    A = 3 * torch.eye(N, **F64) + randn(N, N, seed=seed) / math.sqrt(N)
    b = randn(N, seed=seed + 10)
    close(solver.solve(times(A), b).value, torch.linalg.solve(A, b))


@parametrize({"MINRES": MINRES(**TIGHT), **{k: v for k, v in GENERAL.items() if k != "BiCGSTAB"}})
def test_indefinite_is_solved_by_those_that_can(solver):
    A, _ = symmetric([-3, -2, -1, 1, 2, 4])
    b = randn(6)
    close(solver.solve(times(A), b).value, torch.linalg.solve(A, b))


@parametrize(ALL)
def test_pytrees_of_mixed_shapes(solver):
    A, _ = symmetric(SPECTRUM)

    def flat(t):
        return torch.cat([t["a"].reshape(-1), t["b"][0].reshape(-1), t["b"][1].reshape(-1)])

    def tree(x):
        return {"a": x[:6].reshape(2, 3), "b": [x[6], x[7:].reshape(5, 1)]}

    b = randn(N)
    value = solver.solve(lambda t: tree(A @ flat(t)), tree(b), tree(randn(N, seed=3))).value
    assert value["b"][0].shape == ()
    assert value["b"][1].shape == (5, 1)
    close(flat(value), torch.linalg.solve(A, b))


@parametrize({"CG": CG(), "MINRES": MINRES(), "GMRES": GMRES(restart=60), "Dense": Dense()})
def test_condition_1e6(solver):
    A, Q = symmetric(torch.logspace(-6, 0, 50))
    exact = randn(50)
    b = A @ exact
    solution = solver.solve(times(A), b)
    assert torch.linalg.vector_norm(b - A @ solution.value) <= 1e-6 * torch.linalg.vector_norm(b)
    # In the coordinates of the eigenvectors the error is at most residual / eigenvalue.
    bound = 1e-6 * torch.linalg.vector_norm(b) / torch.logspace(-6, 0, 50, **F64)
    assert ((Q.mT @ (solution.value - exact)).abs() <= bound + 1e-9).all()


def test_condition_1e6_to_the_solution():
    A, _ = symmetric(torch.logspace(-6, 0, 20))
    exact = randn(20)
    value = CG(rtol=1e-13, check_every=1).solve(times(A), A @ exact).value
    close(value, exact, 1e-6)  # condition times rtol


def test_rectangular_least_squares_with_and_without_the_transpose():
    A, b = randn(9, 4), randn(9, seed=1)
    solver = NormalCG(rtol=1e-13, least_squares=True)
    exact = torch.linalg.pinv(A) @ b
    solution = solver.solve(times(A), b, rmatvec=times(A.mT))
    close(solution.value, exact)
    close(solution.residual, torch.linalg.vector_norm(A.mT @ (b - A @ solution.value)), 1e-13)
    close(solver.solve(times(A), b, randn(4, seed=2)).value, exact)
    wide = NormalCG(**TIGHT).solve(times(A.mT), b[:4], torch.zeros(9, **F64)).value
    close(wide, torch.linalg.pinv(A.mT) @ b[:4])  # consistent: the minimum norm


# --- singular ------------------------------------------------------------------------------------------------------

SINGULAR = [0, 0, 1, 2, 3, 5]


@parametrize({k: v for k, v in ANY.items() if k != "Dense"})
def test_singular_consistent_gives_the_minimum_norm(solver):
    A, _ = symmetric(SINGULAR)
    b = A @ randn(6)
    close(solver.solve(times(A), b).value, torch.linalg.pinv(A, hermitian=True) @ b)


def test_singular_consistent_keeps_the_null_space_of_x0():
    A, Q = symmetric(SINGULAR)
    b, x0 = A @ randn(6), randn(6, seed=1)
    null = Q[:, :2] @ (Q[:, :2].mT @ x0)
    close(MINRES(**TIGHT).solve(times(A), b, x0).value, torch.linalg.pinv(A, hermitian=True) @ b + null)


@parametrize(ANY)
def test_singular_inconsistent_is_reported(solver):
    A, _ = symmetric(SINGULAR)
    solution = solver.solve(times(A), randn(6), throw=False)
    assert solution.result.item() in (Result.breakdown, Result.indefinite, Result.max_iterations)
    with pytest.raises(SolverError):
        solver.solve(times(A), randn(6))


@parametrize({"MINRES": MINRES(**TIGHT), "NormalCG": NormalCG(**TIGHT)})
def test_singular_inconsistent_value_is_of_least_squares(solver):
    A, _ = symmetric([0, 0, -1, 2, 3, 5])
    b = randn(6)
    solution = solver.solve(times(A), b, throw=False)
    assert solution.result.item() == Result.breakdown
    least = torch.linalg.pinv(A, hermitian=True) @ b
    close(A @ solution.value, A @ least)
    if isinstance(solver, NormalCG):
        close(solution.value, least)
        close(NormalCG(**TIGHT, least_squares=True).solve(times(A), b).value, least)


@parametrize(ANY)
def test_zero_operator_is_reported(solver):
    solution = solver.solve(torch.zeros_like, randn(N), throw=False)
    assert solution.result.item() in (Result.breakdown, Result.indefinite)
    assert not solution.value.any()


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "eigenvalues", [[-1, -2, -3], [1, 1, -1], [1, 2, 3, -1e-3], [0, 1, 2], [1, 2, 3, 4, 5, 6, 7, -5]]
)
@pytest.mark.parametrize("seed", range(5))
def test_cg_reports_negative_and_zero_curvature(eigenvalues, seed):
    A, _ = symmetric(eigenvalues, seed)
    b = randn(len(eigenvalues), seed=seed + 20)
    solution = CG(rtol=1e-10).solve(times(A), b, throw=False)
    assert solution.result.item() == Result.indefinite
    assert solution.value.isfinite().all()
    with pytest.raises(SolverError, match=r"indefinite, residual .* after \d+ iterations.*damping"):
        CG(rtol=1e-10).solve(times(A), b)


def test_cg_reports_exactly_zero_curvature_at_once():
    A = torch.diag(torch.tensor([1.0, -1.0], **F64))
    solution = CG().solve(times(A), torch.ones(2, **F64), throw=False)
    assert solution.result.item() == Result.indefinite
    assert solution.iterations == 1
    assert not solution.value.any()


def test_cg_reports_a_preconditioner_that_is_not_positive():
    A, _ = symmetric(SPECTRUM)
    solution = CG(preconditioner=lambda v: -v).solve(times(A), randn(N), throw=False)
    assert solution.result.item() == Result.indefinite


def test_nystrom_reports_negative_curvature():
    A, _ = symmetric([-1, 1, 2, 3])
    damped = A + 0.5 * torch.eye(4, **F64)
    assert Nystrom(4, 0.5).solve(times(damped), randn(4), throw=False).result.item() == Result.indefinite
    broken = CG(preconditioner=Nystrom(4, 0.5).preconditioner(times(damped), randn(4)))
    assert broken.solve(times(damped), randn(4), throw=False).result.item() == Result.non_finite


@parametrize(ALL)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_is_reported(solver, bad):
    A, _ = symmetric(SPECTRUM)
    b = randn(N)
    planted = b.clone()
    planted[3] = bad
    wrong = A.clone()
    wrong[2, 5] = bad
    for matrix, rhs, x0 in ((A, planted, None), (wrong, b, None), (A, b, planted)):
        assert solver.solve(times(matrix), rhs, x0, throw=False).result.item() == Result.non_finite
    with pytest.raises(SolverError, match="non_finite"):
        solver.solve(times(wrong), b)


@parametrize({"CG": CG, "MINRES": MINRES, "GMRES": GMRES, "BiCGSTAB": BiCGSTAB, "NormalCG": NormalCG})
def test_too_few_iterations_are_reported_with_the_best_so_far(solver):
    A, _ = symmetric(torch.logspace(-2, 0, N))
    b = randn(N)
    solution = solver(rtol=1e-12, max_iterations=3).solve(times(A), b, throw=False)
    assert (solution.result.item(), solution.iterations) == (Result.max_iterations, 3)
    close(solution.residual, torch.linalg.vector_norm(b - A @ solution.value))
    with pytest.raises(SolverError, match=r"max_iterations, residual .* after 3 iterations.*raise max_iterations") as e:
        solution.check()
    assert (e.value.result, e.value.iterations, e.value.tasks) == (Result.max_iterations, 3, ())
    assert e.value.residual == solution.residual.item()


def test_neumann_reports_divergence():
    solution = Neumann().solve(lambda v: 3 * v, randn(N), throw=False)  # I - A = -2 I
    assert solution.result.item() == Result.breakdown
    assert solution.iterations <= 54  # 2^53 > 1/eps


def test_bicgstab_reports_its_breakdown_where_gmres_solves():
    A = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], **F64)
    b = torch.tensor([1.0, 0.0], **F64)
    assert BiCGSTAB().solve(times(A), b, throw=False).result.item() == Result.breakdown
    close(GMRES().solve(times(A), b).value, torch.linalg.solve(A, b))


def test_gmres_keeps_its_basis_orthogonal():
    """Gram-Schmidt once loses it with this spectrum: the residual then stays 40 times above the tolerance."""
    A, _ = symmetric(torch.logspace(-9, 0, 40))
    b = randn(40)
    solution = GMRES(rtol=1e-6, restart=40, max_iterations=40).solve(times(A), b)
    assert solution.residual <= 1e-6 * torch.linalg.vector_norm(b)


def test_gmres_restarted_stagnates_on_a_shift_and_says_so():
    """On a cyclic shift GMRES makes no progress before iteration n (Nachtigal, Reddy and Trefethen 1992)."""
    b = torch.eye(8, **F64)[0]
    solution = GMRES(restart=5, max_iterations=100).solve(lambda v: v.roll(1), b, throw=False)
    assert solution.result.item() == Result.max_iterations
    close(solution.residual, torch.ones((), **F64))
    assert GMRES(restart=8).solve(lambda v: v.roll(1), b).iterations == 8


@parametrize({"CG": CG(), "MINRES": MINRES(), "Neumann": Neumann(scale=0.3)})
def test_wrong_operators_are_never_answers(solver):
    """Affine, non-symmetric, or of another direction each time: the true residual decides."""
    A, _ = symmetric(SPECTRUM)
    b, calls = randn(N), iter(range(10**6))
    skew = A + 3 * (randn(N, N) - randn(N, N).mT)
    for matvec in (lambda v: A @ v + 1, times(skew), lambda v: A @ v * (1 + 0.1 * (next(calls) % 3))):
        solution = solver.solve(matvec, b, throw=False)
        if solution.result.item() == Result.converged:
            assert torch.linalg.vector_norm(b - matvec(solution.value)) <= 0.2 * torch.linalg.vector_norm(b)
            assert solution.residual <= 1e-6 * torch.linalg.vector_norm(b)


def test_a_tolerance_below_rounding_is_a_breakdown_or_a_limit():
    A, _ = symmetric(torch.logspace(-6, 0, 30))
    for solver in (CG(rtol=1e-17), MINRES(rtol=1e-17), Dense(rtol=1e-18)):
        solution = solver.solve(times(A), randn(30), throw=False)
        assert solution.result.item() != Result.converged
        assert solution.residual > 0


class _Liar(IterativeSolver):
    """Claims to have converged, at zero: what two public conjugate gradients return for a multiple of the identity."""

    def _run(self, system, bound):
        zero = torch.zeros_like(system.residual)
        return zero, torch.zeros_like(system.goal, dtype=torch.int64), torch.ones_like(system.goal, dtype=torch.int64)


def test_a_solver_that_claims_too_much_is_caught():
    b = randn(N)
    solution = _Liar().solve(lambda v: 2 * v, b, throw=False)
    assert solution.result.item() == Result.breakdown
    close(solution.residual, torch.linalg.vector_norm(b))


# --- rates ---------------------------------------------------------------------------------------------------------


@parametrize({**SPD, "GMRES": GENERAL["GMRES"]})
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_exact_in_n_iterations(solver, n):
    A, _ = symmetric(torch.linspace(1, 4, n))
    b = randn(n)
    solution = type(solver)(rtol=1e-12, max_iterations=n).solve(times(A), b)
    close(solution.value, torch.linalg.solve(A, b))
    assert solution.iterations <= n


@parametrize({**SPD, "GMRES": GENERAL["GMRES"]})
def test_as_many_iterations_as_distinct_eigenvalues(solver):
    A, _ = symmetric([1.0] * 5 + [2.0] * 4 + [7.0] * 3)
    assert type(solver)(rtol=1e-12).solve(times(A), randn(N)).iterations == 3


@pytest.mark.parametrize("kappa", [10.0, 100.0, 1000.0])
def test_cg_contracts_as_its_bound_says(kappa):
    """|e_k|_A <= 2 ((sqrt k - 1) / (sqrt k + 1))^k |e_0|_A; the Chebyshev spectrum comes near to it."""
    n = 200
    nodes = torch.cos(torch.arange(n, **F64) * math.pi / (n - 1))
    A, _ = symmetric((kappa + 1) / 2 + (kappa - 1) / 2 * nodes)
    exact = randn(n)
    rate = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)

    def error(k):
        x = CG(rtol=0, max_iterations=k).solve(times(A), A @ exact, throw=False).value - exact
        return (x @ A @ x).sqrt().item()

    start = (exact @ A @ exact).sqrt().item()
    few, many = round(math.sqrt(kappa)), round(2 * math.sqrt(kappa))
    errors = {k: error(k) for k in (1, 2, few, (few + many) // 2, many)}
    assert all(e <= 2 * rate**k * start for k, e in errors.items())
    # Not faster than theory by much either: a stopping rule or an initial guess that is off would show here.
    assert math.log(errors[many] / errors[few]) / (many - few) == pytest.approx(math.log(rate), rel=0.25)


def test_minres_residual_is_the_least_in_the_krylov_space():
    A, _ = symmetric([-2, -1, 0.5, 1, 2, 3, 5, 8])
    b = randn(8)
    K = [b]
    for k in range(1, 7):
        K.append(A @ K[-1])
        basis = A @ torch.linalg.qr(torch.stack(K[:k], 1))[0]
        least = torch.linalg.vector_norm(b - basis @ torch.linalg.lstsq(basis, b[:, None]).solution[:, 0])
        for solver in (MINRES, GMRES):
            solution = solver(rtol=1e-14, max_iterations=k).solve(times(A), b, throw=False)
            close(solution.residual, least, 1e-9)


def test_neumann_terms_and_rate():
    """K iterations are the K-term series; the error falls by the spectral radius of I - alpha A."""
    A, Q = symmetric(SPECTRUM)
    b, J = randn(N), torch.eye(N, **F64) - 0.5 * A
    series, term = torch.zeros_like(b), 0.5 * b
    for k in range(1, 30):
        series, term = series + term, J @ term
        close(Neumann(rtol=0, scale=0.5, max_iterations=k).solve(times(A), b, throw=False).value, series, 1e-13)
    # Along one eigenvector the rate is |1 - alpha lambda| exactly.
    for i in (0, N - 1):
        residuals = [
            Neumann(rtol=0, scale=0.5, max_iterations=k).solve(times(A), Q[:, i], throw=False).residual for k in (4, 5)
        ]
        close(residuals[1] / residuals[0], (1 - 0.5 * SPECTRUM[i]).abs(), 1e-9)


# --- preconditioners -----------------------------------------------------------------------------------------------


@parametrize({"CG": CG, "GMRES": GMRES, "BiCGSTAB": BiCGSTAB, "Neumann": Neumann})
def test_the_inverse_preconditions_to_one_iteration(solver):
    A, _ = symmetric(torch.logspace(-3, 0, N))
    inverse = torch.linalg.inv(A)
    solution = solver(rtol=1e-10, preconditioner=times(inverse)).solve(times(A), randn(N))
    assert solution.iterations == 1
    close(solution.value, inverse @ randn(N), 1e-9)


def test_normal_cg_preconditioned():
    A = randn(N, N) + torch.diag(torch.logspace(0, 3, N, **F64))
    inverse = torch.linalg.inv(A.mT @ A)
    solution = NormalCG(rtol=1e-9, preconditioner=times(inverse)).solve(times(A), randn(N))
    assert solution.iterations == 1


def test_diagonal_preconditioner_of_a_diagonal_system():
    d = torch.logspace(-4, 4, N, **F64)
    b = randn(N)
    solution = CG(rtol=1e-12, preconditioner=lambda v: v / d).solve(lambda v: d * v, b)
    assert solution.iterations == 1
    close(solution.value, b / d)


def test_nystrom_is_exact_at_the_rank_of_the_operator():
    H, _ = symmetric([100.0, 10, 1] + [0.0] * 17)
    A, b = H + 0.1 * torch.eye(20, **F64), randn(20)
    solution = Nystrom(3, damping=0.1, rtol=1e-10).solve(times(A), b)
    close(solution.value, torch.linalg.solve(A, b))
    assert solution.iterations == 3
    poor = Nystrom(2, damping=0.1).solve(times(A), b, throw=False)
    assert poor.result.item() == Result.max_iterations


def test_nystrom_makes_cg_independent_of_the_top_eigenvalues():
    n, mu = 100, 1e-3
    A, _ = symmetric(torch.logspace(3, -9, n, **F64) + mu)
    b = randn(n)
    plain = CG(rtol=1e-8).solve(times(A), b)
    made = Nystrom(60, damping=mu).preconditioner(times(A), b)
    solution = CG(rtol=1e-8, preconditioner=made).solve(times(A), b)
    assert solution.iterations <= 8 < 20 * 2 < plain.iterations
    close(A @ solution.value, b, 1e-7)


def test_nystrom_preconditioner_under_vmap():
    A = torch.stack([symmetric([500.0, 50, *SPECTRUM.tolist()], i)[0] for i in range(3)])
    b = randn(3, N + 2)

    def solve(a, v):
        made = Nystrom(4, damping=0.5).preconditioner(times(a), v)
        return CG(**TIGHT, preconditioner=made).solve(times(a), v).value

    close(torch.func.vmap(solve)(A, b), torch.linalg.solve(A, b))


@parametrize({"Dense": Dense(vmap=False), "Nystrom": Nystrom(N, damping=0.5, vmap=False)})
def test_operators_that_vmap_cannot_run(solver):
    A, _ = symmetric(SPECTRUM)
    b = randn(N)

    def matvec(v):
        return v * 0 + torch.tensor((A @ v).tolist(), dtype=v.dtype, device=v.device)  # reads its argument on the host

    close(solver.solve(matvec, b).value, torch.linalg.solve(A, b))
    with pytest.raises(RuntimeError, match="data pointer"):
        type(solver)(**{k: v for k, v in vars(solver).items() if k != "vmap"}).solve(matvec, b)


def test_nystrom_draws_nothing_from_the_global_generator():
    A, _ = symmetric(SPECTRUM)
    before = torch.get_rng_state()
    values = [Nystrom(4, 0.5, seed=s).solve(times(A), randn(N), throw=False).value for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(values[0], values[1])
    assert not torch.allclose(values[0], values[2])


def test_nystrom_test_matrix_is_standard_normal():
    from theria.meta.solvers.nystrom import _gaussian

    x = _gaussian(2000, 50, 0, DEVICE)
    size = x.numel()
    moments = [(x**k).mean().item() for k in (1, 2, 4)]
    assert moments[0] == pytest.approx(0, abs=4 / math.sqrt(size))
    assert moments[1] == pytest.approx(1, abs=4 * math.sqrt(2 / size))
    assert moments[2] == pytest.approx(3, abs=4 * math.sqrt(96 / size))
    assert (x.mT @ x / 2000 - torch.eye(50, device=DEVICE)).abs().max() < 6 / math.sqrt(2000)


# --- many tasks ----------------------------------------------------------------------------------------------------


def tasks():
    """Different conditioning, a multiple of the identity, a zero right-hand side, a NaN."""
    spectra = [SPECTRUM, torch.full((N,), 2.0, **F64), torch.linspace(1, 2, N, **F64), SPECTRUM, SPECTRUM]
    A = torch.stack([symmetric(s, i)[0] for i, s in enumerate(spectra)])
    b = randn(5, N, seed=7)
    b[3] = 0
    b[4, 2] = math.nan
    return A, b


@parametrize(ALL)
def test_vmap_equals_the_loop_with_each_task_stopping_on_its_own(solver):
    A, b = tasks()
    loop = [solver.solve(times(a), v, throw=False) for a, v in zip(A, b, strict=True)]
    batched = torch.func.vmap(lambda a, v: solver.solve(times(a), v, throw=False))(A, b)
    assert isinstance(batched, Solution)
    for i, alone in enumerate(loop):
        torch.testing.assert_close(batched.value[i], alone.value, rtol=EXACT, atol=EXACT, equal_nan=True)
        assert batched.result[i] == alone.result
        assert abs(batched.iterations[i] - alone.iterations) <= 1  # a residual on the edge of the tolerance
    assert batched.result.tolist() == [0, 0, 0, 0, Result.non_finite]
    if isinstance(solver, CG | MINRES | GMRES):
        assert batched.iterations.tolist()[1] == 1
        assert len(set(batched.iterations.tolist())) >= 3


@parametrize(ALL)
def test_vmap_over_one_of_operator_and_b(solver):
    A, b = tasks()
    A, b = A[:3], b[:3]
    close(
        torch.func.vmap(lambda v: solver.solve(times(A[0]), v).value)(b),
        torch.linalg.solve(A[:1], b[..., None])[..., 0],
    )
    close(torch.func.vmap(lambda a: solver.solve(times(a), b[0]).value)(A), torch.linalg.solve(A, b[0].expand(3, N)))


@parametrize(ALL)
def test_vmap_of_vmap(solver):
    A, b = tasks()
    A, b = A[:3], b[:2]
    value = torch.func.vmap(lambda a: torch.func.vmap(lambda v: solver.solve(times(a), v).value)(b))(A)
    for i, j in product(range(3), range(2)):
        close(value[i, j], torch.linalg.solve(A[i], b[j]))


def test_throw_under_vmap_names_the_tasks():
    A, b = tasks()
    with pytest.raises(SolverError, match=r"1 of 5 tasks, the first of them task 4: non_finite") as e:
        torch.func.vmap(lambda a, v: CG().solve(times(a), v).value)(A, b)
    assert e.value.tasks == (4,)
    solution = torch.func.vmap(lambda a, v: CG().solve(times(a), v, throw=False))(A, b)
    with pytest.raises(SolverError, match="task 4"):
        solution.check()


@parametrize({k: v for k, v in ALL.items() if k not in ("Dense", "Nystrom")})
def test_no_look_gives_the_same_and_never_synchronises(solver, monkeypatch):
    A, b = tasks()
    fields: dict[str, Any] = {"rtol": 1e-10, "max_iterations": 60} | (
        {"scale": 0.5} if isinstance(solver, Neumann) else {}
    )
    looked = torch.func.vmap(lambda a, v: type(solver)(**fields, check_every=3).solve(times(a), v, throw=False))(A, b)

    def forbidden(*_):
        raise AssertionError("the host read a tensor")

    for name in ("__bool__", "item", "__int__", "__float__", "tolist", "nonzero", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    blind = type(solver)(**fields, check_every=None)
    solution = torch.func.vmap(lambda a, v: blind.solve(times(a), v, throw=False))(A, b)
    alone = blind.solve(times(A[0]), b[0], throw=False)
    monkeypatch.undo()
    for got, expected in zip(solution, looked, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert alone.result.item() == Result.converged


@pytest.mark.parametrize(("check_every", "products"), [(1, 3 + 1), (4, 4 + 1), (None, 40 + 1)])
def test_a_look_stops_the_loop(check_every, products):
    """3 distinct eigenvalues: 3 iterations, then those until the next look; one product for the true residual."""
    A, _ = symmetric([1.0] * 5 + [2.0] * 4 + [7.0] * 3)
    count = 0

    def matvec(v):
        nonlocal count
        count += 1
        return A @ v

    solution = CG(rtol=1e-10, max_iterations=40, check_every=check_every).solve(matvec, randn(N))
    assert solution.iterations == 3
    assert count == products


def test_solves_at_a_level_of_another_transform():
    """An operator that is itself a derivative: the Hessian of a function, inside vmap."""
    A, b = tasks()
    A, b = A[:3], b[:3]

    def solve(a, v):
        gradient = torch.func.grad(lambda x: 0.5 * x @ a @ x)
        return CG(**TIGHT).solve(lambda t: torch.func.jvp(gradient, (v,), (t,))[1], v).value

    close(torch.func.vmap(solve)(A, b), torch.linalg.solve(A, b))


# --- derivatives, arguments ----------------------------------------------------------------------------------------


@parametrize(ALL)
def test_differentiating_through_a_solve_raises(solver):
    A, _ = symmetric(SPECTRUM)
    b = randn(N)
    with pytest.raises(ValueError, match="implicit rule"):
        solver.solve(times(A), b.clone().requires_grad_())
    with pytest.raises(ValueError, match="implicit rule"):
        solver.solve(times(A.clone().requires_grad_()), b)
    with pytest.raises(ValueError, match="implicit rule"):
        torch.func.grad(lambda a: solver.solve(times(a), b).value.sum())(A)
    with pytest.raises(ValueError, match="implicit rule"):
        torch.func.jvp(lambda v: solver.solve(times(A), v).value, (b,), (b,))
    with torch.no_grad():
        value = solver.solve(times(A.clone().requires_grad_()), b.clone().requires_grad_()).value
    assert not value.requires_grad
    close(value, torch.linalg.solve(A, b))


@parametrize(ALL)
def test_float32_stays_float32(solver):
    A, b = symmetric(SPECTRUM)[0].float(), randn(N).float()
    fields = {k: getattr(solver, k) for k in ("scale", "rank", "damping") if hasattr(solver, k)}
    solution = type(solver)(rtol=1e-5, **fields).solve(times(A), b)
    assert solution.value.dtype == solution.residual.dtype == torch.float32
    close(solution.value, torch.linalg.solve(A, b), 1e-4)


@parametrize(ALL)
def test_absolute_tolerance(solver):
    A, _ = symmetric(SPECTRUM)
    fields = {k: getattr(solver, k) for k in ("scale", "rank", "damping") if hasattr(solver, k)}
    solution = type(solver)(rtol=0.0, atol=1e-3, **fields).solve(times(A), 100 * randn(N))
    assert solution.residual <= 1e-3


def test_what_does_not_fit_is_named():
    b = {"a": randn(3)}
    with pytest.raises(ValueError, match=r"value of matvec has shapes \[\(2,\)\], where \[\(3,\)\] are needed"):
        CG().solve(lambda t: {"a": t["a"][:2]}, b)
    with pytest.raises(ValueError, match="x0 has the structure"):
        CG().solve(lambda t: t, b, randn(3))
    with pytest.raises(ValueError, match="float32"):
        CG().solve(lambda t: {"a": t["a"].float()}, b)
    with pytest.raises(ValueError, match="one real floating-point dtype"):
        CG().solve(lambda t: t, [randn(3), randn(3).float()])
    with pytest.raises(ValueError, match="one real floating-point dtype"):
        CG().solve(lambda t: t, torch.arange(3, device=DEVICE))
    with pytest.raises(ValueError, match="at least one entry"):
        CG().solve(lambda t: t, [])
    with pytest.raises(ValueError, match="rtol=-1"):
        CG(rtol=-1.0)
    with pytest.raises(ValueError, match="max_iterations=0"):
        GMRES(max_iterations=0)
    with pytest.raises(ValueError, match="positive finite damping"):
        Nystrom(3, damping=0.0)
    with pytest.raises(ValueError, match="no preconditioner"):
        MINRES(preconditioner=lambda v: v)


def test_every_result_says_what_to_do():
    assert len({result.advice for result in Result}) == len(Result) == 5
    assert [int(r) for r in Result] == [0, 1, 2, 3, 4]
    assert isinstance(SolverError(Result.breakdown, 1.0, 3), RuntimeError)


@parametrize({"CG": CG(max_iterations=3), "Nystrom": Nystrom(3, damping=0.5)})
def test_compiles_to_one_graph_without_throw(solver):
    A, _ = symmetric(torch.linspace(0.6, 1.5, 5))
    b = randn(5)
    compiled = torch.compile(lambda a, v: solver.solve(times(a), v, throw=False), backend="eager", fullgraph=True)
    for got, expected in zip(compiled(A, b)[:3], solver.solve(times(A), b, throw=False)[:3], strict=True):
        close(got, expected)
