"""Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400) and its relatives, as one composition.

theta_T(theta_0) = T inner steps on the support loss, and the outer loss is the query loss at theta_T, averaged over
the tasks. The inner optimiser, how the result is differentiated, and which parameters are adapted are arguments.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from theria.curvature.second_order import second_order
from theria.meta.adjoint import Adjoint, FirstOrder, Unrolled
from theria.meta.checks import Adapt, check_scalar, check_steps, check_support, is_batched, select
from theria.meta.functional import Predictor, pure_function
from theria.meta.optimisers import SGD, InnerOptimiser, Params

LossFn = Callable[[Tensor, Tensor], Tensor]


class MAML(nn.Module):
    """Learns an initialisation from which a few gradient steps on a task's support set do well on its queries.

    Args:
        model: an `nn.Module`, or a pure function `f(params, x)` together with `params`.
        loss_fn: (prediction, target) -> scalar.
        inner: the inner optimiser; `SGD(lr, learn_lr=True)` learns its rates too (Meta-SGD).
        steps: number of inner steps, at least 1.
        adjoint: how the inner solution is differentiated: `Unrolled()`, `MixedMode()`, `FirstOrder()`, `Higher()`.
        adapt: which parameters the inner loop changes: None for all that require grad, a predicate on names, or
            names of parameters or modules. The others are meta-learned only.
        params: the initial parameters of a pure function, by name.
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
        super().__init__()
        self.steps = check_steps(steps, least=1)
        self.inner: InnerOptimiser = SGD(lr=0.01) if inner is None else inner
        self.adjoint: Adjoint = Unrolled() if adjoint is None else adjoint
        self.loss_fn, self.chunk_size, self.randomness = loss_fn, chunk_size, randomness
        self.batch_norm = batch_norm
        self._check_choices()
        if isinstance(model, nn.Module):
            if params is not None:
                raise ValueError("params is for a pure function f(params, x); an nn.Module brings its own")
            pure_function(model, batch_norm)  # raises for what it cannot be
            self.model, self._pure = model, None
            self._names = {f"model.{name}": name for name, _ in model.named_parameters()}
            initial = dict(model.named_parameters())
            if adapt is None:  # what is frozen stays as it is
                adapt = {name for name, p in initial.items() if p.requires_grad}.__contains__
        else:
            if not callable(model) or not params:
                raise ValueError(f"model={model!r}: give an nn.Module, or a function f(params, x) and params={{...}}")
            self.params = _parameters(params)
            self._names = {f"params.{_key(name)}": name for name in params}
            self._pure = model
            initial = params
        self.adapted = select(list(self._names.values()), adapt)
        hyper = self.inner.hyper({name: initial[name].detach() for name in self.adapted})
        self.rates = nn.ModuleDict({kind: _parameters(values) for kind, values in hyper.items()})

    @property
    def _function(self) -> Predictor:
        """(params, x) -> prediction, of the module that the learner holds now: a copy of the learner has its own."""
        return pure_function(self.model, self.batch_norm) if self._pure is None else self._pure

    def forward(self, episode: Any, *, batched: bool | None = None) -> Tensor:
        """The query loss after adaptation, averaged over the tasks; see `outer_loss`."""
        return self.outer_loss(dict(self.named_parameters()), episode, batched=batched)

    def outer_loss(self, meta_params: Mapping[str, Tensor], episode: Any, *, batched: bool | None = None) -> Tensor:
        """The same as a pure function of `meta_params = dict(learner.named_parameters())`.

        Args:
            episode: (support_x, support_y, query_x, query_y) of one task, or of T tasks with a leading T.
            batched: whether there is a leading T; None infers it from the shapes.
        """

        def task_loss(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            return self._loss(self._solve(meta_params, sx, sy, self.steps), qx, qy, "query set")

        return self._over_tasks(task_loss, episode, batched).mean()

    def adapt(self, support_x: Tensor, support_y: Tensor, *, steps: int | None = None) -> Params:
        """All parameters of the model after adaptation to one task, by the model's own names; differentiable.

        Args:
            steps: number of inner steps, 0 included; None for those of the learner.
        """
        check_support(support_x, support_y)
        return self._solve(dict(self.named_parameters()), support_x, support_y, self._steps(steps))

    def predict(self, episode: Any, *, steps: int | None = None, batched: bool | None = None) -> Tensor:
        """Predictions for the queries after adaptation: ([T,] Q, ...); `steps=0` is the unadapted model."""
        meta_params, steps = dict(self.named_parameters()), self._steps(steps)

        def task_prediction(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            return second_order(self._function)(self._solve(meta_params, sx, sy, steps), qx)

        return self._over_tasks(task_prediction, episode, batched)

    def _solve(self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor, steps: int) -> Params:
        """theta_T, all parameters, by the model's own names."""
        theta = {name: meta_params[full] for full, name in self._names.items()}
        hyper = {
            kind: {name: meta_params[f"rates.{kind}.{_key(name)}"] for name in self.adapted} for kind in self.rates
        }
        fixed = {name: p for name, p in theta.items() if name not in self.adapted}

        def support_loss(params: Params, context: tuple[Params, Tensor, Tensor]) -> Tensor:
            fixed, x, y = context
            return self._loss({**fixed, **params}, x, y, "support set")

        initial = {name: theta[name] for name in self.adapted}
        final = self.adjoint.solve(support_loss, initial, (fixed, x, y), self.inner, hyper, steps)
        return {**fixed, **final}

    def _loss(self, params: Params, x: Tensor, y: Tensor, what: str) -> Tensor:
        """The loss on one set of one task, by functions that can be differentiated twice."""
        loss = second_order(lambda: self.loss_fn(self._function(params, x), y))()
        return check_scalar(loss, what)

    def _over_tasks(self, function: Callable[..., Tensor], episode: Any, batched: bool | None) -> Tensor:
        """`function` of one task on each task: stacked under a leading T, or of the one task there is."""
        if not is_batched(episode, batched):
            return function(*episode)
        if not self.adjoint.vmappable:
            return torch.stack([function(*task) for task in zip(*episode, strict=True)])
        return torch.func.vmap(function, chunk_size=self.chunk_size, randomness=self.randomness)(*episode)

    def _steps(self, steps: int | None) -> int:
        return self.steps if steps is None else check_steps(steps, least=0)

    def _check_choices(self) -> None:
        if not isinstance(self.adjoint, Adjoint):
            raise TypeError(f"adjoint={self.adjoint!r}: give a value such as MixedMode() or Unrolled()")
        if isinstance(self.loss_fn, nn.Module) and any(True for _ in self.loss_fn.parameters()):
            raise TypeError(
                "loss_fn is a module with parameters, which would not be meta-parameters: give a function, and put "
                "what is learned into the model"
            )
        if not hasattr(self.inner, "update"):
            raise TypeError(f"inner={self.inner!r}: give an inner optimiser such as theria.meta.SGD(lr=0.1)")
        if self.randomness not in ("error", "different", "same"):
            raise ValueError(f"randomness={self.randomness!r} is not known: give 'error', 'different' or 'same'")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}: give at least 1 task, or None for all at once")


def FOMAML(model: nn.Module | Predictor, loss_fn: LossFn, inner: InnerOptimiser | None = None, **options: Any) -> MAML:
    """MAML with the inner gradients held constant: `MAML(..., adjoint=FirstOrder())`."""
    return MAML(model, loss_fn, inner, adjoint=FirstOrder(), **options)


def ANIL(
    model: nn.Module | Predictor,
    loss_fn: LossFn,
    inner: InnerOptimiser | None = None,
    *,
    head: str = "head",
    **options: Any,
) -> MAML:
    """MAML that adapts the classifier only (Raghu et al. 2020, arXiv 1909.09157): `MAML(..., adapt=head)`."""
    return MAML(model, loss_fn, inner, adapt=head, **options)


def _key(name: str) -> str:
    """A parameter's name where PyTorch allows no dot."""
    return name.replace(".", "/")


def _parameters(values: Params) -> nn.ParameterDict:
    """The tensors as parameters; those that are parameters already stay the same objects."""
    owned = {
        _key(name): p if isinstance(p, nn.Parameter) else nn.Parameter(p.detach().clone()) for name, p in values.items()
    }
    if len(set(map(id, owned.values()))) < len(values):
        raise ValueError(f"params {sorted(values)}: the same parameter, or a name with '/' for '.', occurs twice")
    return nn.ParameterDict(owned)
