"""Certificates: closed forms that the bound must cover and be near to, and planted faults that must be named."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from theria.data import Sinusoid
from theria.meta import AID, FOMAML, MAML, SGD, BilevelProblem
from theria.meta.certificate import Fault, certify, spot_check
from theria.meta.constant import constant
from theria.meta.solvers import CG, Dense
from theria.nn import MLP, TransformerBlock

EXACT = 1e-10  # closed forms in float64, condition numbers of at most 1e2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


@dataclass(frozen=True)
class Quadratic:
    """g = z'Az/2 + z'Cx + a'z, f = |z - t|^2/2 + b'x: z* = -A^-1 (a + Cx), grad h = b - C'A^-1 (z* - t)."""

    A: Tensor
    C: Tensor
    a: Tensor
    t: Tensor
    b: Tensor
    x: Tensor

    def inner_loss(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * z @ self.A @ z + z @ self.C @ x + self.a @ z

    def outer_loss(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (z - self.t).square().sum() + self.b @ x

    @property
    def solution(self) -> Tensor:
        return -torch.linalg.solve(self.A, self.a + self.C @ self.x)

    def adjoint_vector(self, z: Tensor) -> Tensor:
        return -torch.linalg.solve(self.A, z - self.t)

    def hypergradient(self, z: Tensor) -> Tensor:
        return self.b + self.C.mT @ self.adjoint_vector(z)

    def certify(self, z: Tensor | None = None, **options: Any) -> Any:
        z = self.solution if z is None else z
        return certify(self.inner_loss, self.outer_loss, z, self.x, **options)


def quadratic(eigenvalues: Any, m: int = 5, seed: int = 0) -> Quadratic:
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    n = len(eigenvalues)
    Q = orthogonal(n, seed)
    parts = (randn(n, m, seed=seed + 1), *(randn(k, seed=seed + 2 + i) for i, k in enumerate((n, n, m, m))))
    return Quadratic((Q * eigenvalues) @ Q.mT, *parts)


SPECTRUM = torch.linspace(0.5, 8, 8, dtype=torch.float64)


def length(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item()


# --- the bound and the estimate -----------------------------------------------------------------------------------


def test_the_exact_hypergradient_is_certified() -> None:
    problem = quadratic(SPECTRUM)
    certificate = problem.certify(solver=CG(rtol=1e-13))
    torch.testing.assert_close(
        certificate.hypergradient, problem.hypergradient(problem.solution), rtol=EXACT, atol=EXACT
    )
    assert certificate.ok, certificate
    assert certificate.bound.total <= 1e-10
    assert certificate.constants.mu == pytest.approx(0.5, abs=1e-10)
    assert abs(certificate.constants.L - 8) <= 1e-10
    assert certificate.advice.startswith("nothing to do")


def test_the_two_dimensional_closed_form() -> None:
    """Inner z'diag(1,4)z/2 - x'z, outer |z - 1|^2/2, x = (1,1): gradient (0, -0.1875)."""
    x = torch.ones(2, dtype=torch.float64)
    A = torch.tensor([1.0, 4.0], dtype=torch.float64)
    certificate = certify(
        lambda z, x: 0.5 * (A * z * z).sum() - (x * z).sum(),
        lambda z, x: 0.5 * (z - 1).square().sum(),
        x / A,
        x,
        solver=CG(rtol=1e-14),
    )
    torch.testing.assert_close(certificate.hypergradient, torch.tensor([0, -0.1875]).double(), rtol=EXACT, atol=EXACT)
    assert certificate.ok


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("source", ["formula", "solve", "inner", "all"])
def test_the_bound_holds_and_the_estimate_is_exact_on_quadratics(seed: int, source: str) -> None:
    base = quadratic(SPECTRUM, m=8, seed=10 * seed)
    problem = Quadratic(**{**vars(base), "C": orthogonal(8, seed)})
    truth = problem.hypergradient(problem.solution)
    z = problem.solution + (0.1 * randn(8, seed=seed + 100) if source in ("inner", "all") else 0)
    v = problem.adjoint_vector(z) + (0.1 * randn(8, seed=seed + 200) if source in ("solve", "all") else 0)
    p = problem.b + problem.C.mT @ v + (0.1 * randn(8, seed=seed + 300) if source in ("formula", "all") else 0)
    certificate = problem.certify(z, adjoint_vector=v, hypergradient=p, directions=0)
    error = length(p - truth)
    assert error <= certificate.bound.total
    assert certificate.estimate.total <= certificate.bound.total * (1 + 1e-9)
    torch.testing.assert_close(certificate.corrected, truth, rtol=1e-7, atol=1e-7)
    if source != "all":
        assert certificate.dominant == source
        assert certificate.estimate.total == pytest.approx(error, rel=1e-6)
        # C is orthogonal: |C'A^-1 r| >= |r| / L and |C'A^-1 A^-1 grad g| >= |grad g| / L^2, with L / mu = 16.
        assert certificate.bound.total <= {"formula": 1, "solve": 16, "inner": 256}[source] * error * (1 + 1e-6)
    else:
        assert error <= certificate.estimate.total


def test_the_adjoint_vector_is_that_of_aid() -> None:
    """One sign everywhere: H v = -grad_z f."""
    problem = quadratic(SPECTRUM)
    result = BilevelProblem(problem.inner_loss, problem.outer_loss).hypergradient(
        problem.x, problem.solution, AID(SGD(lr=0.1), steps=0, solver=CG(rtol=1e-12))
    )
    certificate = problem.certify(adjoint_vector=result.linear.value, hypergradient=result.gradient)
    assert certificate.ok, certificate
    assert certificate.solve_residual < 1e-10
    swapped = problem.certify(adjoint_vector=-result.linear.value, hypergradient=result.gradient, directions=0)
    assert swapped.faults == {Fault.wrong_formula, Fault.linear_solve_not_converged}


@pytest.mark.parametrize("source", ["solve", "inner"])
def test_the_bound_is_attained(source: str) -> None:
    """C orthogonal and the error along the eigenvector of the smallest eigenvalue: every inequality is an equality."""
    base = quadratic(SPECTRUM)
    problem = Quadratic(base.A, orthogonal(8, 7), base.a, base.t, randn(8, seed=8), randn(8, seed=9))
    lowest = 0.3 * torch.linalg.eigh(problem.A)[1][:, 0]
    z = problem.solution + (lowest if source == "inner" else 0)
    v = problem.adjoint_vector(z) + (lowest if source == "solve" else 0)
    certificate = problem.certify(z, adjoint_vector=v, directions=0)
    error = length(certificate.hypergradient - problem.hypergradient(problem.solution))
    assert certificate.bound.total == pytest.approx(error, rel=1e-4)
    assert certificate.estimate.total == pytest.approx(error, rel=1e-6)


def logistic(n: int = 30, dim: int = 6) -> Any:
    """Logistic regression with one weight decay exp(x_i) a coordinate, as pytrees; inner Newton to rounding."""
    X, Y = randn(n, dim), (randn(n, seed=1) > 0).double()
    X2, Y2 = randn(n, dim, seed=2), (randn(n, seed=3) > 0).double()

    def inner_loss(z: Any, x: Any) -> Tensor:
        fit = F.binary_cross_entropy_with_logits(X @ z["w"] + z["c"], Y)
        return fit + 0.5 * (x["decay"].exp() * z["w"].square()).sum() + 0.05 * z["c"].square()

    def outer_loss(z: Any, x: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(X2 @ z["w"] + z["c"], Y2)

    z = {"w": torch.zeros(dim, dtype=torch.float64), "c": torch.zeros((), dtype=torch.float64)}
    x = {"decay": torch.linspace(-3, -1, dim, dtype=torch.float64)}
    for _ in range(12):
        g = torch.func.grad(inner_loss)(z, x)
        step = Dense(rtol=1e-10).solve(
            lambda v, z=z: torch.func.jvp(torch.func.grad(lambda a: inner_loss(a, x)), (z,), (v,))[1], g
        )
        z = {k: z[k] - step.value[k] for k in z}
    return inner_loss, outer_loss, z, x


def test_pytrees_and_the_order_of_the_estimate() -> None:
    """Off quadratics the corrected one errs by the square of the inner error, the given one in proportion to it."""
    inner_loss, outer_loss, z, x = logistic()
    exact = certify(inner_loss, outer_loss, z, x, solver=CG(rtol=1e-13))
    assert exact.ok, exact
    assert exact.spot_check is not None
    assert max(exact.spot_check.differences) < 1e-7
    truth = exact.hypergradient["decay"]
    shift = {"w": randn(6, seed=5), "c": torch.ones((), dtype=torch.float64)}
    errors = []
    for size in (0.02, 0.01, 0.005):
        near = {k: z[k] + size * shift[k] for k in z}
        found = certify(inner_loss, outer_loss, near, x, solver=CG(rtol=1e-13), directions=0)
        given, corrected = (length(t["decay"] - truth) for t in (found.hypergradient, found.corrected))
        assert given <= found.bound.total
        assert found.dominant == "inner"
        assert Fault.inner_not_converged in found.faults
        errors.append((given, corrected, found.estimate.total))
    for (given, corrected, _), (half, quarter, _) in pairwise(errors):
        assert math.log2(given / half) == pytest.approx(1, abs=0.1)
        assert math.log2(corrected / quarter) == pytest.approx(2, abs=0.1)
    assert errors[-1][2] == pytest.approx(errors[-1][0], rel=0.1)


# --- planted faults -----------------------------------------------------------------------------------------------


def test_too_few_iterations_of_the_solver() -> None:
    certificate = quadratic(SPECTRUM).certify(solver=CG(max_iterations=2))
    assert certificate.faults == {Fault.linear_solve_not_converged}
    assert certificate.dominant == "solve"
    assert "raise max_iterations" in certificate.advice


def test_an_inner_problem_that_is_not_converged() -> None:
    problem = quadratic(SPECTRUM)
    z = torch.zeros(8, dtype=torch.float64)
    for _ in range(5):
        z = z - 0.1 * torch.func.grad(problem.inner_loss)(z, problem.x)
    certificate = problem.certify(z, solver=CG(rtol=1e-12))
    assert certificate.faults == {Fault.inner_not_converged}
    assert certificate.dominant == "inner"
    assert not certificate.spot_check.ok  # what the estimate explains is not named twice


FORMULAS = {
    "implicit term is missing": lambda q, v: q.b,
    "implicit term has the wrong sign": lambda q, v: q.b - q.C.mT @ v,
    "it has the wrong sign": lambda q, v: -(q.b + q.C.mT @ v),
    "multiple of the identity": lambda q, v: q.b - 0.1 * q.C.mT @ (q.solution - q.t),
    "give the adjoint_vector": lambda q, v: q.b + q.C.mT @ v + randn(5, seed=50),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_wrong_formulas_are_recognised(name: str) -> None:
    problem = quadratic(SPECTRUM)
    p = FORMULAS[name](problem, problem.adjoint_vector(problem.solution))
    certificate = problem.certify(hypergradient=p)
    assert certificate.faults == {Fault.wrong_formula}
    assert certificate.dominant == "formula"
    assert name in certificate.advice
    assert not certificate.spot_check.ok


OPERATORS = {
    "transposed": (lambda A: (A + torch.triu(A, 1)).mT, {Fault.asymmetric_hessian, Fault.wrong_hessian}),
    "sign": (lambda A: -A, {Fault.wrong_hessian}),
    "dropped": (lambda A: A - A[:, :1] @ A[:1] / A[0, 0] * 0.5, {Fault.wrong_hessian}),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_wrong_operators_are_named(name: str) -> None:
    """What the adjoint system was solved with: its own residual is small, that of the inner loss is not."""
    problem, (change, faults) = quadratic(SPECTRUM), OPERATORS[name]
    wrong = change(problem.A)
    certificate = problem.certify(hessian=lambda w: wrong @ w, solver=Dense())
    assert certificate.faults == faults | {Fault.linear_solve_not_converged}
    assert certificate.findings[0].fault in faults
    right = problem.certify(hessian=lambda w: problem.A @ w, solver=Dense())
    assert right.ok


def test_a_second_order_term_dropped_inside_the_inner_loss() -> None:
    """The gradient is right, its derivative is that of a constant: what an opaque backward does."""
    problem = quadratic(SPECTRUM)

    def inner_loss(z: Tensor, x: Tensor) -> Tensor:
        return problem.inner_loss(z, x) + z @ constant(z.pow(3)) - 0.25 * constant(z).pow(4).sum() * 0

    z = problem.solution
    for _ in range(100):
        z = z - torch.linalg.solve(problem.A + 3 * z.square().diag(), torch.func.grad(inner_loss)(z, problem.x))
    certificate = certify(inner_loss, problem.outer_loss, z, problem.x, solver=CG(rtol=1e-12))
    assert {Fault.wrong_hessian, Fault.spot_check_failed} <= certificate.faults
    assert certificate.findings[0].fault is Fault.wrong_hessian


def test_a_cross_derivative_dropped_inside_the_inner_loss() -> None:
    problem = quadratic(SPECTRUM)

    def inner_loss(z: Tensor, x: Tensor) -> Tensor:
        return problem.inner_loss(z, constant(x))

    certificate = certify(inner_loss, problem.outer_loss, problem.solution, problem.x, solver=CG(rtol=1e-12))
    assert certificate.faults == {Fault.wrong_cross_derivative, Fault.spot_check_failed}


@pytest.mark.parametrize("lowest", [-3.0, -1e-3])
def test_a_saddle_is_named_with_its_direction(lowest: float) -> None:
    problem = quadratic([lowest, *SPECTRUM[1:].tolist()])
    certificate = problem.certify(solver=Dense())
    assert certificate.faults == {Fault.negative_curvature}
    assert certificate.constants.mu == pytest.approx(lowest, abs=1e-10)
    assert certificate.bound.total == math.inf
    direction = certificate.negative_curvature_direction
    assert (direction @ problem.A @ direction).item() == pytest.approx(lowest, abs=1e-10)
    with_cg = problem.certify(solver=CG())
    assert Fault.negative_curvature in with_cg.faults
    assert quadratic(SPECTRUM).certify().negative_curvature_direction is None


def test_flat_curvature_gives_no_bound() -> None:
    problem = quadratic([0.0, *SPECTRUM[1:].tolist()])
    certificate = problem.certify(torch.zeros(8, dtype=torch.float64), adjoint_vector=randn(8), directions=0)
    assert Fault.flat_curvature in certificate.faults
    assert certificate.bound.solve == math.inf
    assert "add damping" in certificate.advice


def test_too_few_lanczos_steps_are_said_not_trusted() -> None:
    problem = quadratic(torch.logspace(-4, 1, 40))
    certificate = problem.certify(solver=Dense(), lanczos_steps=4, directions=0)
    assert Fault.flat_curvature in certificate.faults
    assert problem.certify(solver=Dense(), directions=0).ok


def test_another_solution_of_the_inner_problem_fails_the_spot_check() -> None:
    problem = quadratic(SPECTRUM)

    def drifting(x: Tensor) -> Tensor:
        return 1.5 * Quadratic(**{**vars(problem), "x": x}).solution

    certificate = problem.certify(solver=CG(rtol=1e-12), solve=drifting)
    assert certificate.faults == {Fault.spot_check_failed}


def test_a_noisy_solver_is_inconclusive() -> None:
    problem, generator = quadratic(SPECTRUM), torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        exact = Quadratic(**{**vars(problem), "x": x}).solution
        return exact + torch.randn(8, dtype=torch.float64, generator=generator)

    certificate = problem.certify(solver=CG(rtol=1e-12), solve=noisy)
    assert certificate.faults == {Fault.inconclusive_spot_check}


# --- unrolled hypergradients --------------------------------------------------------------------------------------


def test_an_unrolled_hypergradient_against_the_problem_solved_to_the_end() -> None:
    """T steps of gradient descent: the error falls with T, and the bound covers it at each."""
    problem = quadratic(SPECTRUM)
    truth = problem.hypergradient(problem.solution)

    def unrolled(x: Tensor, steps: int) -> Tensor:
        z = torch.zeros(8, dtype=torch.float64)
        for _ in range(steps):
            z = z - 0.2 * torch.func.grad(problem.inner_loss)(z, x)
        return z

    for steps in (5, 20, 150):
        p = torch.func.grad(lambda x, steps=steps: problem.outer_loss(unrolled(x, steps), x))(problem.x)
        certificate = problem.certify(unrolled(problem.x, steps), hypergradient=p, solver=CG(rtol=1e-12))
        assert length(p - truth) <= certificate.bound.total
        assert certificate.ok == (steps == 150)
        check = spot_check(lambda x, steps=steps: problem.outer_loss(unrolled(x, steps), x), problem.x, p)
        assert check.ok
        assert check.conclusive  # it is the gradient of what was unrolled, long before the end


def test_spot_check_of_maml() -> None:
    torch.manual_seed(0)
    model = MLP((1, 8, 8, 1)).double()
    episode = Sinusoid(shots=5, queries=5, tasks=3, seed=0).sample(0)
    episode = type(episode)(*(t.double() for t in episode))

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean()

    checks = []
    for kind in (MAML, FOMAML):
        learner = kind(model, loss, inner=SGD(lr=0.1), steps=3)
        params = {k: p.detach() for k, p in learner.named_parameters()}
        checks.append(spot_check(lambda p, learner=learner: learner.outer_loss(p, episode), params))
    exact, first_order = checks
    assert exact.ok
    assert exact.advice == "the gradient agrees with differences of the objective"
    assert max(exact.differences) < 1e-6
    assert not first_order.ok
    assert "a term is dropped (FirstOrder" in first_order.advice


# --- on networks, in float32, arguments -----------------------------------------------------------------------------


def test_through_attention_that_has_no_third_derivative() -> None:
    """A proximal inner problem on a transformer block, iMAML's: |params - outer|^2 makes it strongly convex."""
    torch.manual_seed(0)
    block = TransformerBlock(2, 1, d_ff=2, backend="custom").double()
    x, y = torch.randn(2, 1, 3, 2, dtype=torch.float64)
    outer = {k: p.detach() for k, p in block.named_parameters()}

    def fit(p: Any) -> Tensor:
        return (functional_call(block, p, (x,)) - y).square().mean()

    def inner_loss(p: Any, q: Any) -> Tensor:
        return fit(p) + 2.0 * sum((p[k] - q[k]).square().sum() for k in p)

    def outer_loss(p: Any, _: Any) -> Tensor:
        return (functional_call(block, p, (y,)) - x).square().mean()

    inner = outer
    for _ in range(30):
        g = torch.func.grad(inner_loss)(inner, outer)
        inner = {k: inner[k] - 0.2 * g[k] for k in inner}
    certificate = certify(inner_loss, outer_loss, inner, outer, solver=CG(rtol=1e-10), directions=1, lanczos_steps=8)
    assert certificate.ok, certificate
    assert certificate.constants.mu > 0
    assert certificate.spot_check is not None
    assert max(certificate.spot_check.differences) < 1e-6 * certificate.size


def test_float32() -> None:
    problem = quadratic(SPECTRUM)
    single = Quadratic(*(t.float() for t in vars(problem).values()))
    certificate = single.certify()
    assert certificate.ok, certificate
    assert not single.certify(hypergradient=1.05 * certificate.hypergradient).ok


def test_nothing_global_is_drawn_and_modules_are_left_alone() -> None:
    problem, state = quadratic(SPECTRUM), torch.get_rng_state()
    a, b = (problem.certify(solver=CG(max_iterations=3), seed=torch.Generator().manual_seed(0)) for _ in range(2))
    assert str(a) == str(b) == str(problem.certify(solver=CG(max_iterations=3)))
    assert torch.equal(state, torch.get_rng_state())
    layer = nn.Linear(3, 1).double()  # closed over, and requires a gradient
    found = certify(
        lambda z, x: (z - x).square().sum() + 0.1 * layer(z).square().sum(),
        lambda z, x: z.square().sum(),
        randn(3),
        randn(3, seed=1),
    )
    assert not found.hypergradient.requires_grad
    assert layer.weight.grad is None


def test_the_report_names_everything() -> None:
    text = str(quadratic(SPECTRUM).certify(solver=CG(max_iterations=2)))
    for part in ("NOT certified", "most of it: solve", "curvature 5.000e-01", "|B|", "<gradient, d>", "symmetry"):
        assert part in text
    assert len({fault.value for fault in Fault}) == len(Fault)


def test_what_does_not_fit_is_named() -> None:
    problem, z = quadratic(SPECTRUM), randn(8)
    with pytest.raises(ValueError, match=r"inner_loss returned \(8,\); a scalar tensor is needed"):
        certify(lambda z, x: z, problem.outer_loss, z, problem.x)
    with pytest.raises(ValueError, match=r"adjoint_vector must be a pytree .* with shapes \[\(8,\)\]"):
        problem.certify(adjoint_vector=randn(7))
    with pytest.raises(ValueError, match=r"hypergradient must be a pytree .* with shapes \[\(5,\)\]"):
        problem.certify(hypergradient=randn(4))
    with pytest.raises(ValueError, match="is NaN or infinite"):
        problem.certify(z * math.nan)
    with pytest.raises(ValueError, match="lanczos_steps=0"):
        problem.certify(lanczos_steps=0)
    with pytest.raises(ValueError, match="directions=0: give an integer of at least 1"):
        spot_check(lambda x: x.sum(), problem.x, directions=0)
