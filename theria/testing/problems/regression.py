"""Hyperparameters of ridge regression, and weights of training samples whose labels may be wrong."""

from dataclasses import dataclass

import torch
from torch import Tensor

from theria.testing.problems.problem import Device, Problem, Samples, generator, in_float64, normal, rounded


def ridge(
    seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu", *, per_feature: bool = False
) -> Problem:
    """The penalty of ridge regression, or one for each feature, by the error on a validation set.

    g = mean r^2 / 2 + l |w|^2 / 2 (per feature: sum_j l_j w_j^2 / 2) on n training samples, f = mean r^2 / 2 on the
    validation set. With P = X'X + n diag(l): w = P^-1 X'y, dw/dl_j = -n P^-1 e_j w_j, dw/dl their sum = -n P^-1 w.
    """
    n, p, source = 40, 6, generator(seed)
    truth = normal(source, p) * torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
    X, Xv = normal(source, n, p), normal(source, n, p)
    y, yv = X @ truth + normal(source, n), Xv @ truth + normal(source, n)
    outer0 = torch.rand(p, generator=source, dtype=torch.float64) + 0.2
    working, exact = rounded([X, y, Xv, yv, outer0 if per_feature else outer0[0]], dtype, device)
    (X, y, Xv, yv, outer0), (X64, y64, Xv64, yv64, l64) = working, exact

    def normal_matrix(l: Tensor) -> Tensor:
        return X64.T @ X64 + n * torch.diag(l.expand(p))

    def solution(l: Tensor) -> Tensor:
        return torch.linalg.solve(normal_matrix(l), X64.T @ y64)

    def gradient(l: Tensor) -> Tensor:
        w = solution(l)
        d_w = Xv64.T @ (Xv64 @ w - yv64) / n
        each = -n * torch.linalg.solve(normal_matrix(l), d_w) * w  # P is symmetric
        return each if per_feature else each.sum()

    def inner_loss(w: Tensor, l: Tensor) -> Tensor:
        return (X @ w - y).square().mean() / 2 + (l * w.square()).sum() / 2

    eigenvalues = torch.linalg.eigvalsh(normal_matrix(l64)) / n
    return Problem(
        name="ridge_per_feature" if per_feature else "ridge",
        inner_loss=inner_loss,
        outer_loss=lambda w, l: (Xv @ w - yv).square().mean() / 2,
        inner0=torch.zeros_like(X[0]),
        outer0=outer0,
        inner_solution=in_float64(solution),
        hypergradient=in_float64(gradient),
        least=float(eigenvalues[0]),
        largest=float(eigenvalues[-1]),
    )


