"""The learners of `configs/learner`, and what the trainer needs of one, whichever way it learns."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from experiments.config_learner import (
    AdjointConfig,
    AdjointKind,
    InnerConfig,
    InnerKind,
    LearnerConfig,
    LearnerKind,
    SolverKind,
)
from theria import meta
from theria.data import Episode
from theria.meta import learner as base
from theria.meta.cavia import CAVIA, FiLM
from theria.meta.imaml import IMAML
from theria.meta.implicit.linear_solve import Inexact
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.maml_plus_plus import MAMLPlusPlus
from theria.meta.optimisers import Adam, AdamW, InnerOptimiser, RMSprop
from theria.meta.proto_maml import ProtoMAML
from theria.meta.protonet import ProtoNet
from theria.meta.r2d2 import R2D2
from theria.meta.reptile import Reptile
from theria.meta.solvers import CG, MINRES
from theria.meta.truncated import Truncated
from theria.meta.unicorn_maml import UnicornMAML
from theria.nn import InContextClassifier, InContextRegressor, PrototypeTransformer

LossFn = Callable[[Tensor, Tensor], Tensor]
InContextNetwork = InContextClassifier | InContextRegressor | PrototypeTransformer


class InContextLearner(nn.Module):
    """Learning in the forward pass: the network reads the support set; training is plain descent on the query loss."""

    def __init__(self, model: InContextNetwork, loss_fn: LossFn) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, episode: Episode) -> Tensor:
        """The mean loss of the queries; of every point given those before it where the context is causal."""
        if isinstance(self.model, InContextRegressor) and self.model.causal:
            x, y = sequence(episode)
            return self.loss_fn(self.model.prefixes(x, y), y)
        prediction = self.predict(episode)
        return self.loss_fn(prediction.flatten(0, 1), episode.query_y.flatten(0, 1))

    def predict(self, episode: Episode) -> Tensor:
        """([T,] Q, ...) predictions of the queries."""
        return self.model(episode.support_x, episode.support_y, episode.query_x)


# Both map an episode of T tasks to their mean outer loss and have predict(episode).
Learner: TypeAlias = "base.Learner | InContextLearner"


def takes_steps(learner: Learner) -> bool:
    """Whether the learner adapts by inner steps, of which there may be more or fewer."""
    return isinstance(learner, base.Learner) and learner.steps > 0


def set_epoch(learner: Learner, config: LearnerConfig, step: int) -> None:
    """Tell a learner that anneals how far training is; after its periods nothing changes, and no step is new."""
    if isinstance(learner, MAMLPlusPlus):
        learner.epoch = min(step // config.epoch_steps, max(learner.multi_step_epochs, learner.first_order_epochs))


def build(
    config: LearnerConfig,
    inner: InnerConfig,
    adjoint: AdjointConfig,
    model: nn.Module,
    loss_fn: LossFn,
    ways: int | None,
) -> base.Learner:
    """The learner around a network with a linear `head`.

    Args:
        ways: number of classes; None for regression.

    Raises:
        ValueError: for settings that do not go together.
    """
    kind, tasks = config.kind, {"chunk_size": config.chunk_size}
    steps: dict[str, Any] = {"steps": inner.steps, **tasks}
    exact = {"adjoint": build_adjoint(adjoint), **steps}
    match kind:
        case LearnerKind.maml:
            return _head_rates(meta.MAML(model, loss_fn, optimiser(inner), adapt=config.adapt, **exact), inner)
        case LearnerKind.metasgd:
            rates = optimiser(inner, learn_lr=True)
            return _head_rates(meta.MAML(model, loss_fn, rates, adapt=config.adapt, **exact), inner)
        case LearnerKind.maml_plus_plus:
            rates = optimiser(inner, lr=[inner.lr] * inner.steps, learn_lr="tensor")
            epochs = {"multi_step_epochs": config.multi_step_epochs, "first_order_epochs": config.first_order_epochs}
            return MAMLPlusPlus(model, loss_fn, rates, adapt=config.adapt, **epochs, **exact)
        case LearnerKind.imaml:
            proximal = {"strength": config.strength, "tol": config.tol}
            return IMAML(model, loss_fn, optimiser(inner), adapt=config.adapt, **proximal, **exact)
        case LearnerKind.reptile:
            return Reptile(model, loss_fn, optimiser(inner), **steps)
        case LearnerKind.cavia:
            return CAVIA(FiLM(model, config.n_context), loss_fn, config.n_context, optimiser(inner), **exact)
        case LearnerKind.protonet:
            if ways is None:
                raise ValueError("learner=protonet classifies: give a task with classes, or learner=r2d2")
            return ProtoNet(_embedding(model), loss_fn, ways=ways, **tasks)
        case LearnerKind.proto_maml | LearnerKind.unicorn_maml:
            if ways is None:
                raise ValueError(f"learner={kind.value} classifies: give a task with classes, or learner=maml")
            made = ProtoMAML if kind is LearnerKind.proto_maml else UnicornMAML
            learner = made(_embedding(model), loss_fn, optimiser(inner), adapt=config.adapt, ways=ways, **exact)
            return _head_rates(learner, inner)
        case LearnerKind.r2d2:
            return R2D2(_embedding(model), loss_fn, ways=ways, ridge=config.ridge, **tasks)
    raise ValueError(f"learner={kind.value} is not built around a network: give model=incontext")


def optimiser(inner: InnerConfig, **changes: Any) -> InnerOptimiser:
    """The inner optimiser, with other rates where they are given."""
    rates: dict[str, Any] = {"lr": inner.lr, "learn_lr": inner.learn_lr, **changes}
    match inner.kind:
        case InnerKind.sgd:
            return meta.SGD(momentum=inner.momentum, nesterov=inner.nesterov, **rates)
        case InnerKind.adam:
            return Adam(**rates)
        case InnerKind.adamw:
            return AdamW(**rates)
        case InnerKind.rmsprop:
            return RMSprop(**rates)


def build_adjoint(config: AdjointConfig) -> meta.Adjoint:
    """How the inner solution is differentiated."""
    match config.kind:
        case AdjointKind.unrolled:
            return meta.Unrolled(config.checkpoint_every)
        case AdjointKind.mixed_mode:
            return meta.MixedMode(config.checkpoint_every)
        case AdjointKind.first_order:
            return meta.FirstOrder()
        case AdjointKind.truncated:
            return Truncated(config.steps)
        case AdjointKind.implicit:
            return _implicit(config)
        case AdjointKind.identity:
            return Identity(config.scale)
        case AdjointKind.higher:
            return meta.Higher()


def _implicit(config: AdjointConfig) -> Implicit:
    kind = CG if config.solver is SolverKind.cg else MINRES
    tolerance = 1e-4  # what float32 can resolve
    if config.iterations is None:
        return Implicit(kind(rtol=tolerance))
    # The host looks at nothing, so that a step can be one CUDA graph: where a solve fails the gradient is NaN, which
    # the trainer sees, and `health.bad_task` says why.
    return Implicit(Inexact(kind(rtol=tolerance, max_iterations=config.iterations, check_every=None)), throw=False)


def _head_rates(learner: base.GradientLearner, inner: InnerConfig) -> base.GradientLearner:
    """The learned rates of the classifier begin at their own value."""
    rates = {name: p for name, p in learner.named_parameters() if name.startswith("rates.lr.")}
    if inner.head_lr is not None:
        if not rates:
            raise ValueError(
                "inner.head_lr starts a learned rate: give inner.learn_lr=true with it, or inner.head_lr=null"
            )
        with torch.no_grad():
            for name, parameter in rates.items():
                if name.startswith("rates.lr.head/"):
                    parameter.fill_(inner.head_lr)
    return learner


def _embedding(model: Any) -> nn.Module:
    """The network without its last layer."""
    model.head = nn.Identity()
    return model


def sequence(episode: Episode) -> tuple[Tensor, Tensor]:
    """Support and query points as one sequence: x (T, K + Q, d) and y (T, K + Q, 1)."""
    return torch.cat([episode.support_x, episode.query_x], 1), torch.cat([episode.support_y, episode.query_y], 1)


@contextmanager
def attributes(target: Any, **values: Any):
    """Set attributes of a value for the time of a block."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield target
    finally:
        for name, value in before.items():
            setattr(target, name, value)
