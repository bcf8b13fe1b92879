"""What every meta-learner shares: a model as a pure function, episodes over tasks, an inner loop described by values.

A class here is abstract or final. `Learner` runs episodes; a learner says what it makes of a task (`_adapt`), what that
predicts (`_predict`), and, where it is not the loss of the queries, what its outer loss is (`_task_loss`).
`GradientLearner` adds what those that take gradient steps have in common: they say what the inner problem of a task is
(`_problem`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from theria.curvature.second_order import second_order
from theria.meta.adjoint import Adjoint, Context, InnerLoss
from theria.meta.checks import (
    Adapt,
    check_inner,
    check_loss_fn,
    check_no_steps,
    check_rates,
    check_support,
    check_tasks,
    is_batched,
    select,
)
from theria.meta.functional import (
    STEM,
    Predictor,
    as_target,
    constants,
    first_names,
    has_stages,
    pure_function,
    recurrence,
    stages,
)
from theria.meta.optimisers import Hyper, InnerOptimiser, Params
from theria.meta.trajectory import trajectory
from theria.meta.values import check_scalar, check_steps

LossFn = Callable[[Tensor, Tensor], Tensor]


class Learner(nn.Module, ABC):
    """Maps an episode to an outer loss, as a module and as a pure function of its parameters.

    Args:
        model: an `nn.Module`, or a pure function `f(params, x)` together with `params`.
        loss_fn: (prediction, target) -> scalar. Integer targets are int64 there, whatever the episode has.
        params: the initial parameters of a pure function, by name; an `nn.Parameter` stays the same object, and frozen
            (requires_grad=False) if it is.
        chunk_size: how many tasks run at a time under `vmap`; None for all.
        randomness: what dropout does under `vmap`: "error", "different" masks for each task, or the "same".
        batch_norm: "batch" or "running", see NOTE [buffers are constants] in `theria.meta.functional`.

    The meta-parameters are `dict(learner.named_parameters())`: "model.<name>" (for a pure function "params.<name>",
    where "/" stands for the dots of a name) and what the algorithm itself learns.

    Raises:
        TypeError, ValueError: for arguments that do not fit, before any work.
    """

    steps: int = 0  # the inner steps of one adaptation; 0 for learners in closed form

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn,
        *,
        params: Params | None = None,
        chunk_size: int | None = None,
        randomness: str = "error",
        batch_norm: str = "batch",
    ) -> None:
        super().__init__()
        check_loss_fn(loss_fn)
        check_tasks(chunk_size, randomness)
        self.loss_fn, self.chunk_size, self.randomness = loss_fn, chunk_size, randomness
        self.batch_norm = batch_norm
        if isinstance(model, nn.Module):
            if params is not None:
                raise ValueError("params is for a pure function f(params, x); an nn.Module brings its own")
            pure_function(model, batch_norm)  # raises for what it cannot be
            self.model, self._pure = model, None
            self._names = {f"model.{name}": name for name, _ in model.named_parameters()}
        else:
            if not callable(model) or not params:
                raise ValueError(f"model={model!r}: give an nn.Module, or a function f(params, x) and params={{...}}")
            self.params = as_parameters(params)
            self._names = {f"params.{as_key(name)}": name for name in params}
            self._pure = model

    @property
    def _function(self) -> Predictor:
        """(params, x) -> prediction, of the module that the learner holds now: a copy of the learner has its own."""
        return pure_function(self.model, self.batch_norm) if self._pure is None else self._pure

    @property
    def _constants(self) -> Params:
        """The model's buffers of now, for what may run the model again later."""
        return constants(self.model) if self._pure is None else {}

    @abstractmethod
    def _adapt(self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor, steps: int) -> Params:
        """What is known of a task after its support set."""

    @abstractmethod
    def _predict(self, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor) -> Tensor:
        """Predictions by what `_adapt` returned."""

    def _task_loss(self, meta_params: Mapping[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        """The outer loss of one task: that of its queries after adaptation, unless a learner has another."""
        return self._query_loss(meta_params, self._adapt(meta_params, sx, sy, self.steps), qx, qy)

    def forward(self, episode: Any, *, batched: bool | None = None) -> Tensor:
        """The outer loss, averaged over the tasks; see `outer_loss`."""
        return self.outer_loss(dict(self.named_parameters()), episode, batched=batched)

    def outer_loss(self, meta_params: Mapping[str, Tensor], episode: Any, *, batched: bool | None = None) -> Tensor:
        """The same as a pure function of `meta_params = dict(learner.named_parameters())`.

        Args:
            episode: (support_x, support_y, query_x, query_y) of one task, or of T tasks with a leading T.
            batched: whether there is a leading T; None infers it from the shapes.
        """
        return self._over_tasks(lambda *task: self._task_loss(meta_params, *task), episode, batched).mean()

    def adapt(self, support_x: Tensor, support_y: Tensor, *, steps: int | None = None) -> Params:
        """What adaptation to one task makes, differentiable in the meta-parameters.

        For learners whose inner steps change the model, all its parameters by the model's own names.

        Args:
            steps: number of inner steps, 0 included; None for those of the learner.
        """
        check_support(support_x, support_y)
        return self._adapt(dict(self.named_parameters()), support_x, support_y, self._steps(steps))

    def predict(self, episode: Any, *, steps: int | None = None, batched: bool | None = None) -> Tensor:
        """Predictions for the queries after adaptation: ([T,] Q, ...); `steps=0` is the unadapted model."""
        meta_params, steps = dict(self.named_parameters()), self._steps(steps)

        def task_prediction(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            return second_order(self._predict)(meta_params, self._adapt(meta_params, sx, sy, steps), qx)

        return self._over_tasks(task_prediction, episode, batched)

    def predict_trajectory(self, episode: Any, *, steps: int | None = None, batched: bool | None = None) -> Tensor:
        """Predictions for the queries after 0, 1, .. `steps` inner steps: (steps + 1, [T,] Q, ...).

        Each is `predict` with so many steps, but for the draws of dropout. Learners that take inner steps adapt once,
        and hold the parameters after one step at a time; of one in closed form there is one prediction.

        Args:
            steps: the largest number of inner steps; None for that of the learner.

        Raises:
            ValueError: a negative number of steps, or any for a learner that takes none.
        """
        meta_params, steps = dict(self.named_parameters()), self._steps(steps)

        def task_predictions(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            predict = second_order(self._predictor(meta_params, qx))
            return torch.stack([predict(adapted) for adapted in self._trajectory(meta_params, sx, sy, steps)])

        predictions = self._over_tasks(task_predictions, episode, batched)
        return predictions.movedim(1, 0) if is_batched(episode, batched) else predictions

    def _trajectory(self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor, steps: int) -> Iterator[Params]:
        """What `_adapt` returns for 0, 1, .. `steps` inner steps."""
        return (self._adapt(meta_params, x, y, t) for t in range(steps + 1))

    def _predictor(self, meta_params: Mapping[str, Tensor], x: Tensor) -> Callable[[Params], Tensor]:
        """`_predict` of the same x by one thing that `_adapt` returned after another."""
        return lambda adapted: self._predict(meta_params, adapted, x)

    def _theta(self, meta_params: Mapping[str, Tensor]) -> Params:
        """The model's parameters by its own names."""
        return {name: meta_params[full] for full, name in self._names.items()}

    def _loss(self, predict: Callable[[], Tensor], y: Tensor, what: str) -> Tensor:
        """The loss on one set of one task, by functions that can be differentiated twice."""
        return check_scalar(
            second_order(lambda: self.loss_fn(predict(), as_target(y)))(), "loss_fn", f" for the {what}"
        )

    def _query_loss(self, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor, y: Tensor) -> Tensor:
        return self._loss(lambda: self._predict(meta_params, adapted, x), y, "query set")

    def _over_tasks(self, function: Callable[..., Tensor], episode: Any, batched: bool | None) -> Tensor:
        """`function` of one task on each task: stacked under a leading T, or of the one task there is."""
        several = is_batched(episode, batched)
        with recurrence(None if self._pure is not None else self.model):
            if not several:
                return function(*episode)
            if not self._vmappable:
                return torch.stack([function(*task) for task in zip(*episode, strict=True)])
            return torch.func.vmap(function, chunk_size=self.chunk_size, randomness=self.randomness)(*episode)

    @property
    def _vmappable(self) -> bool:
        adjoint = getattr(self, "adjoint", None)
        return adjoint is None or adjoint.vmappable

    def _steps(self, steps: int | None) -> int:
        if self.steps == 0:
            return check_no_steps(steps, type(self).__name__)
        return self.steps if steps is None else check_steps(steps, least=0)


class GradientLearner(Learner):
    """A learner that takes inner steps; `adapted` names what they change, `rates` holds what the optimiser learns.

    Args:
        inner: the inner optimiser; with `SGD(lr, learn_lr=True)` the rates are meta-parameters "rates.lr.<name>".
        steps: number of inner steps, at least 1.
        adjoint: how the inner solution is differentiated.
    The others: see `Learner`.
    """

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn,
        inner: InnerOptimiser,
        steps: int,
        adjoint: Adjoint,
        **options: Any,
    ) -> None:
        check_inner(inner, adjoint)
        check_steps(steps, least=1)
        super().__init__(model, loss_fn, **options)
        self.steps, self.inner, self.adjoint = steps, inner, adjoint

    def _choose(self, adapt: Adapt) -> None:
        """Adapt these parameters of the model; None: all but those that are frozen."""
        initial = self._theta(dict(self.named_parameters()))
        chosen = select(self._all_names, adapt, {name for name, p in initial.items() if p.requires_grad})
        self._learn_rates({name: initial[name].detach() for name in chosen})

    @property
    def _all_names(self) -> dict[str, str]:
        """Of every name of a parameter of the model the one that it is given by: the first, where modules share it."""
        own = {name: name for name in self._names.values()}
        if self._pure is not None:
            return own
        return {name: first for name, first in first_names(self.model).items() if first in own}

    def _learn_rates(self, values: Params) -> None:
        """The inner steps start from values like these."""
        self.adapted = list(values)
        self.rates = nn.ModuleDict()
        for kind, rates in self.inner.hyper(values).items():
            if not isinstance(rates, dict):
                raise TypeError(f"{self.inner!r}.hyper() gives one tensor for {kind!r}: a learner needs one by name")
            check_rates(self.adjoint, self.inner)
            self.rates[kind] = as_parameters(rates)

    @property
    def _learns_more(self) -> bool:
        """Whether a parameter of the model is learned and not adapted."""
        theta = self._theta(dict(self.named_parameters()))
        return any(p.requires_grad for name, p in theta.items() if name not in self.adapted)

    def _hyper(self, meta_params: Mapping[str, Tensor]) -> Hyper:
        """The learned quantities of the optimiser."""
        return {
            kind: {name: meta_params[f"rates.{kind}.{as_key(name)}"] for name in self.adapted} for kind in self.rates
        }

    @abstractmethod
    def _problem(
        self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[InnerLoss, Params, Context, Params]:
        """Of a task: its inner loss, where the steps begin, what else the loss reads, and what `_adapt` returns with
        the parameters that were adapted."""

    def _adapt(self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor, steps: int) -> Params:
        """The start after so many inner steps. Unadapted it is itself, not what an implicit adjoint takes it for."""
        loss, start, context, fixed = self._problem(meta_params, x, y)
        if not steps:
            return {**fixed, **start}
        hyper = self._hyper(meta_params)
        return {**fixed, **self._adjoint.solve(loss, start, context, self.inner, hyper, steps)}

    def _trajectory(self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor, steps: int) -> Iterator[Params]:
        """One adaptation, looked at after every step."""
        loss, start, context, fixed = self._problem(meta_params, x, y)
        yield {**fixed, **start}
        for adapted in trajectory(self._adjoint, loss, start, context, self.inner, self._hyper(meta_params), steps):
            yield {**fixed, **adapted}

    def _predict(self, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor) -> Tensor:
        return self._output(self._function, meta_params, adapted, x)

    def _predictor(self, meta_params: Mapping[str, Tensor], x: Tensor) -> Callable[[Params], Tensor]:
        """The stem is evaluated once where nothing of it is adapted."""
        before, after = self._stages
        data = second_order(before)(self._theta(meta_params), x)
        return lambda adapted: self._output(after, meta_params, adapted, data)

    def _output(self, model: Predictor, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor) -> Tensor:
        """Predictions by the whole model, or by its second stage of the outputs of the first."""
        return model(adapted, x)

    @property
    def _adjoint(self) -> Adjoint:
        """How the inner solution is differentiated now."""
        return self.adjoint

    def _split(self, meta_params: Mapping[str, Tensor]) -> tuple[Params, Params]:
        """The model's parameters that the inner steps change, and the others."""
        theta = self._theta(meta_params)
        fixed = {name: p for name, p in theta.items() if name not in self.adapted}
        return {name: theta[name] for name in self.adapted}, fixed

    @property
    def _stages(self) -> tuple[Predictor, Predictor]:
        """The model as (what no inner step changes, the rest): (its stem, what follows), or (nothing, all of it)."""
        apart = self._pure is None and has_stages(self.model)
        if apart and not any(name in self.adapted for name in first_names(self.model, STEM).values()):
            return stages(self.model, self.batch_norm)
        return lambda params, x: x, self._function

    def _context(self, fixed: Params, x: Tensor, y: Tensor) -> tuple[Params, Tensor, Tensor]:
        """What the inner steps read beside what they change: the other parameters and buffers, the data, the targets.

        The data are the outputs of the stem where nothing of it is adapted: it is evaluated, and differentiated, once a
        task and not in each step. Otherwise they are x.
        """
        before, _ = self._stages
        fixed = {**fixed, **self._constants}
        return fixed, second_order(before)(fixed, x), y

    def _support_loss(self, params: Params, context: tuple[Params, Tensor, Tensor]) -> Tensor:
        """The inner loss of the parameters that are adapted, given `_context`."""
        fixed, data, y = context
        _, after = self._stages
        return self._loss(lambda: after({**fixed, **params}, data), y, "support set")


def as_key(name: str) -> str:
    """A parameter's name where PyTorch allows no dot."""
    return name.replace(".", "/")


def as_parameters(values: Params) -> nn.ParameterDict:
    """The tensors as parameters; those that are parameters already stay the same objects."""
    owned = {
        as_key(name): p if isinstance(p, nn.Parameter) else nn.Parameter(p.detach().clone())
        for name, p in values.items()
    }
    if len(set(map(id, owned.values()))) < len(values):
        raise ValueError(f"params {sorted(values)}: the same parameter, or a name with '/' for '.', occurs twice")
    return nn.ParameterDict(owned)
