"""Lanczos, quadrature, traces and diagonals against matrices with known spectra. Float64."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.curvature.conftest import Network, flat
from theria.curvature import diagonal, extreme_eigenvalues, hvp, spectral_density, trace, trace_deflated
from theria.curvature.lanczos import tridiagonalise

EXACT = 1e-10
SIGMAS = 4.0  # of a standard error: by chance once in 16,000; the seeds are fixed


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(eigenvalues: Any, seed: int = 0) -> tuple[Tensor, Tensor]:
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    Q = torch.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    return (Q * eigenvalues) @ Q.mT, Q


def times(A: Tensor) -> Any:
    return lambda v: A @ v


# --- Lanczos -------------------------------------------------------------------------------------------------------


def test_all_steps_give_the_whole_spectrum() -> None:
    eigenvalues = torch.linspace(-1, 3, 12, dtype=torch.float64)
    A, _ = symmetric(eigenvalues)
    found = tridiagonalise(lambda V: V @ A, randn(2, 12), 12, True)
    for T, V in zip(found.matrix(), found.basis, strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(torch.linalg.eigvalsh(T), eigenvalues, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(V @ V.mT, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-14)
        torch.testing.assert_close(V @ A @ V.mT, T, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("steps", [1, 3, 8, 30])
@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_extremes_lie_inside_and_within_their_errors(steps: int, reorthogonalise: bool) -> None:
    eigenvalues = torch.cat([torch.tensor([-2.0]), torch.linspace(0.1, 1, 60), torch.tensor([9.0])]).double()
    A, Q = symmetric(eigenvalues)
    found = extreme_eigenvalues(times(A), randn(62), steps=steps, reorthogonalise=reorthogonalise)
    assert -2 - 1e-12 <= found.smallest <= found.largest <= 9 + 1e-12
    for value, error in ((found.smallest, found.smallest_error), (found.largest, found.largest_error)):
        assert (eigenvalues - value).abs().min() <= error + 1e-12
    if steps == 30:
        torch.testing.assert_close(found.smallest.item(), -2.0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.largest.item(), 9.0, rtol=1e-9, atol=1e-9)
    if reorthogonalise:
        x = found.largest_vector
        torch.testing.assert_close(torch.linalg.vector_norm(A @ x - found.largest * x), found.largest_error)
        assert found.steps == steps
        if steps == 30:
            assert abs(x @ Q[:, -1]) > 1 - 1e-9
            assert abs(found.smallest_vector @ Q[:, 0]) > 1 - 1e-9
    else:
        assert found.largest_vector is None


def test_reorthogonalisation_keeps_copies_away() -> None:
    """One eigenvalue far from the rest: it converges early, and comes again without reorthogonalisation."""
    A, _ = symmetric(torch.cat([torch.linspace(0, 1, 79), torch.tensor([1e4])]))

    def copies(reorthogonalise: bool) -> int:
        T = tridiagonalise(lambda V: V @ A, randn(1, 80), 60, reorthogonalise).matrix()
        return int((torch.linalg.eigvalsh(T) > 1e3).sum())

    assert copies(True) == 1
    assert copies(False) > 1


@pytest.mark.parametrize("c", [0.0, -2.5])
def test_a_multiple_of_the_identity_ends_after_one_step(c: float) -> None:
    found = extreme_eigenvalues(lambda v: c * v, randn(7), steps=5)
    assert found.steps == 1
    torch.testing.assert_close(torch.stack(found[:4]), torch.tensor([c, c, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.vector_norm(found.largest_vector).item(), 1.0)
    density = spectral_density(lambda v: c * v, randn(7), steps=5)
    torch.testing.assert_close(density.trace_of(torch.square).value.item(), 7 * c * c)


def test_an_invariant_subspace_ends_the_recurrence() -> None:
    A, _ = symmetric([1.0] * 5 + [2.0] * 4 + [7.0] * 3)
    found = extreme_eigenvalues(times(A), randn(12), steps=12)
    assert found.steps == 3
    torch.testing.assert_close(torch.stack(found[:4]), torch.tensor([1.0, 7, 0, 0]).double(), rtol=0, atol=1e-12)
    batch = tridiagonalise(lambda V: V @ A, torch.cat([randn(1, 12), torch.linalg.eigh(A)[1][None, :, 0]]), 12, True)
    assert batch.dimension.tolist() == [3, 1]


# --- quadrature ----------------------------------------------------------------------------------------------------


def test_quadrature_is_exact_for_polynomials_of_degree_2k_minus_1() -> None:
    """For each probe: sum w theta^j = z'A^j z / N for j < 2k, and not for j = 2k."""
    A, _ = symmetric(torch.linspace(-1, 2, 30))
    k, n = 4, 30
    density = spectral_density(times(A), randn(n), steps=k, probes=3, seed=5)
    torch.testing.assert_close(density.weights.sum(-1), torch.ones(3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(5)
    for p in range(3):
        z = 2.0 * torch.randint(2, (n,), generator=generator) - 1
        moments = [z.double() @ torch.linalg.matrix_power(A, j) @ z.double() / n for j in range(2 * k + 1)]
        ours = [(density.weights[p] * density.nodes[p] ** j).sum() for j in range(2 * k + 1)]
        torch.testing.assert_close(torch.stack(ours[:-1]), torch.stack(moments[:-1]), rtol=EXACT, atol=EXACT)
        assert (ours[-1] - moments[-1]).abs() > 1e-4


@pytest.mark.parametrize("function", [torch.exp, torch.log1p, torch.square], ids=lambda f: f.__name__)
@pytest.mark.parametrize("reorthogonalise", [True, False])
def test_traces_of_functions(function: Any, reorthogonalise: bool) -> None:
    eigenvalues = torch.logspace(-3, 1, 100, dtype=torch.float64)
    A, _ = symmetric(eigenvalues)
    density = spectral_density(times(A), randn(100), steps=25, probes=40, reorthogonalise=reorthogonalise)
    found = density.trace_of(function)
    assert abs(found.value - function(eigenvalues).sum()) <= SIGMAS * found.standard_error
    assert found.standard_error < 0.2 * function(eigenvalues).sum()


def test_density_and_its_integral() -> None:
    """Two clusters of 60 and 40 eigenvalues: the mass of each, and the smoothed density where it is known."""
    A, _ = symmetric(torch.cat([torch.linspace(0, 0.1, 60), torch.linspace(5, 5.1, 40)]))
    density = spectral_density(times(A), randn(100), steps=20, probes=60)
    grid = torch.linspace(-3, 8, 2201, dtype=torch.float64)
    smooth = density.density(grid, 0.3)
    assert torch.trapezoid(smooth, grid).item() == pytest.approx(1, abs=1e-6)
    share = density.weights[density.nodes < 2.5].sum() / 60
    assert share.item() == pytest.approx(0.6, abs=SIGMAS * math.sqrt(2 * 0.6 * 0.4 / 100 / 60))
    assert density.cumulative(torch.tensor([-1.0, 2.5, 6.0])).tolist() == pytest.approx([0, share.item(), 1])
    peak = smooth[(grid - 0.05).abs().argmin()].item()
    assert peak == pytest.approx(share.item() / (0.3 * math.sqrt(2 * math.pi)), rel=0.02)
    with pytest.raises(ValueError, match="width=0"):
        density.density(grid, 0.0)


# --- Hutchinson ----------------------------------------------------------------------------------------------------


def test_hutchinson_has_its_variance() -> None:
    """One probe has variance 2 sum_{i != j} A_ij^2; a diagonal matrix is exact with two."""
    A, _ = symmetric(torch.linspace(-1, 4, 20))
    found = trace(times(A), randn(20), probes=4000)
    off = A - A.diag().diag()
    assert abs(found.value - A.trace()) <= SIGMAS * found.standard_error
    assert found.standard_error.item() == pytest.approx((2 * off.square().sum() / 4000).sqrt().item(), rel=0.1)
    d = randn(20)
    exact = trace(lambda v: d * v, d, probes=2)
    torch.testing.assert_close(exact.value, d.sum())
    assert exact.standard_error < 1e-14


def test_diagonal_has_its_variance_and_is_exact_for_diagonals() -> None:
    A = randn(15, 15)  # need not be symmetric
    found = diagonal(times(A), randn(15), probes=2000, chunk_size=300)
    off = (A - A.diag().diag()).square().sum(1)
    assert ((found.value - A.diag()).abs() <= SIGMAS * found.standard_error).all()
    torch.testing.assert_close(found.standard_error, (off / 2000).sqrt(), rtol=0.15, atol=0)
    d = randn(15)
    torch.testing.assert_close(diagonal(lambda v: d * v, d, probes=2).value, d)


def test_deflation_is_exact_at_low_rank_and_beats_hutchinson_on_decay() -> None:
    A, _ = symmetric([100.0, 10, -3, 1] + [0.0] * 36)
    found = trace_deflated(times(A), randn(40), probes=15)
    torch.testing.assert_close(found.value.item(), 108.0, rtol=1e-9, atol=1e-9)
    assert found.standard_error < 1e-9
    A, _ = symmetric(torch.arange(1, 101, dtype=torch.float64) ** -2)
    errors = [abs(f(times(A), randn(100), probes=60).value - A.trace()) for f in (trace_deflated, trace)]
    assert errors[0] < 0.1 * errors[1]
    spread = trace_deflated(times(A), randn(100), probes=60)
    assert abs(spread.value - A.trace()) <= SIGMAS * spread.standard_error


# --- on networks, and what all have in common -----------------------------------------------------------------------


def test_of_a_transformer_through_sdpa(network: Network) -> None:
    """Against the dense Hessian."""
    H, matvec = network.hessian, partial(hvp, network.loss, network.params)
    eigenvalues, vectors = torch.linalg.eigh(H)
    found = extreme_eigenvalues(matvec, network.params, steps=60)
    torch.testing.assert_close(found.largest, eigenvalues[-1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.smallest, eigenvalues[0], rtol=1e-6, atol=1e-8)
    assert found.smallest < -1e-3  # the network is not at a minimum: the direction is the negative one
    assert abs(flat(found.smallest_vector) @ vectors[:, 0]) > 1 - 1e-6
    for estimator in (trace, trace_deflated):
        estimate = estimator(matvec, network.params, probes=60, chunk_size=16)
        assert abs(estimate.value - H.trace()) <= SIGMAS * estimate.standard_error
    entries = diagonal(matvec, network.params, probes=200, chunk_size=50)
    off = (H - H.diag().diag()).square().sum(1)
    assert ((flat(entries.value) - H.diag()).abs() <= 5 * (off / 200).sqrt() + 1e-12).all()
    density = spectral_density(matvec, network.params, steps=15, probes=20)
    square = density.trace_of(torch.square)
    assert abs(square.value - H.square().sum()) <= SIGMAS * square.standard_error


ESTIMATORS = {
    "trace": lambda f, like, **k: trace(f, like, probes=7, **k),
    "trace_deflated": lambda f, like, **k: trace_deflated(f, like, probes=7, **k),
    "diagonal": lambda f, like, **k: diagonal(f, like, probes=7, **k),
    "density": lambda f, like, **k: spectral_density(f, like, probes=7, steps=3, **k).trace_of(torch.square),
}


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=list(ESTIMATORS))
def test_chunks_seeds_and_generators(estimator: Any) -> None:
    A = symmetric(torch.linspace(1, 2, 9))[0]
    state = torch.get_rng_state()
    whole = estimator(times(A), randn(9))
    for chunk_size in (1, 2, 7, 100):
        torch.testing.assert_close(estimator(times(A), randn(9), chunk_size=chunk_size), whole)
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(estimator(times(A), randn(9), seed=generator), whole, rtol=0, atol=0)
    again = estimator(times(A), randn(9), seed=generator)
    assert not torch.equal(again.value, whole.value)
    assert not torch.equal(estimator(times(A), randn(9), seed=1).value, whole.value)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=list(ESTIMATORS))
def test_one_at_a_time_needs_no_vmap_and_returns_constants(estimator: Any) -> None:
    A = symmetric(torch.linspace(1, 2, 9))[0].requires_grad_()

    def on_the_host(v: Tensor) -> Tensor:
        return A @ v + 0 * v.sum().item()

    result = estimator(on_the_host, randn(9), chunk_size=1)
    assert not result.value.requires_grad
    with pytest.raises(RuntimeError, match="item"):
        estimator(on_the_host, randn(9))


def test_pytrees_and_float32() -> None:
    like = {"a": torch.zeros(2, 3), "b": [torch.zeros(()), torch.zeros(4)]}
    scale = {"a": 2.0, "b": [3.0, -1.0]}

    def matvec(t: Any) -> Any:
        return {"a": scale["a"] * t["a"], "b": [s * x for s, x in zip(scale["b"], t["b"], strict=True)]}  # type: ignore

    assert trace(matvec, like).value.item() == pytest.approx(12 + 3 - 4)
    entries = diagonal(matvec, like).value
    assert entries["b"][0].shape == ()
    assert (entries["a"] == 2).all()
    found = extreme_eigenvalues(matvec, like, steps=11)
    assert found.smallest.item() == pytest.approx(-1, abs=1e-5)
    assert found.largest.item() == pytest.approx(3, abs=1e-5)
    assert found.largest.dtype == torch.float32
    assert found.smallest_vector["b"][1].shape == (4,)


def test_what_does_not_fit_is_named() -> None:
    x = torch.randn(3)
    with pytest.raises(ValueError, match="pytree of tensors with at least one entry; given no leaves"):
        trace(lambda v: v, {})
    with pytest.raises(ValueError, match=r"one device; given torch\.float32 on cpu, torch\.float64 on cpu"):
        trace(lambda v: v, [x, x.double()])
    with pytest.raises(ValueError, match=r"value of matvec must be a pytree .* with shapes \[\(3,\)\]"):
        trace(lambda v: v[:2], x)
    with pytest.raises(ValueError, match="probes=1: give an integer of at least 2"):
        diagonal(lambda v: v, x, probes=1)
    with pytest.raises(ValueError, match="steps=0"):
        extreme_eigenvalues(lambda v: v, x, steps=0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        spectral_density(lambda v: v, x, chunk_size=0)
    with pytest.raises(TypeError, match=r"seed='a'"):
        trace(lambda v: v, x, seed="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinite"):
        extreme_eigenvalues(lambda v: v * float("nan"), x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        spectral_density(lambda v: v * float("inf"), x)
