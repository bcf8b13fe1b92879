"""MAML++ (Antoniou, Edwards and Storkey 2019, arXiv 1810.09502)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from theria.meta.adjoint import Adjoint, Context, FirstOrder, InnerLoss, Unrolled
from theria.meta.checks import Adapt, check_epochs, check_start, check_weights
from theria.meta.functional import Predictor
from theria.meta.learner import GradientLearner, LossFn
from theria.meta.optimisers import SGD, InnerOptimiser, Params
from theria.meta.values import check_steps


class MAMLPlusPlus(GradientLearner):
    """MAML made stable: the five of the paper's six changes (section 4) that concern a task.

    1. Multi-step loss: sum over t = 1 .. T of v_t times the query loss at theta_t. The weights begin equal and are
       annealed to (0, .., 0, 1), which is MAML, over the first `multi_step_epochs` epochs (`multi_step_weights`).
    2. Derivative-order annealing: first order in the first `first_order_epochs` epochs, then `adjoint`.
    3. A learned rate for each layer and inner step: the default `inner`, meta-parameters "rates.lr.<name>", (T,).
    4. and 5. Batch statistics and biases for each step: BatchNorm here normalises each forward by its own batch, hence
       by the statistics of its step; weights and biases are shared between the steps, but adapted in each.
    6. The cosine schedule of the outer rate is the trainer's.

    What is annealed follows `learner.epoch`, which the training loop sets (0 at first) and `state_dict` keeps; after
    both periods it has no effect. The values of `predict` and `adapt` do not depend on it.

    Args:
        inner: the inner optimiser; default SGD([0.1] * steps, learn_lr="tensor").
        steps: number of inner steps T.
        multi_step_epochs, first_order_epochs: the periods of 1 and 2; 0 for none. The paper has 500 outer steps in an
            epoch.
        weights: v_1 .. v_T, fixed, instead of the annealed ones.
    The others: see `MAML`.
    """

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn,
        inner: InnerOptimiser | None = None,
        steps: int = 5,
        adjoint: Adjoint | None = None,
        adapt: Adapt = None,
        *,
        multi_step_epochs: int = 15,
        first_order_epochs: int = 50,
        weights: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        inner = SGD([0.1] * check_steps(steps, least=1), learn_lr="tensor") if inner is None else inner
        super().__init__(model, loss_fn, inner, steps, Unrolled() if adjoint is None else adjoint, **options)
        self._choose(adapt)
        check_start(self.adjoint, learned=self._learns_more)
        check_epochs(multi_step_epochs=multi_step_epochs, first_order_epochs=first_order_epochs)
        self.multi_step_epochs, self.first_order_epochs = multi_step_epochs, first_order_epochs
        self.weights = None if weights is None else check_weights(weights, steps)
        self.epoch = 0

    def get_extra_state(self) -> int:
        return self.epoch

    def set_extra_state(self, state: int) -> None:
        self.epoch = state

    def _problem(
        self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[InnerLoss, Params, Context, Params]:
        initial, fixed = self._split(meta_params)
        return self._support_loss, initial, self._context(fixed, x, y), fixed

    def _task_loss(self, meta_params: Mapping[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        weights = self.weights or multi_step_weights(self.steps, self.epoch, self.multi_step_epochs)
        if not any(weights[:-1]):  # the path is not needed
            return weights[-1] * self._query_loss(meta_params, self._adapt(meta_params, sx, sy, self.steps), qx, qy)
        path = self._trajectory(meta_params, sx, sy, self.steps)
        losses = [
            v * self._query_loss(meta_params, theta, qx, qy) for v, theta in zip([0, *weights], path, strict=True) if v
        ]
        return torch.stack(losses).sum()

    @property
    def _adjoint(self) -> Adjoint:
        """How this epoch differentiates the inner loop."""
        return FirstOrder() if self.epoch < self.first_order_epochs else self.adjoint


def multi_step_weights(steps: int, epoch: int, epochs: int) -> list[float]:
    """v_1 .. v_T: 1/T each at epoch 0, falling linearly to 0 at `epochs` for all but the last; their sum is 1."""
    early = max(0.0, 1 - epoch / epochs) / steps if epochs > 0 else 0.0
    return [early] * (steps - 1) + [1 - early * (steps - 1)]
