"""CAVIA: fast context adaptation (Zintgraf et al. 2019, arXiv 1810.03642), and two ways to read a context."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from theria.meta.adjoint import Adjoint, Context, InnerLoss, Unrolled
from theria.meta.checks import check_count
from theria.meta.functional import Predictor
from theria.meta.learner import GradientLearner, LossFn
from theria.meta.optimisers import SGD, InnerOptimiser, Params


class CAVIA(GradientLearner):
    """Adapts a context vector phi that the model reads beside x; the parameters theta are learned across tasks only.

    From phi_0 = 0, phi_{t+1} = phi_t - lr grad_phi of the support loss of f_{phi_t, theta}, and the outer loss is the
    query loss of f_{phi_T, theta}, descended in theta (section 3.1).

    Args:
        model: an `nn.Module` called as `model(x, context)`, such as `ExtraInputs` or `FiLM` around a plain one, or a
            pure function `f(params, x, context)` together with `params`. `context` has shape (n_context,).
        n_context: length of phi.
        inner: the inner optimiser of phi; default SGD(1.0), the paper's rate.
        steps, adjoint: as in `MAML`; the adjoint differentiates phi_T in theta, which is all its "context".
    The others: see `Learner`. With learned rates they are the meta-parameter "rates.lr.context".

    `adapt` returns {"context": phi_T}.
    """

    def __init__(
        self,
        model: nn.Module | Predictor,
        loss_fn: LossFn,
        n_context: int,
        inner: InnerOptimiser | None = None,
        steps: int = 1,
        adjoint: Adjoint | None = None,
        **options: Any,
    ) -> None:
        adjoint = Unrolled() if adjoint is None else adjoint
        super().__init__(model, loss_fn, SGD(lr=1.0) if inner is None else inner, steps, adjoint, **options)
        self.n_context = check_count("n_context", n_context)
        self._learn_rates(self._start(self._theta(dict(self.named_parameters()))))

    def _start(self, theta: Params) -> Params:
        """phi_0, of the dtype and on the device of the parameters."""
        if not theta:
            raise ValueError("the model has no parameters: CAVIA learns them, and adapts the context only")
        return {"context": next(iter(theta.values())).detach().new_zeros(self.n_context)}

    def _problem(
        self, meta_params: Mapping[str, Tensor], x: Tensor, y: Tensor
    ) -> tuple[InnerLoss, Params, Context, Params]:
        def loss(context: Params, others: tuple[Params, Tensor, Tensor]) -> Tensor:
            theta, x, y = others
            return self._loss(lambda: self._function(theta, x, context["context"]), y, "support set")

        theta = self._theta(meta_params)
        return loss, self._start(theta), ({**theta, **self._constants}, x, y), {}

    @property
    def _stages(self) -> tuple[Predictor, Predictor]:
        return lambda params, x: x, self._function  # what follows a stem takes no context

    def _output(self, model: Predictor, meta_params: Mapping[str, Tensor], adapted: Params, x: Tensor) -> Tensor:
        return model(self._theta(meta_params), x, adapted["context"])


class ExtraInputs(nn.Module):
    """The context as further inputs of a model of vectors: model([x, context]), x (..., d) and context (c,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.model(torch.cat([x, context.expand(*x.shape[:-1], -1)], -1))


class FiLM(nn.Module):
    """The context scales and shifts the features that a model's classifier reads (Perez et al. 2018, arXiv 1709.07871).

    head((1 + W context) * h + V context) with h the features; at context 0 the model is as it was.

    Args:
        model: a module whose last layer is the `nn.Linear` under its attribute `head`, as those of `theria.nn` are.
            Its head moves into this module.
        n_context: length of the context.
    """

    def __init__(self, model: nn.Module, n_context: int) -> None:
        super().__init__()
        head = getattr(model, "head", None)
        if not isinstance(head, nn.Linear):
            raise TypeError(f"{type(model).__name__}.head is {head!r}: FiLM needs an nn.Linear there, the last layer")
        self.body, self.head = model, head
        model.head = nn.Identity()
        self.scale = nn.Linear(n_context, head.in_features, bias=False)
        self.shift = nn.Linear(n_context, head.in_features, bias=False)
        self.to(head.weight)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x as the model takes it, context (n_context,) -> what the model returns."""
        return self.head((1 + self.scale(context)) * self.body(x) + self.shift(context))
