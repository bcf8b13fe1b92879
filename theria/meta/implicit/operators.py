"""Linear operators that depend on tensors, as values: A(args), given by its products.

An operator is bound to its arguments once for each solve, so that what all products share (the forward pass of a
transposed Jacobian) is computed once.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.implicit.forward_mode import hessian_product, push_forward
from theria.meta.implicit.frozen import Tree
from theria.meta.solvers.system import LinearMap, Transposable

Args = tuple[Any, ...]
Function = Callable[..., Any]


class Operator(ABC):
    """A square linear map on pytrees, a differentiable function of its arguments."""

    @abstractmethod
    def bind(self, args: Args, like: Tree, constant: bool) -> LinearMap:
        """v -> A(args) v.

        Args:
            like: a pytree of the structure and shapes of v.
            constant: nothing will differentiate the products in reverse, which spares memory.
        """

    @property
    def T(self) -> "Operator":
        return Transposed(self)

    def constant(self, args: Args, like: Tree) -> "Transposable":
        """v -> A(args) v for a solver."""
        transpose = self.T
        return Transposable(self.bind(args, like, constant=True), lambda: transpose.bind(args, like, constant=True))


@dataclass(frozen=True)
class Transposed(Operator):
    """u -> A'u by reverse mode through one product of A, whatever the point: a linear map is its own derivative."""

    operator: Operator

    def bind(self, args: Args, like: Tree, constant: bool) -> LinearMap:
        pull = torch.func.vjp(self.operator.bind(args, like, constant), like)[1]
        return lambda u: pull(u)[0]

    @property
    def T(self) -> Operator:
        return self.operator


@dataclass(frozen=True)
class Products(Operator):
    """v -> matvec(v, *args), the user's."""

    matvec: Function
    symmetric: bool

    def bind(self, args: Args, like: Tree, constant: bool) -> LinearMap:
        return lambda v: self.matvec(v, *args)

    @property
    def T(self) -> Operator:
        return self if self.symmetric else Transposed(self)


@dataclass(frozen=True)
class Jacobian(Operator):
    """v -> dF/dx(x, *theta) v, with args = (x, theta)."""

    function: Function

    def bind(self, args: Args, like: Tree, constant: bool) -> LinearMap:
        x, theta = args
        return lambda v: push_forward(lambda x: self.function(x, *theta), x, v)

    @property
    def T(self) -> Operator:
        return JacobianTransposed(self.function)


@dataclass(frozen=True)
class JacobianTransposed(Operator):
    """u -> dF/dx(x, *theta)' u, with args = (x, theta): one forward pass for all products."""

    function: Function

    def bind(self, args: Args, like: Tree, constant: bool) -> LinearMap:
        x, theta = args
        pull = torch.func.vjp(lambda x: self.function(x, *theta), x)[1]
        return lambda u: pull(u)[0]

    @property
    def T(self) -> Operator:
        return Jacobian(self.function)


@dataclass(frozen=True)
class IdentityMinus(Operator):
    """v -> v - A v."""

    operator: Operator

    def bind(self, args: Args, like: Tree, constant: bool) -> LinearMap:
        product = self.operator.bind(args, like, constant)
        return lambda v: pytree.tree_map(torch.sub, v, product(v))

    @property
    def T(self) -> Operator:
        return IdentityMinus(self.operator.T)


@dataclass(frozen=True)
class Hessian(Operator):
    """v -> d2L/dx2(x, *theta) v, with args = (x, theta): forward over reverse, symmetric.

    Constant products free each activation as the pass is beyond it, and keep nothing from one product to the next.
    """

    loss: Callable[..., Tensor]

    def bind(self, args: Args, like: Tree, constant: bool) -> LinearMap:
        x, theta = args
        return lambda v: hessian_product(lambda x: self.loss(x, *theta), x, v, constant)

    @property
    def T(self) -> Operator:
        return self
