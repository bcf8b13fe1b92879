"""The implicit function theorem, once, and the equations it is applied to.

NOTE [Implicit rule]. Let x(theta) satisfy an equation whose differential is  A x' = s',  where s(theta; x) is a
function of theta at fixed x and A(x, theta) is linear (Krantz and Parks, The Implicit Function Theorem, 2002,
theorem 1.3.1; Blondel et al. 2022, arXiv 2105.15183, section 2). Then

    forward   x'       = A^-1 (ds/dtheta) theta'
    reverse   thetabar = (ds/dtheta)' w,   A'w = xbar

| equation                | invariant               | A                | s(theta; x)                |
|-------------------------|-------------------------|------------------|----------------------------|
| `Root(F)`               | F(x, theta) = 0         | dF/dx            | -F(x, theta)               |
| `FixedPoint(f)`         | f(x, theta) = x         | I - df/dx        | f(x, theta)                |
| `Stationary(L)`         | dL/dx(x, theta) = 0     | d2L/dx2          | -dL/dx(x, theta)           |
| `System(A)`             | A(args) x = b           | A(args)          | b - A(args) x              |

w is the solution of a `System` of its own, whose arguments are (x, theta) and whose right-hand side is xbar; so the
rule's derivative is the rule again, with x a function of theta there too, and every order follows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.constant import plain_gradient
from theria.meta.implicit.forward_mode import push_forward
from theria.meta.implicit.frozen import Tree
from theria.meta.implicit.operators import Args, Function, Hessian, IdentityMinus, Jacobian, Operator

Theta = tuple[Any, ...]
Selected = list[Tensor]  # the tensors of theta that are differentiated
Of = Callable[[Selected], Theta]  # theta with those in their places


class Rule(ABC):
    """An equation that makes x a function of theta, see NOTE [Implicit rule]."""

    @property
    @abstractmethod
    def operator(self) -> Operator:
        """A."""

    @abstractmethod
    def source(self, x: Tree, theta: Theta) -> Tree:
        """s(theta; x), a pytree like x."""

    def arguments(self, x: Tree, theta: Theta) -> Args:
        """What A depends on."""
        return x, theta

    def push(self, x: Tree, of: Of, selected: Selected, tangents: Selected) -> Tree:
        """(ds/dtheta) theta'."""
        return push_forward(lambda s: self.source(x, of(s)), selected, tangents)

    def pull(self, x: Tree, of: Of, selected: Selected, w: Tree) -> Selected:
        """(ds/dtheta)' w."""
        return torch.func.vjp(lambda s: self.source(x, of(s)), selected)[1](w)[0]


class Equation(Rule):
    """A rule whose equation is given by one function of (x, *theta), and how well an x satisfies it.

    `scalar` says that the function is a loss.
    """

    scalar: ClassVar[bool] = False

    @abstractmethod
    def value(self, x: Tree, theta: Theta) -> Tree:
        """The function."""

    @abstractmethod
    def residual(self, x: Tree, theta: Theta) -> Tree:
        """What is 0 at the solution, a pytree like x."""

    def target(self, tol: float, size: Tensor) -> Tensor:
        """What the norm of the residual may be, for an x of this norm."""
        return torch.full_like(size, tol)


@dataclass(frozen=True)
class Root(Equation):
    """F(x, *theta) = 0."""

    function: Function

    @property
    def operator(self) -> Operator:
        return Jacobian(self.function)

    def value(self, x: Tree, theta: Theta) -> Tree:
        return self.function(x, *theta)

    def residual(self, x: Tree, theta: Theta) -> Tree:
        return self.function(x, *theta)

    def source(self, x: Tree, theta: Theta) -> Tree:
        return pytree.tree_map(torch.neg, self.function(x, *theta))


@dataclass(frozen=True)
class FixedPoint(Equation):
    """f(x, *theta) = x."""

    function: Function

    @property
    def operator(self) -> Operator:
        return IdentityMinus(Jacobian(self.function))

    def value(self, x: Tree, theta: Theta) -> Tree:
        return self.function(x, *theta)

    def residual(self, x: Tree, theta: Theta) -> Tree:
        return pytree.tree_map(torch.sub, self.function(x, *theta), x)

    def target(self, tol: float, size: Tensor) -> Tensor:
        return tol * torch.clamp(size, min=1)

    def source(self, x: Tree, theta: Theta) -> Tree:
        return self.function(x, *theta)


@dataclass(frozen=True)
class Stationary(Equation):
    """dL/dx(x, *theta) = 0 for a scalar L: the root of its gradient, with a symmetric A."""

    loss: Callable[..., Tensor]
    scalar: ClassVar[bool] = True

    @property
    def operator(self) -> Operator:
        return Hessian(self.loss)

    def value(self, x: Tree, theta: Theta) -> Tensor:
        return self.loss(x, *theta)

    def residual(self, x: Tree, theta: Theta) -> Tree:
        return plain_gradient(lambda x: self.loss(x, *theta), x)

    def source(self, x: Tree, theta: Theta) -> Tree:
        return pytree.tree_map(torch.neg, torch.func.grad(lambda x: self.loss(x, *theta))(x))

    def pull(self, x: Tree, of: Of, selected: Selected, w: Tree) -> Selected:
        """-(d2L/dx dtheta)' w = -d/de dL/dtheta(x + e w): second derivatives commute, so forward over reverse."""

        def gradient(x: Tree) -> Selected:
            return torch.func.grad(lambda s: self.loss(x, *of(s)))(selected)

        return pytree.tree_map(torch.neg, push_forward(gradient, x, w))


@dataclass(frozen=True)
class System(Rule):
    """A(args) x = b, with theta = (b, args)."""

    matrix: Operator

    @property
    def operator(self) -> Operator:
        return self.matrix

    def arguments(self, x: Tree, theta: Theta) -> Args:
        return theta[1]

    def source(self, x: Tree, theta: Theta) -> Tree:
        b, args = theta
        return pytree.tree_map(torch.sub, b, self.matrix.bind(args, x, constant=False)(x))
