"""R2-D2: a ridge regressor as the head (Bertinetto et al. 2019, arXiv 1805.08136)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from theria.meta.checks import CountOrNone, check_classes, check_embedding, check_positive
from theria.meta.functional import Predictor, in_full, one_hot
from theria.meta.learner import Learner, LossFn
from theria.meta.optimisers import Params


class R2D2(Learner):
    """Fits a linear head to the support set exactly and differentiates the fit.

    With X (S, d) the embeddings and Y (S, c) the targets of the support set (section 3.2 of the paper),

        W = argmin |X W - Y|^2 + lambda |W|^2 = (X'X + lambda I)^-1 X'Y = X' (XX' + lambda I)^-1 Y,

    the last by Woodbury's identity: the smaller of the two systems is solved. The prediction of a query is
    alpha f(x) W + beta; lambda, alpha and beta are learned with the embedding.

    Args:
        model: the embedding f: an `nn.Module` x (B, *x) -> (B, d), or a pure function with `params`.
        loss_fn: (prediction, target) -> scalar; cross-entropy or the mean squared error.
        ways: number of classes: Y is one-hot. None: regression on float targets, Y = support_y (S, c) or (S,).
        ridge: where lambda begins. It is learned as "log_ridge", so that it stays positive.
    The others: see `Learner`. There are no inner steps: `adapt` and `predict` take no `steps`.

    `adapt` returns {"weight": W}, (d, c); (d,) where the targets are (S,).
    """

    ways = CountOrNone()

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn,
        *,
        ways: int | None = None,
        ridge: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn, **options)
        self.ways = ways
        like = next((p.detach() for p in self.parameters()), torch.zeros(()))
        self.log_ridge = nn.Parameter(like.new_tensor(math.log(check_positive("ridge", ridge, "lambda"))))
        self.alpha, self.beta = nn.Parameter(like.new_ones(())), nn.Parameter(like.new_zeros(()))

    def _adapt(self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor, steps: int) -> Params:
        h = check_embedding(self._function(self._theta(meta_params), x), x)
        weight = ridge_regression(h, self._targets(y, h), meta_params["log_ridge"].exp())
        return {"weight": weight.squeeze(-1) if self.ways is None and y.ndim == 1 else weight}

    def _targets(self, y: Tensor, h: Tensor) -> Tensor:
        """Y, with one column for targets without a last dimension."""
        if self.ways is None:
            if y.ndim > 2 or not y.is_floating_point():
                raise ValueError(
                    f"support_y has shape {tuple(y.shape)}, {y.dtype}: regression takes floats (S,) or (S, c) in a "
                    f"task; for class labels give ways"
                )
            return y if y.ndim == 2 else y.unsqueeze(-1)
        member = one_hot(y, self.ways)
        check_classes(member, y)
        return member.to(h.dtype)

    def _predict(self, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor) -> Tensor:
        h = self._function(self._theta(meta_params), x)
        return meta_params["alpha"] * in_full(torch.matmul)(h, adapted["weight"]) + meta_params["beta"]


@in_full
def ridge_regression(x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
    """argmin_W |x W - y|^2 + strength |W|^2 for x (S, d), y (S, c) -> (d, c), by a system of size min(S, d)."""
    s, d = x.shape
    gram = x @ x.T if s < d else x.T @ x
    system = gram + strength * torch.eye(min(s, d), dtype=x.dtype, device=x.device)
    return x.T @ _solve_definite(system, y) if s < d else _solve_definite(system, x.T @ y)


def _solve_definite(A: Tensor, b: Tensor) -> Tensor:
    """A^-1 b by Cholesky, NaN where A is not positive definite.

    Not `torch.linalg.solve`: see NOTE [PyTorch's solve and determinants over forward mode] in `theria.curvature.dense`.
    Not `torch.cholesky_solve`: of a batch on a GPU it is MAGMA's, which aborts the process inside a CUDA graph.
    """
    factor, info = torch.linalg.cholesky_ex(A)
    factor = torch.where(info == 0, factor, torch.full_like(factor, float("nan")))
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
