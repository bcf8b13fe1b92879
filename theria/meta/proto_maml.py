"""Proto-MAML: MAML whose classifier starts from class prototypes (Triantafillou et al. 2020, arXiv 1903.03096)."""

from typing import Any

from torch import Tensor, nn

from theria.meta.adjoint import Adjoint
from theria.meta.checks import Adapt
from theria.meta.functional import Predictor
from theria.meta.learner import LossFn
from theria.meta.optimisers import InnerOptimiser, Params
from theria.meta.protonet import class_means
from theria.meta.task_head import BIAS, WEIGHT, TaskHeadLearner


class ProtoMAML(TaskHeadLearner):
    """A prototypical network whose classifier, and embedding, take gradient steps on the support set.

    The softmax of -|f(x) - c_k|^2 over k is that of the linear classifier with (section 3 of the paper)

        w_k = 2 c_k,   b_k = -|c_k|^2,   c_k = mean of f(x) over the support of class k,

    because |f(x)|^2 is the same for every class. So without a step this is `ProtoNet`, and the inner steps go on from
    there. c_k is a function of the initial parameters of f: the outer gradient passes through the classifier's start
    as it passes through that of every adapted parameter, exactly or as the adjoint approximates it.

    Args:
        adapt: what the inner steps change; "head" alone by default.
    The others, and what `adapt` returns: see `TaskHeadLearner`.
    """

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn | None = None,
        inner: InnerOptimiser | None = None,
        steps: int = 5,
        adjoint: Adjoint | None = None,
        adapt: Adapt = "head",
        *,
        ways: int,
        **options: Any,
    ) -> None:
        super().__init__(model, loss_fn, inner, steps, adjoint, adapt, ways=ways, **options)

    def _head_start(self, h: Tensor, member: Tensor) -> Params:
        means = class_means(h, member)
        return {WEIGHT: 2 * means, BIAS: -means.square().sum(-1)}
