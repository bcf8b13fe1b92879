"""Pytrees as vectors (N,), N the number of their entries, and the random vectors of the estimators."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any  # a pytree of floating-point tensors
LinearMap = Callable[[Tree], Tree]
VectorMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layout:
    """Pytrees of one structure, shapes, dtype and device."""

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tree: Tree, name: str) -> "Layout":
        leaves, spec = pytree.tree_flatten(tree)
        if not leaves or not all(isinstance(x, Tensor) for x in leaves) or not sum(x.numel() for x in leaves):
            given = ", ".join(sorted({type(x).__name__ for x in leaves})) or "no leaves"
            raise ValueError(f"{name} must be a pytree of tensors with at least one entry; given {given}.")
        kinds = {(x.dtype, x.device) for x in leaves}
        if len(kinds) > 1 or not leaves[0].is_floating_point():
            given = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise ValueError(f"{name} must be of one real floating-point dtype on one device; given {given}.")
        return Layout(spec, tuple(x.shape for x in leaves), leaves[0].dtype, leaves[0].device)

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes)

    def ravel(self, tree: Tree, name: str) -> Tensor:
        """(N,), all entries; raises where structure, shapes or dtype are others than those of this layout."""
        leaves, spec = pytree.tree_flatten(tree)
        shapes = tuple(x.shape for x in leaves)
        if spec != self.spec or shapes != self.shapes or any(x.dtype != self.dtype for x in leaves):
            given = f"{spec} with {[(tuple(x.shape), x.dtype) for x in leaves]}"
            raise ValueError(
                f"{name} must be a pytree {self.spec} with shapes {[*map(tuple, self.shapes)]} in {self.dtype}; "
                f"given {given}."
            )
        return torch.cat([x.reshape(-1) for x in leaves])

    def unravel(self, x: Tensor) -> Tree:
        """(N,) -> the pytree."""
        pieces = x.split([shape.numel() for shape in self.shapes])
        return pytree.tree_unflatten([p.reshape(s) for p, s in zip(pieces, self.shapes, strict=True)], self.spec)

    def on_vectors(self, matvec: LinearMap) -> VectorMap:
        """`matvec`, which maps pytrees to pytrees, as a map from (N,) to (N,)."""
        return lambda x: self.ravel(matvec(self.unravel(x)), "the value of matvec")


def many(function: VectorMap, vectors: Tensor, chunk_size: int | None) -> Tensor:
    """`function` on each row, `chunk_size` of them at once under `vmap`; one at a time without it."""
    if chunk_size == 1 or len(vectors) == 1:
        return torch.stack([function(v) for v in vectors])
    return torch.func.vmap(function, chunk_size=chunk_size)(vectors)


def check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give an integer of at least {least}.")


def generator_of(seed: int | torch.Generator) -> torch.Generator:
    """A generator of its own for a number, so that nothing global is read or advanced; a generator is used as it is.

    A number draws on the CPU, so that it means the same vectors on every device.
    """
    if isinstance(seed, torch.Generator):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: give an integer or a torch.Generator.")
    return torch.Generator().manual_seed(seed)


def normal(layout: Layout, generator: torch.Generator) -> Tensor:
    """(N,) standard normal numbers."""
    x = torch.randn(layout.size, generator=generator, device=generator.device, dtype=torch.float64)
    return x.to(layout.dtype).to(layout.device)


def rademacher(layout: Layout, count: int, generator: torch.Generator) -> Tensor:
    """(count, N) of ±1. Drawn row by row: a row does not depend on how many are drawn at once."""
    draws = (torch.randint(2, (layout.size,), generator=generator, device=generator.device) for _ in range(count))
    return torch.stack([2 * x.to(layout.dtype).to(layout.device) - 1 for x in draws])


def chunks(total: int, chunk_size: int | None) -> Iterator[int]:
    """Sizes of at most `chunk_size` that add up to `total`."""
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, 1)
    size = chunk_size or total
    for start in range(0, total, size):
        yield min(size, total - start)
