"""Prototypical networks (Snell, Swersky and Zemel 2017, arXiv 1703.05175)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theria.meta.checks import Count, check_embedding, check_every_class
from theria.meta.functional import Predictor, in_full, one_hot
from theria.meta.learner import Learner, LossFn
from theria.meta.optimisers import Params


class ProtoNet(Learner):
    """Classifies a query by its distance to the mean embedding of each class: no inner optimisation at all.

    c_k = mean of f(x) over the support of class k (equation 1), logit_k = -|f(x) - c_k|^2, whose softmax is the
    probability of class k (equation 2). The softmax is that of the linear classifier 2 c_k . f(x) - |c_k|^2
    (section 2.4), so that a prototypical network is a closed-form head on an embedding.

    Args:
        model: the embedding f: an `nn.Module` x (B, *x) -> (B, d), or a pure function with `params`.
        loss_fn: of logits (Q, ways) and labels; default cross-entropy, the paper's.
        ways: number of classes of a task; labels are integers in [0, ways), each in the support set.
    The others: see `Learner`. There are no inner steps: `adapt` and `predict` take no `steps`.

    `adapt` returns {"prototypes": c}, (ways, d).
    """

    ways = Count()

    def __init__(
        self, model: nn.Module | Predictor, loss_fn: LossFn | None = None, *, ways: int, **options: Any
    ) -> None:
        super().__init__(model, F.cross_entropy if loss_fn is None else loss_fn, **options)
        self.ways = ways

    def _adapt(self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor, steps: int) -> Params:
        member = one_hot(y, self.ways)
        check_every_class(member, y)
        h = check_embedding(self._function(self._theta(meta_params), x), x)
        return {"prototypes": class_means(h, member)}

    def _predict(self, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor) -> Tensor:
        h = self._function(self._theta(meta_params), x)
        return -squared_distances(h, adapted["prototypes"])


@in_full
def class_means(h: Tensor, member: Tensor) -> Tensor:
    """h (S, d), member (S, ways) bool -> (ways, d)."""
    return (member.to(h.dtype) / member.sum(0)).T @ h


@in_full
def squared_distances(h: Tensor, centres: Tensor) -> Tensor:
    """h (Q, d), centres (ways, d) -> (Q, ways)."""
    return torch.sum((h[:, None] - centres).square(), -1)
