"""A linear system on pytrees as one on vectors (N,), N the number of entries of b.

The Krylov methods run on one vector, so that an inner product is one kernel however many tensors the pytree has.
They solve the scaled residual equation A d = r0, r0 = (b - A x0) / s with s = max|b - A x0|, from d = 0, and
x = x0 + s d. So a warm start needs nothing of a method, and squares neither overflow nor underflow with b.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.levels import carries_derivative
from theria.meta.solvers.loop import (
    BREAKDOWN,
    CONVERGED,
    INDEFINITE,
    MAX_ITERATIONS,
    NON_FINITE,
    RUNNING,
    nonzero,
    norm,
)
from theria.meta.solvers.solution import Solution

Tree = Any  # a pytree of floating-point tensors
LinearMap = Callable[[Tree], Tree]
VectorMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Transposable:
    """A linear map on pytrees of one structure and shapes that knows how its transpose is made."""

    product: LinearMap
    transpose: Callable[[], LinearMap]

    def __call__(self, v: Tree) -> Tree:
        return self.product(v)


@dataclass(frozen=True)
class Space:
    """Pytrees of one structure and fixed shapes."""

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tree: Tree, name: str) -> "Space":
        leaves, spec = pytree.tree_flatten(tree)
        if not all(isinstance(leaf, Tensor) for leaf in leaves) or not sum(leaf.numel() for leaf in leaves):
            raise ValueError(f"{name} has to be a pytree of tensors with at least one entry")
        kinds = {(leaf.dtype, leaf.device) for leaf in leaves}
        if len(kinds) > 1 or not leaves[0].is_floating_point():
            listed = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"{name} has {listed}: give tensors of one real floating-point dtype on one device")
        return Space(spec, tuple(leaf.shape for leaf in leaves), leaves[0].dtype)

    def ravel(self, tree: Tree, name: str) -> Tensor:
        """(N,), all entries; raises where structure, shapes or dtype are others than those of this space."""
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise ValueError(f"{name} has the structure {spec}, where {self.spec} is needed")
        shapes = tuple(leaf.shape for leaf in leaves)
        if shapes != self.shapes:
            raise ValueError(
                f"{name} has shapes {[*map(tuple, shapes)]}, where {[*map(tuple, self.shapes)]} are needed"
            )
        if any(leaf.dtype != self.dtype for leaf in leaves):
            raise ValueError(f"{name} has {[leaf.dtype for leaf in leaves]}, where {self.dtype} is needed")
        # torch.compile cannot trace the look at the levels of torch.func.
        if not torch.compiler.is_compiling() and any(carries_derivative(leaf) for leaf in leaves):
            raise ValueError(
                f"{name} is being differentiated (requires_grad=True, or a tangent), and a solve is not to be "
                f"differentiated through its iterations: use an implicit rule, whose derivative is one more solve. "
                f"If its derivative is not wanted, detach it or solve under torch.no_grad()"
            )
        return torch.cat([leaf.reshape(-1) for leaf in leaves])

    def unravel(self, x: Tensor) -> Tree:
        pieces = x.split([shape.numel() for shape in self.shapes])
        return pytree.tree_unflatten([p.reshape(s) for p, s in zip(pieces, self.shapes, strict=True)], self.spec)


def without_gradient(tree: Tree) -> Tree:
    """Under `torch.no_grad()` the tree detached; else the tree itself, which `Space.ravel` then looks at."""
    return tree if torch.is_grad_enabled() else pytree.tree_map_only(Tensor, Tensor.detach, tree)


def on_vectors(function: LinearMap, domain: Space, image: Space, name: str) -> VectorMap:
    """`function` from vectors to vectors."""
    return lambda x: image.ravel(function(domain.unravel(x)), f"the value of {name}")


@dataclass(frozen=True)
class System:
    """A d = residual from d = 0, see the module's docstring."""

    apply: VectorMap
    precondition: VectorMap
    domain: Space
    b: Tensor
    start: Tensor
    scale: Tensor
    residual: Tensor
    target: Tensor  # (): converged means ||b - A x|| <= target

    @property
    def goal(self) -> Tensor:
        """Where the recursions stop, in scaled units. Half of the target: the true residual is what is judged."""
        return 0.5 * self.target / self.scale

    @staticmethod
    def of(
        apply: VectorMap, precondition: VectorMap, domain: Space, b: Tensor, x0: Tensor | None, rtol: float, atol: float
    ) -> "System":
        size = norm(b)
        residual, start = b, x0
        if start is None:
            start = b.new_zeros(sum(shape.numel() for shape in domain.shapes))
        else:
            start = torch.where(size == 0, torch.zeros_like(start), start)  # the answer to b = 0 is 0
            residual = b - apply(start)
        scale = nonzero(residual.abs().amax())
        target = torch.clamp(rtol * size, min=atol)
        return System(apply, precondition, domain, b, start, scale, residual / scale, target)

    def finish(self, d: Tensor, status: Tensor, iterations: Tensor) -> Solution:
        """The solution with its true residual; what a recursion believed does not count."""
        x = self.start + self.scale * d
        return conclude(self.domain.unravel(x), norm(self.b - self.apply(x)), self.target, status, iterations)


def conclude(value: Tree, residual: Tensor, target: Tensor, status: Tensor, iterations: Tensor) -> Solution:
    """Judge a value by its residual.

    Indefinite and non-finite stay what they are. Otherwise a residual within the target is converged; one that is not,
    though the recursion thought so, is a breakdown.
    """
    failed = torch.where(status == CONVERGED, BREAKDOWN, torch.where(status == RUNNING, MAX_ITERATIONS, status))
    certain = (status == INDEFINITE) | (status == NON_FINITE)
    result = torch.where((residual <= target) & ~certain, CONVERGED, failed)
    result = torch.where(residual.isfinite(), result, NON_FINITE)
    return Solution(value, result, residual, iterations)
