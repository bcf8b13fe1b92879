"""Products with positive semidefinite relatives of the Hessian: Gauss-Newton and Fisher matrices, on pytrees.

For a model params -> outputs with Jacobian J and a loss outputs -> scalar with Hessian H_L,

    Hessian of loss(model(params)) = J' H_L J + sum_i (dL/d outputs_i) (Hessian of outputs_i),

and the first term is the (generalised) Gauss-Newton matrix (Schraudolph, Neural Computation 14 (2002) 1723). The Fisher
matrix E_{y ~ model} [grad log p(y) grad log p(y)'] is J' F_L J with F_L the Fisher matrix of the outputs' likelihood;
where the outputs are natural parameters (logits; the mean of a Gaussian) the two agree (Martens 2020, arXiv 1412.1193).

Each product is one forward mode pass, a product in the space of outputs, and one reverse mode pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from theria.curvature.hvp import _check_direction, hvp
from theria.curvature.second_order import second_order

ModelFn = Callable[[Any], Any]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class Categorical:
    """Outputs are logits (..., C): p(y) = softmax(logits)_y."""

    def product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """(diag(p) - p p') t for each row."""
        p = torch.softmax(outputs, -1)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))


@dataclass(frozen=True)
class Gaussian:
    """Outputs are means (..., D) of normal distributions with covariance `variance` times the identity."""

    variance: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.variance < float("inf"):
            raise ValueError(f"variance={self.variance}: give a positive finite number.")

    def product(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """t / variance."""
        return tangent / self.variance


def gauss_newton_product(
    model_fn: ModelFn,
    loss_fn: Callable[[Any], Tensor],
    params: Any,
    v: Any,
    *,
    chunk_size: int | None = None,
) -> Any:
    """J' H_L J v. Positive semidefinite where the loss is convex in the outputs, which is not checked.

    Args:
        model_fn: params -> outputs, a pytree of floating tensors.
        loss_fn: outputs -> scalar.
        params, v, chunk_size: as in :func:`theria.hvp`; `v` may be a batch of directions.

    Raises:
        ValueError, TypeError: as :func:`theria.hvp`; outputs that are no floating tensors.
    """
    return _through(model_fn, lambda outputs, t: hvp(loss_fn, outputs, t), params, v, chunk_size)


def fisher_product(
    model_fn: Callable[[Any], Tensor],
    likelihood: Categorical | Gaussian,
    params: Any,
    v: Any,
    *,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> Any:
    """F v with the true Fisher matrix: the expectation over labels drawn from the model, in closed form.

    Args:
        model_fn: params -> outputs (..., C). Each row of the last dimension is one distribution: the means of a batch
            of scalar regressions are (n, 1).
        likelihood: what the outputs parametrise.
        reduction: the mean or the sum over the distributions.
        params, v, chunk_size: as in :func:`theria.hvp`.

    Raises:
        ValueError, TypeError: as :func:`theria.hvp`; outputs that are no single tensor with a last dimension.
    """
    if not isinstance(likelihood, Categorical | Gaussian):
        raise TypeError(f"likelihood={likelihood!r}: give Categorical() or Gaussian(variance).")
    _check_reduction(reduction)

    def product(outputs: Any, tangent: Any) -> Tensor:
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise ValueError(f"model_fn returned {given}; a tensor (..., C) is needed, one distribution in each row.")
        count = outputs.shape[:-1].numel() if reduction == "mean" else 1
        return likelihood.product(outputs, tangent) / count

    return _through(model_fn, product, params, v, chunk_size)


def empirical_fisher_product(
    losses_fn: Callable[[Any], Tensor],
    params: Any,
    v: Any,
    *,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> Any:
    """E v, E the mean (or sum) of g_i g_i' with g_i the gradient of the loss of example i at its observed label.

    It is not the Fisher matrix, and does not approach it or the Hessian unless the model fits the data well
    (Kunstner, Balles and Hennig 2019, arXiv 1905.12558); `fisher_product` is the Fisher matrix.

    Args:
        losses_fn: params -> (n,), the loss of each example, unreduced.
        reduction: the mean or the sum over the examples.
        params, v, chunk_size: as in :func:`theria.hvp`.

    Raises:
        ValueError, TypeError: as :func:`theria.hvp`; losses that are no vector.
    """
    _check_reduction(reduction)

    def product(losses: Any, tangent: Any) -> Tensor:
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"losses_fn returned {given}; one loss an example (n,) is needed: reduction='none'.")
        return tangent / len(losses) if reduction == "mean" else tangent

    return _through(losses_fn, product, params, v, chunk_size)


def _through(model_fn: ModelFn, product: Callable[[Any, Any], Any], params: Any, v: Any, chunk_size: int | None) -> Any:
    """J' product(outputs, J v)."""
    batched = _check_direction(params, v, chunk_size)

    def model(p: Any) -> Any:
        outputs = second_order(model_fn)(p)
        leaves = tree_leaves(outputs)
        if not leaves or not all(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
            kinds = sorted({str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in leaves})
            raise TypeError(f"the model must return floating tensors; given {', '.join(kinds) or 'no leaves'}.")
        return outputs

    outputs, pull = vjp(model, params)[:2]

    def one(u: Any) -> Any:
        tangent = jvp(model, (params,), (u,))[1]
        return pull(product(outputs, tangent))[0]

    return vmap(one, chunk_size=chunk_size)(v) if batched else one(v)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} is not known; needed is 'mean' or 'sum'.")
