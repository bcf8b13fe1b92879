"""The little of linear algebra on pytrees that the bilevel methods need."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any  # a pytree of floating-point tensors


def add(a: Tree, b: Tree) -> Tree:
    return pytree.tree_map(torch.add, a, b)


def subtract(a: Tree, b: Tree) -> Tree:
    return pytree.tree_map(torch.sub, a, b)


def scaled(factor: float | Tensor, a: Tree) -> Tree:
    return pytree.tree_map(lambda x: factor * x, a)


def descend(a: Tree, rate: float | Tensor, direction: Tree) -> Tree:
    """a - rate * direction, in the dtype of a."""
    return pytree.tree_map(lambda x, d: x - (rate * d).to(x.dtype), a, direction)


def zeros_like(a: Tree) -> Tree:
    return pytree.tree_map(torch.zeros_like, a)


def dot(a: Tree, b: Tree) -> Tensor:
    """<a, b> over all leaves."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return torch.stack([(x * y).sum() for x, y in pairs]).sum()


def norm(a: Tree) -> Tensor:
    """The 2-norm over all leaves."""
    return dot(a, a).sqrt()


def detached(a: Tree) -> Tree:
    return pytree.tree_map_only(Tensor, Tensor.detach, a)


def copied(a: Tree) -> Tree:
    """Constants in memory of their own: forward mode refuses a tensor whose entries share memory."""
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), a)
