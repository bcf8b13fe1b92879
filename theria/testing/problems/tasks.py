"""Meta-learning on quadratic tasks: task t has support loss p'A_t p / 2 - s_t'p and query loss p'A_t p / 2 - q_t'p.

The inner variable holds the adapted parameters of all tasks, (T, n); the inner loss is the sum over the tasks, so that
each task's gradient is its own; the outer variable is the initialisation (n,); the outer loss is the mean over tasks.
"""

import torch
from torch import Tensor

from theria.testing.problems.problem import Device, Problem, generator, in_float64, normal, rounded, spd

N_TASKS, DIM = 4, 8
LEAST, LARGEST = 0.1, 1.0


def _tasks(source: torch.Generator) -> list[Tensor]:
    """A (T, n, n), s (T, n), q (T, n)."""
    A = torch.stack([spd(source, DIM, LEAST, LARGEST) for _ in range(N_TASKS)])
    return [A, normal(source, N_TASKS, DIM), normal(source, N_TASKS, DIM)]


def _energies(A: Tensor, linear: Tensor, z: Tensor) -> Tensor:
    """(T,): p'A p / 2 - linear'p of each task."""
    return torch.einsum("ti,tij,tj->t", z, A, z) / 2 - (linear * z).sum(-1)


def maml(
    seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu", *, steps: int = 5, rate: float = 0.3
) -> Problem:
    """MAML: z = `steps` steps of gradient descent from the initialisation (Finn et al. 2017, arXiv 1703.03400).

    z_t = M_t^T x + r sum_{k<T} M_t^k s_t with M_t = I - r A_t; dh/dx = mean of (M_t^T)' (A_t z_t - q_t).
    """
    source = generator(seed)
    working, exact = rounded([*_tasks(source), normal(source, DIM)], dtype, device)
    (A, s, q, outer0), (A64, s64, q64, _) = working, exact
    M = torch.eye(DIM).to(A64) - rate * A64
    powers = [torch.linalg.matrix_power(M, k) for k in range(steps + 1)]
    offset = rate * torch.einsum("ktij,tj->ti", torch.stack(powers[:-1]), s64)

    def adapted(x: Tensor) -> Tensor:
        return powers[-1] @ x + offset

    def gradient(x: Tensor) -> Tensor:
        outer = torch.einsum("tij,tj->ti", A64, adapted(x)) - q64
        return torch.einsum("tji,tj->ti", powers[-1], outer).mean(0)

    return Problem(
        name="maml",
        inner_loss=lambda z, x: _energies(A, s, z).sum(),
        outer_loss=lambda z, x: _energies(A, q, z).mean(),
        inner0=outer0.expand(N_TASKS, DIM).clone(),
        outer0=outer0,
        inner_solution=in_float64(adapted),
        hypergradient=in_float64(gradient),
        least=LEAST,
        largest=LARGEST,
        steps=steps,
        start=lambda x: x.expand(N_TASKS, DIM),
        chosen_rate=rate,
    )


def imaml(
    seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu", *, proximal: float = 0.5
) -> Problem:
    """Implicit MAML: z_t = argmin of the support loss + l/2 |z - x|^2 (Rajeswaran et al. 2019, arXiv 1909.04630).

    z_t = (A_t + l I)^-1 (s_t + l x); dh/dx = mean of l (A_t + l I)^-1 (A_t z_t - q_t), their equation 6 in the form
    (I + A_t / l)^-1.
    """
    source = generator(seed)
    working, exact = rounded([*_tasks(source), normal(source, DIM)], dtype, device)
    (A, s, q, outer0), (A64, s64, q64, _) = working, exact
    damped = A64 + proximal * torch.eye(DIM).to(A64)

    def solution(x: Tensor) -> Tensor:
        return torch.linalg.solve(damped, s64 + proximal * x)

    def gradient(x: Tensor) -> Tensor:
        outer = torch.einsum("tij,tj->ti", A64, solution(x)) - q64
        return (proximal * torch.linalg.solve(damped, outer)).mean(0)

    return Problem(
        name="imaml",
        inner_loss=lambda z, x: _energies(A, s, z).sum() + proximal / 2 * (z - x).square().sum(),
        outer_loss=lambda z, x: _energies(A, q, z).mean(),
        inner0=torch.zeros(N_TASKS, DIM).to(outer0),
        outer0=outer0,
        inner_solution=in_float64(solution),
        hypergradient=in_float64(gradient),
        least=LEAST + proximal,
        largest=LARGEST + proximal,
    )
