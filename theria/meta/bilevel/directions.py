"""The directions that the single-loop methods follow, and the rates with which they do."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from theria.meta.bilevel.problem import BilevelProblem
from theria.meta.bilevel.trees import Tree, add, dot
from theria.meta.constant import plain_gradient

Rate = float | Callable[[Tensor], Tensor]  # a constant, or a function of the step counted from 0


class Directions(NamedTuple):
    """What a step subtracts, times the rates.

    Attributes:
        inner: D_z = dg/dz.
        v: D_v = H v + df/dz.
        outer: D_x = (d2g/dx dz) v + df/dx: the hypergradient when z and v are solutions.
    """

    inner: Tree
    v: Tree
    outer: Tree


class InnerTerms(NamedTuple):
    """What the directions take from g: dg/dz, H v, (d2g/dx dz) v."""

    gradient: Tree
    hessian: Tree
    cross: Tree


class OuterTerms(NamedTuple):
    """What the directions take from f: df/dz, df/dx."""

    inner: Tree
    outer: Tree


def inner_terms(problem: BilevelProblem, z: Tree, v: Tree, x: Tree) -> InnerTerms:
    """One double backward gives all three: the gradients in z and in x of <dg/dz, v>, and dg/dz beside them."""

    def along(z: Tree, x: Tree) -> tuple[Tensor, Tree]:
        gradient = torch.func.grad(problem.g)(z, x)
        return dot(gradient, v), gradient

    (hessian, cross), gradient = torch.func.grad(along, (0, 1), has_aux=True)(z, x)
    return InnerTerms(gradient, hessian, cross)


def outer_terms(problem: BilevelProblem, z: Tree, x: Tree) -> OuterTerms:
    return OuterTerms(*plain_gradient(lambda both: problem.f(*both), (z, x)))


def combine(g: InnerTerms, f: OuterTerms) -> Directions:
    """Sums, and so unbiased where the terms are (Dagréou et al. 2022, arXiv 2201.13409, section 2)."""
    return Directions(g.gradient, add(g.hessian, f.inner), add(g.cross, f.outer))


def rate_at(rate: Rate, step: Tensor) -> float | Tensor:
    return rate(step) if callable(rate) else rate


def check_rates(**rates: Rate | None) -> None:
    for name, rate in rates.items():
        if rate is not None and not callable(rate) and not (math.isfinite(rate) and rate >= 0):
            raise ValueError(f"{name}={rate}: give a finite number of at least 0, or a function of the step")
