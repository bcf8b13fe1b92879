"""Bilevel problems: minimise h(x) = f(z*(x), x) with z*(x) = argmin over z of g(z, x).

Names throughout `theria.meta.bilevel`, those of Dagréou et al. 2022 (arXiv 2201.13409) in lower case: x outer, z inner,
g the inner loss, f the outer loss, and v the solution of the linear system H v = -df/dz with H = d2g/dz2. Then

    dh/dx = df/dx + (d2g/dx dz) v                                                                               (1)

(Pedregosa 2016, arXiv 1602.02355, section 2; Ji et al. 2021, arXiv 2010.07962, proposition 1, with the sign in v.)
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from theria.curvature.second_order import second_order
from theria.meta.bilevel.trees import Tree, detached
from theria.meta.constant import constant
from theria.meta.levels import carries_derivative

BilevelLoss = Callable[..., Tensor]


class Evaluation(NamedTuple):
    """One evaluation of h.

    Attributes:
        value: (), h; differentiable in the outer variable by the method's rule.
        inner: the inner variable at the end, a constant: where the next evaluation begins (a warm start).
        inner_residual: (), the norm of dg/dz there: how far from a solution the inner problem was left.
        linear: of `AID` the `Solution` for v; `linear.value` warm-starts the next solve. () for `ITD`.
    """

    value: Tensor
    inner: Tree
    inner_residual: Tensor
    linear: Any


class HypergradientResult(NamedTuple):
    """h and its gradient, all constants.

    Attributes:
        value: (), h.
        gradient: dh/dx, a pytree like the outer variable.
        inner, inner_residual, linear: as in `Evaluation`.
    """

    value: Tensor
    gradient: Tree
    inner: Tree
    inner_residual: Tensor
    linear: Any


@dataclass(frozen=True)
class BilevelProblem:
    """min over x of f(z*(x), x), z*(x) = argmin over z of g(z, x), on pytrees.

    Args:
        inner_loss: g, (inner, outer) -> scalar, or (inner, outer, batch) -> scalar, see `on`.
        outer_loss: f, likewise. Both are pure, run inside `theria.curvature.second_order`, and read no tensor from
            outside that is being differentiated.
        inner_batch, outer_batch: what `on` sets.

    How h is differentiated is a value: `ITD` (through the inner steps, by any adjoint) or `AID` (by equation 1 and any
    linear solver). Everything runs under `torch.func.vmap`, over outer variables, starts and batches.
    """

    inner_loss: BilevelLoss
    outer_loss: BilevelLoss
    inner_batch: Any = None
    outer_batch: Any = None

    def on(self, inner_batch: Any = None, outer_batch: Any = None) -> "BilevelProblem":
        """The problem on these data: each given to its loss as a third argument, None for no such argument.

        A batch is any pytree: tensors of data, indices of samples.
        """
        return replace(self, inner_batch=inner_batch, outer_batch=outer_batch)

    def g(self, inner: Tree, outer: Tree) -> Tensor:
        """The inner loss on the batch, by functions that can be differentiated twice."""
        return _loss("inner_loss", self.inner_loss, inner, outer, self.inner_batch)

    def f(self, inner: Tree, outer: Tree) -> Tensor:
        """The outer loss on the batch."""
        return _loss("outer_loss", self.outer_loss, inner, outer, self.outer_batch)

    def evaluate(self, outer: Tree, inner0: Tree, method: "Method", v0: Tree | None = None) -> Evaluation:
        """h at `outer`; `evaluate(...).value.backward()` works, with the outer variable in any torch optimiser.

        Args:
            outer: x.
            inner0: where the inner optimisation begins; the `inner` of the last evaluation is a warm start.
            method: how the inner problem is solved and differentiated, `ITD(...)` or `AID(...)`.
            v0: where the linear solve of `AID` begins: the `linear.value` of the last evaluation; None for 0.

        Raises:
            SolverError: from `AID` with `throw`.
            ValueError, TypeError: for what does not fit, and for derivatives that would be lost.
        """
        if not isinstance(method, Method):
            raise TypeError(f"method={method!r}: give a value such as ITD(SGD(0.1), 100) or AID(SGD(0.1), 100)")
        _check_tree("outer", outer)
        _check_tree("inner0", inner0)
        self._refuse_lost_derivatives(outer, inner0)
        return method.evaluate(self, outer, inner0, v0)

    def hypergradient(self, outer: Tree, inner0: Tree, method: "Method", v0: Tree | None = None) -> HypergradientResult:
        """h and dh/dx at `outer`, as constants. Arguments and errors: as `evaluate`.

        Raises:
            ValueError: inside `torch.func.grad` or `jvp` over the outer variable: differentiate `evaluate` there.
        """
        if any(_has_level_of_derivative(leaf) for leaf in pytree.tree_leaves((outer, inner0, v0))):
            raise ValueError(
                "hypergradient returns constants, and was called on what a torch.func transform differentiates: its "
                "derivative would be lost. Differentiate evaluate(...).value, with ITD for orders above the first"
            )

        def value(outer: Tree) -> tuple[Tensor, Evaluation]:
            evaluation = self.evaluate(outer, detached(inner0), method, detached(v0))
            return evaluation.value, evaluation

        gradient, evaluation = torch.func.grad(value, has_aux=True)(detached(outer))
        evaluation = detached(evaluation)
        return HypergradientResult(evaluation.value, detached(gradient), *evaluation[1:])

    def _refuse_lost_derivatives(self, outer: Tree, inner0: Tree) -> None:
        """Raise when a loss reads a tensor from outside, or from a batch, that is being differentiated."""
        if not torch.is_grad_enabled() and not any(map(_has_level_of_derivative, pytree.tree_leaves((outer, inner0)))):
            return
        inner, outer = constant(inner0), constant(outer)
        for name, loss in (("inner_loss", self.g), ("outer_loss", self.f)):
            if carries_derivative(loss(inner, outer)):
                raise ValueError(
                    f"{name} depends on a tensor that is being differentiated and is neither the inner nor the outer "
                    f"variable: a closed-over one (a module's parameters?) or part of a batch. Its derivative would "
                    f"be lost: make it a part of the outer variable, or detach it"
                )


class Method(ABC):
    """How the inner problem is solved and how its solution is differentiated."""

    @abstractmethod
    def evaluate(self, problem: BilevelProblem, outer: Tree, inner0: Tree, v0: Tree | None) -> Evaluation:
        """See `BilevelProblem.evaluate`."""


def _check_tree(name: str, tree: Tree) -> None:
    leaves = pytree.tree_leaves(tree)
    wrong = [leaf for leaf in leaves if not (isinstance(leaf, Tensor) and leaf.is_floating_point())]
    if wrong or not leaves:
        given = "no leaves" if not leaves else getattr(wrong[0], "dtype", type(wrong[0]).__name__)
        raise TypeError(f"{name} holds {given}: give a pytree of floating-point tensors; other data go into a batch")


def _loss(name: str, loss: BilevelLoss, inner: Tree, outer: Tree, batch: Any) -> Tensor:
    value = second_order(loss)(inner, outer) if batch is None else second_order(loss)(inner, outer, batch)
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        given = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} returned {given}: one floating-point number is needed, such as a mean over samples")
    return value


def _has_level_of_derivative(leaf: Any) -> bool:
    """Whether a transform of torch.func differentiates this tensor; a plain `requires_grad` does not count."""
    while isinstance(leaf, Tensor) and _functorch.is_functorch_wrapped_tensor(leaf):
        if _functorch.is_gradtrackingtensor(leaf):
            return carries_derivative(leaf)
        leaf = _functorch.get_unwrapped(leaf)
    return isinstance(leaf, Tensor) and carries_derivative(leaf.detach())  # detach keeps a tangent
