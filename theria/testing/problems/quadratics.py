"""Quadratic bilevel problems: everything is a linear system.

g(z, x) = z'Hz/2 + x'Bx/2 + x'Cz + c'z + d'x, and f of the same form (H~, B~, C~, c~, d~). So
z*(x) = -H^-1 (c + C'x), v = -H^-1 (H~z* + C~'x + c~), dh/dx = B~x + C~z* + d~ + C v.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from theria.testing.problems.problem import Device, Problem, Samples, generator, in_float64, normal, rounded, spd


@dataclass(frozen=True)
class Quadratic:
    """z'Hz/2 + x'Bx/2 + x'Cz + c'z + d'x; H (p, p), B (q, q), C (q, p), c (p,), d (q,), or each with a leading n."""

    H: Tensor
    B: Tensor
    C: Tensor
    c: Tensor
    d: Tensor

    @property
    def parts(self) -> list[Tensor]:
        return [self.H, self.B, self.C, self.c, self.d]

    def loss(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.H @ z / 2 + x @ self.B @ x / 2 + x @ self.C @ z + self.c @ z + self.d @ x

    def of(self, index: Tensor) -> "Quadratic":
        """The mean over some samples; of one sample where `index` is a scalar."""
        if index.ndim == 0:
            index = index[None]
        return Quadratic(*(part[index].mean(0) for part in self.parts))

    def sample_loss(self, z: Tensor, x: Tensor, index: Tensor) -> Tensor:
        return self.of(index).loss(z, x)

    def mean(self) -> "Quadratic":
        return Quadratic(*(part.mean(0) for part in self.parts))

    def d_inner(self, z: Tensor, x: Tensor) -> Tensor:
        return self.H @ z + self.C.T @ x + self.c

    def d_outer(self, z: Tensor, x: Tensor) -> Tensor:
        return self.B @ x + self.C @ z + self.d


def _inner_solution(g: Quadratic, x: Tensor) -> Tensor:
    return -torch.linalg.solve(g.H, g.c + g.C.T @ x)


def _hypergradient(g: Quadratic, f: Quadratic, x: Tensor) -> Tensor:
    z = _inner_solution(g, x)
    return f.d_outer(z, x) - g.C @ torch.linalg.solve(g.H, f.d_inner(z, x))


def _outer_solution(g: Quadratic, f: Quadratic) -> Tensor:
    """dh/dx is affine in x: its zero."""
    zero = torch.zeros_like(f.d)
    at_zero = _hypergradient(g, f, zero)
    columns = [_hypergradient(g, f, e) - at_zero for e in torch.eye(len(zero)).to(zero)]
    return torch.linalg.solve(torch.stack(columns, 1), -at_zero)


def _problem(
    name: str, inner: Quadratic, outer: Quadratic, outer0: Tensor, dtype: torch.dtype, device: Device
) -> Problem:
    """The problem of two quadratics in float64, or of the means over their samples."""
    working, exact = rounded([*inner.parts, *outer.parts, outer0], dtype, device)
    g, f, stacked = Quadratic(*exact[:5]), Quadratic(*exact[5:10]), inner.H.ndim == 3
    sampled_g, sampled_f = Quadratic(*working[:5]), Quadratic(*working[5:10])
    mean_g, mean_f, samples = sampled_g, sampled_f, None
    if stacked:
        g, f, mean_g, mean_f = g.mean(), f.mean(), sampled_g.mean(), sampled_f.mean()
        samples = Samples(sampled_g.sample_loss, sampled_f.sample_loss, len(inner.H), len(outer.H))
    eigenvalues = torch.linalg.eigvalsh(g.H)
    return Problem(
        name=name,
        inner_loss=mean_g.loss,
        outer_loss=mean_f.loss,
        inner0=torch.zeros_like(mean_g.c),
        outer0=working[10],
        inner_solution=in_float64(lambda x: _inner_solution(g, x)),
        hypergradient=in_float64(lambda x: _hypergradient(g, f, x)),
        least=float(eigenvalues[0]),
        largest=float(eigenvalues[-1]),
        outer_solution=_outer_solution(g, f).to(working[10]),
        samples=samples,
    )


def textbook(seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu") -> Problem:
    """g = z' diag(1, 4) z / 2 - x'z, f = |z - 1|^2 / 2 at x = (1, 1): z* = (1, 1/4), dh/dx = (0, -3/16). No seed."""
    eye, zeros = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    inner = Quadratic(torch.diag(torch.tensor([1.0, 4.0])).double(), 0 * eye, -eye, zeros, zeros)
    # |z - 1|^2 / 2 without its constant: z'z/2 - 1'z.
    outer = Quadratic(eye, 0 * eye, 0 * eye, zeros - 1, zeros)
    return _problem("textbook", inner, outer, zeros + 1, dtype, device)


def quadratic(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
    *,
    inner_dim: int = 20,
    outer_dim: int = 10,
    condition: float = 10.0,
) -> Problem:
    """Two random quadratics; the inner Hessian has the condition number `condition`. h is strongly convex."""
    source = generator(seed)
    inner, outer = _pair(source, inner_dim, outer_dim, 1 / condition, 1.0)
    return _problem("quadratic", inner, outer, normal(source, outer_dim), dtype, device)


def _pair(source: torch.Generator, p: int, q: int, least: float, largest: float) -> tuple[Quadratic, Quadratic]:
    """h is strongly convex, since |C~| |dz*/dx| <= 0.2 |C| / least < least eigenvalue of B~ / 2 by the scales below."""

    def cross(size: float) -> Tensor:
        drawn = normal(source, q, p)
        return size * drawn / torch.linalg.matrix_norm(drawn, 2)

    inner = Quadratic(
        spd(source, p, least, largest), spd(source, q, 0.1, 1), cross(2 * least), normal(source, p), normal(source, q)
    )
    outer = Quadratic(spd(source, p, 0.1, 1), spd(source, q, 1, 2), cross(0.2), normal(source, p), normal(source, q))
    return inner, outer


def benchmark_quadratic(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: Device = "cpu",
    *,
    inner_dim: int = 20,
    outer_dim: int = 10,
    n_inner: int = 64,
    n_outer: int = 32,
) -> Problem:
    """The simulated problem of benchmark_bilevel: both losses are means over samples of quadratics.

    Every sample has its own symmetric positive definite Hessians, cross term and linear terms; the means have spectra
    that are given (github.com/benchopt/benchmark_bilevel, "Simulated bilevel problem"; Dagréou et al. 2022, section 4).
    The spectra here make h strongly convex.
    """
    source = generator(seed)
    inner, outer = _pair(source, inner_dim, outer_dim, 0.2, 1.0)
    inner, outer = _spread(source, inner, n_inner), _spread(source, outer, n_outer)
    return _problem("benchmark_quadratic", inner, outer, normal(source, outer_dim), dtype, device)


def _spread(source: torch.Generator, mean: Quadratic, n: int) -> Quadratic:
    """n quadratics with that mean."""

    def hessians(target: Tensor) -> Tensor:
        """(n, k, k) of Wishart kind, congruent so that their mean is the target: T W_i T', T mean(W) T' = target."""
        k = len(target)
        roots = normal(source, n, k, 2 * k)
        drawn = roots @ roots.mT
        change = torch.linalg.cholesky(target) @ torch.linalg.inv(torch.linalg.cholesky(drawn.mean(0)))
        return change @ drawn @ change.T

    def around(target: Tensor) -> Tensor:
        noise = normal(source, n, *target.shape)
        return target + 0.1 * (noise - noise.mean(0))

    linear = [around(part) for part in (mean.C, mean.c, mean.d)]
    return Quadratic(hessians(mean.H), hessians(mean.B), *linear)


def neumann(seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu", *, terms: int = 5) -> Problem:
    """K + 1 steps of gradient descent that begin at z*(outer0): their gradient is the Neumann series to the power K.

    dh_K/dx = df/dx - C a sum_{k=0}^{K} (I - a H)^k df/dz with a the rate and K = `terms` (Lorraine et al. 2020,
    arXiv 1911.02590, section 3.1). As K grows it is the hypergradient. `inner_solution` and `hypergradient` hold at any
    x: z after the steps is M^(K+1) z_0 - a sum M^k (c + C'x) with M = I - a H.
    """
    source = generator(seed)
    inner, outer = _pair(source, 12, 6, 0.1, 1.0)
    solved = _problem("neumann", inner, outer, normal(source, 6), dtype, device)
    _, exact = rounded([*inner.parts, *outer.parts], dtype, device)
    g, f = Quadratic(*exact[:5]), Quadratic(*exact[5:])
    inner0 = solved.inner_solution(solved.outer0)
    z0, rate, steps = inner0.double(), solved.rate, terms + 1
    M = torch.eye(len(z0)).to(z0) - rate * g.H
    powers = [torch.linalg.matrix_power(M, k) for k in range(steps + 1)]
    series = rate * torch.stack(powers[:-1]).sum(0)

    def final(x: Tensor) -> Tensor:
        return powers[-1] @ z0 - series @ (g.c + g.C.T @ x)

    def gradient(x: Tensor) -> Tensor:
        z = final(x)
        return f.d_outer(z, x) - g.C @ (series @ f.d_inner(z, x))

    return Problem(
        name="neumann",
        inner_loss=solved.inner_loss,
        outer_loss=solved.outer_loss,
        inner0=inner0,
        outer0=solved.outer0,
        inner_solution=in_float64(final),
        hypergradient=in_float64(gradient),
        least=solved.least,
        largest=solved.largest,
        steps=steps,
    )
