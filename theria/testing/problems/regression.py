"""Hyperparameters of ridge regression, and weights of training samples whose labels may be wrong."""

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


def hyper_cleaning(seed: int = 0, dtype: torch.dtype = torch.float64, device: Device = "cpu") -> Problem:
    """Data hyper-cleaning with softmax regression, as in benchmark_bilevel and Dagréou et al. 2022 (section 4).

    g = mean s(x_i) ce(W'a_i, y_i) + c |W|^2 on training data with wrong labels, f = mean ce on clean data. W* has no
    closed form: it is found by Newton's method to the last bit of float64 and dh/dx from the dense Hessian,
    H_(jk)(lm) = mean s_i a_ij (q_ik d_km - q_ik q_im) a_il + 2c with q the probabilities; V = -H^-1 df/dW,
    dh/dx_i = s'(x_i) / n (q_i - y_i)'(V'a_i).
    """
    n, m, p, k, c, source = 30, 24, 5, 3, 0.2, generator(seed)
    (A, Y), (B, Z) = _classes(source, n, p, k, 0.3), _classes(source, m, p, k, 0.0)
    working, exact = rounded([A, Y, B, Z, normal(source, n)], dtype, device)
    (A, Y, B, Z, outer0), (A64, Y64, B64, Z64, x64) = working, exact

    def residual(X: Tensor, W: Tensor, targets: Tensor) -> Tensor:
        return (X @ W).softmax(1) - targets

    def hessian(W: Tensor, s: Tensor) -> Tensor:
        q = (A64 @ W).softmax(1)
        inner = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
        H = torch.einsum("i,ij,ikm,il->jklm", s, A64, inner, A64).reshape(p * k, p * k) / n
        return H + 2 * c * torch.eye(p * k).to(H)

    def solve(W: Tensor, s: Tensor, right: Tensor) -> Tensor:
        return torch.linalg.solve(hessian(W, s), right.reshape(-1)).reshape(p, k)

    def solution(x: Tensor) -> Tensor:
        W, s = torch.zeros(p, k).to(A64), x.sigmoid()
        for _ in range(30):  # strongly convex with a small third derivative: full steps converge from 0
            W = W - solve(W, s, (A64.T * s) @ residual(A64, W, Y64) / n + 2 * c * W)
        return W

    def gradient(x: Tensor) -> Tensor:
        W, s = solution(x), x.sigmoid()
        V = -solve(W, s, B64.T @ residual(B64, W, Z64) / m)
        return s * (1 - s) / n * (residual(A64, W, Y64) * (A64 @ V)).sum(1)

    def losses(X: Tensor, targets: Tensor, W: Tensor) -> Tensor:
        return -((X @ W).log_softmax(-1) * targets).sum(-1)

    def inner_loss(W: Tensor, x: Tensor) -> Tensor:
        return (x.sigmoid() * losses(A, Y, W)).mean() + c * W.square().sum()

    def inner_sample(W: Tensor, x: Tensor, i: Tensor) -> Tensor:
        return (x[i].sigmoid() * losses(A[i], Y[i], W)).mean() + c * W.square().sum()

    eigenvalues = torch.linalg.eigvalsh(hessian(solution(x64), x64.sigmoid()))
    return Problem(
        name="hyper_cleaning",
        inner_loss=inner_loss,
        outer_loss=lambda W, x: losses(B, Z, W).mean(),
        inner0=torch.zeros(p, k).to(A),
        outer0=outer0,
        inner_solution=in_float64(solution),
        hypergradient=in_float64(gradient),
        least=2 * c,
        # |X|^2 / 8 bounds the curvature of softmax (q - q^2 <= 1/4, two classes move at most 1/2 of it) on the way too.
        largest=max(float(eigenvalues[-1]), float((A64.T * x64.sigmoid() @ A64 / n).norm(2) / 2 + 2 * c)),
        samples=Samples(inner_sample, lambda W, x, j: losses(B[j], Z[j], W).mean(), n, m),
    )
