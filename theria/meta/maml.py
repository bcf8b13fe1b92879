"""Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400) and its relatives, as one composition.

theta_T(theta_0) = T inner steps on the support loss, and the outer loss is the query loss at theta_T, averaged over
the tasks. The inner optimiser, how the result is differentiated, and which parameters are adapted are arguments.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from theria.meta.adjoint import Adjoint, Context, FirstOrder, InnerLoss, Unrolled
from theria.meta.checks import Adapt, check_start
from theria.meta.functional import Predictor
from theria.meta.learner import GradientLearner, LossFn
from theria.meta.optimisers import SGD, InnerOptimiser, Params


class MAML(GradientLearner):
    """Learns an initialisation from which a few gradient steps on a task's support set do well on its queries.

    Args:
        model: an `nn.Module`, or a pure function `f(params, x)` together with `params`.
        loss_fn: (prediction, target) -> scalar.
        inner: the inner optimiser; `SGD(lr, learn_lr=True)` learns its rates too (Meta-SGD).
        steps: number of inner steps, at least 1.
        adjoint: how the inner solution is differentiated: `Unrolled()`, `MixedMode()`, `FirstOrder()`, `Higher()`, ...
            Implicit ones have no derivative in the initialisation: see `IMAML`.
        adapt: which parameters the inner loop changes: None for all that require grad, a predicate on names, or
            names of parameters or modules; one that modules share has all its names. The others are meta-learned
            only. A module whose `forward(x)` is `after_stem(stem(x))` and says so by these names runs its stem once a
            task where nothing of it is adapted.
        params: the initial parameters of a pure function, by name; an `nn.Parameter` stays the same object, and frozen
            (requires_grad=False) if it is.
        chunk_size: how many tasks run at a time under `vmap`; None for all.
        randomness: what dropout does under `vmap`: "error", "different" masks for each task, or the "same".
        batch_norm: "batch" or "running", see NOTE [buffers are constants] in `theria.meta.functional`.

    The meta-parameters are `dict(learner.named_parameters())`: "model.<name>" (for a pure function "params.<name>")
    and, when rates are learned, "rates.lr.<name>"; in the last two "/" stands for the dots of a name.

    Raises:
        TypeError, ValueError: for arguments that do not fit, before any work.
    """

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn,
        inner: InnerOptimiser | None = None,
        steps: int = 1,
        adjoint: Adjoint | None = None,
        adapt: Adapt = None,
        *,
        params: Params | None = None,
        chunk_size: int | None = None,
        randomness: str = "error",
        batch_norm: str = "batch",
    ) -> None:
        super().__init__(
            model,
            loss_fn,
            SGD(lr=0.01) if inner is None else inner,
            steps,
            Unrolled() if adjoint is None else adjoint,
            params=params,
            chunk_size=chunk_size,
            randomness=randomness,
            batch_norm=batch_norm,
        )
        self._choose(adapt)
        check_start(self.adjoint, learned=self._learns_more)

    def _problem(
        self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[InnerLoss, Params, Context, Params]:
        initial, fixed = self._split(meta_params)
        return self._support_loss, initial, self._context(fixed, x, y), fixed


def FOMAML(
    model: nn.Module | Predictor,
    loss_fn: LossFn,
    inner: InnerOptimiser | None = None,
    steps: int = 1,
    **options: Any,
) -> MAML:
    """MAML with the inner gradients held constant: `MAML(..., adjoint=FirstOrder())`."""
    return MAML(model, loss_fn, inner, steps, FirstOrder(), **options)


def ANIL(
    model: nn.Module | Predictor,
    loss_fn: LossFn,
    inner: InnerOptimiser | None = None,
    steps: int = 1,
    adjoint: Adjoint | None = None,
    *,
    head: str = "head",
    **options: Any,
) -> MAML:
    """MAML that adapts the classifier only (Raghu et al. 2020, arXiv 1909.09157): `MAML(..., adapt=head)`."""
    return MAML(model, loss_fn, inner, steps, adjoint, head, **options)


def MetaSGD(
    model: nn.Module | Predictor,
    loss_fn: LossFn,
    lr: float = 0.05,
    steps: int = 1,
    adjoint: Adjoint | None = None,
    adapt: Adapt = None,
    **options: Any,
) -> MAML:
    """MAML that learns a rate for each entry of each parameter (Li et al. 2017, arXiv 1707.09835).

    theta' = theta - alpha o grad L(theta) (the paper's equation 2), and the outer loss of theta' is descended in
    theta and alpha together (equation 4): `MAML(..., inner=SGD(lr, learn_lr=True))`. The rates are the
    meta-parameters "rates.lr.<name>"; they may become negative, as in the paper.

    Args:
        lr: where all rates begin, in the place of an inner optimiser.
    """
    return MAML(model, loss_fn, SGD(lr, learn_lr=True), steps, adjoint, adapt, **options)