def ridge_per_feature(seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu") -> Problem:
    """`ridge` with one penalty for each feature."""
    return ridge(seed, dtype, device, per_feature=True)


def _classes(source: torch.Generator, n: int, p: int, k: int, wrong: float) -> tuple[Tensor, Tensor]:
    """n samples of k Gaussian classes in p dimensions, one-hot labels of which a share is drawn again."""
    labels = torch.arange(n) % k
    X = normal(source, n, p) + 2 * torch.eye(k, p, dtype=torch.float64)[labels]
    redrawn = torch.rand(n, generator=source) < wrong
    labels = torch.where(redrawn, torch.randint(k, (n,), generator=source), labels)
    return X, torch.eye(k, dtype=torch.float64)[labels]


def least_squares_cleaning(seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu") -> Problem:
    """Data hyper-cleaning with squared error, which has a closed form: x holds one weight s(x_i) for a training sample.

    g = mean s(x_i) |W'a_i - y_i|^2 / 2 + c |W|^2 / 2, f = mean |W'b_j - y_j|^2 / 2 on clean data, s the sigmoid. With
    P = A'diag(s)A / n + c I: W = P^-1 A'diag(s)Y / n, V = -P^-1 df/dW, dh/dx_i = s'(x_i) / n (W'a_i - y_i)'(V'a_i).
    """
    n, m, p, k, c, source = 30, 24, 5, 3, 0.1, generator(seed)
    (A, Y), (B, Z) = _classes(source, n, p, k, 0.3), _classes(source, m, p, k, 0.0)
    working, exact = rounded([A, Y, B, Z, normal(source, n)], dtype, device)
    (A, Y, B, Z, outer0), (A64, Y64, B64, Z64, x64) = working, exact

    def matrix(x: Tensor) -> Tensor:
        return (A64.T * x.sigmoid()) @ A64 / n + c * torch.eye(p).to(A64)

    def solution(x: Tensor) -> Tensor:
        return torch.linalg.solve(matrix(x), (A64.T * x.sigmoid()) @ Y64 / n)

    def gradient(x: Tensor) -> Tensor:
        W, s = solution(x), x.sigmoid()
        V = -torch.linalg.solve(matrix(x), B64.T @ (B64 @ W - Z64) / m)
        return s * (1 - s) / n * ((A64 @ W - Y64) * (A64 @ V)).sum(1)

    def inner_loss(W: Tensor, x: Tensor) -> Tensor:
        return (x.sigmoid() * (A @ W - Y).square().sum(1)).mean() / 2 + c * W.square().sum() / 2

    eigenvalues = torch.linalg.eigvalsh(matrix(x64))
    return Problem(
        name="least_squares_cleaning",
        inner_loss=inner_loss,
        outer_loss=lambda W, x: (B @ W - Z).square().sum(1).mean() / 2,
        inner0=torch.zeros(p, k).to(A),
        outer0=outer0,
        inner_solution=in_float64(solution),
        hypergradient=in_float64(gradient),
        least=float(eigenvalues[0]),
        largest=float(eigenvalues[-1]),
    )


@dataclass(frozen=True)
class _Cleaning:
    """The exact answers of `hyper_cleaning`: A (n, p), Y (n, k), B (m, p), Z (m, k) in float64, W (p, k)."""

    A: Tensor
    Y: Tensor
    B: Tensor
    Z: Tensor
    penalty: float

    def hessian(self, W: Tensor, s: Tensor) -> Tensor:
        """(pk, pk): mean of s_i a_i a_i' (x) (diag(q_i) - q_i q_i'), plus 2c I, with q the probabilities."""
        q = (self.A @ W).softmax(1)
        inner = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
        H = torch.einsum("i,ij,ikm,il->jklm", s, self.A, inner, self.A).reshape(2 * (W.numel(),)) / len(q)
        return H + 2 * self.penalty * torch.eye(W.numel()).to(H)

    def inverse_hessian(self, W: Tensor, s: Tensor, right: Tensor) -> Tensor:
        return torch.linalg.solve(self.hessian(W, s), right.reshape(-1)).reshape(W.shape)

    def solution(self, x: Tensor) -> Tensor:
        """By Newton's method from 0: the third derivative is small beside 2c, so that full steps converge."""
        W, s = torch.zeros(self.A.shape[1], self.Y.shape[1]).to(self.A), x.sigmoid()
        for _ in range(30):
            gradient = (self.A.T * s) @ _residual(self.A @ W, self.Y) / len(s) + 2 * self.penalty * W
            W = W - self.inverse_hessian(W, s, gradient)
        return W

    def hypergradient(self, x: Tensor) -> Tensor:
        W, s = self.solution(x), x.sigmoid()
        V = -self.inverse_hessian(W, s, self.B.T @ _residual(self.B @ W, self.Z) / len(self.B))
        return s * (1 - s) / len(s) * (_residual(self.A @ W, self.Y) * (self.A @ V)).sum(1)


def _cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    return -(logits.log_softmax(-1) * targets).sum(-1)


def _residual(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.softmax(1) - targets


def hyper_cleaning(seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu") -> Problem:
    """Data hyper-cleaning with softmax regression, as in benchmark_bilevel and Dagréou et al. 2022 (section 4).

    g = mean s(x_i) ce(W'a_i, y_i) + c |W|^2 on training data with wrong labels, f = mean ce on clean data. W* has no
    closed form: it is found by Newton's method to the last bit of float64, and with V = -H^-1 df/dW from the dense
    Hessian and q the probabilities, dh/dx_i = s'(x_i) / n (q_i - y_i)'(V'a_i).
    """
    n, m, p, k, c, source = 30, 24, 5, 3, 0.2, generator(seed)
    drawn = [*_classes(source, n, p, k, 0.3), *_classes(source, m, p, k, 0.0), normal(source, n)]
    (A, Y, B, Z, outer0), (A64, Y64, B64, Z64, x64) = rounded(drawn, dtype, device)
    truth = _Cleaning(A64, Y64, B64, Z64, c)

    def inner_sample(W: Tensor, x: Tensor, i: Tensor) -> Tensor:
        return (x[i].sigmoid() * _cross_entropies(A[i] @ W, Y[i])).mean() + c * W.square().sum()

    weighted = (truth.A.T * x64.sigmoid()) @ truth.A / n
    return Problem(
        name="hyper_cleaning",
        inner_loss=lambda W, x: (x.sigmoid() * _cross_entropies(A @ W, Y)).mean() + c * W.square().sum(),
        outer_loss=lambda W, x: _cross_entropies(B @ W, Z).mean(),
        inner0=torch.zeros(p, k).to(outer0),
        outer0=outer0,
        inner_solution=in_float64(truth.solution),
        hypergradient=in_float64(truth.hypergradient),
        least=2 * c,
        largest=float(torch.linalg.eigvalsh(weighted)[-1]) / 2 + 2 * c,  # diag(q) - qq' <= 1/2, at every W
        samples=Samples(inner_sample, lambda W, x, j: _cross_entropies(B[j] @ W, Z[j]).mean(), n, m),
    )
