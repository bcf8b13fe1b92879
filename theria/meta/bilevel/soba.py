"""SOBA and SABA: the inner variable, the linear system and the outer variable move together, one sample at a time.

Dagréou, Ablin, Vaiter and Moreau 2022, arXiv 2201.13409, algorithm 1 with the directions of section 2:

    z <- z - rho D_z,    v <- v - rho D_v,    x <- x - gamma D_x                                                (2)

all three evaluated at the old point. D_z = dg/dz, D_v = H v + df/dz, D_x = (d2g/dx dz) v + df/dx.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from theria.meta.bilevel.directions import (
    Directions,
    InnerTerms,
    OuterTerms,
    Rate,
    check_rates,
    combine,
    inner_terms,
    outer_terms,
    rate_at,
)
from theria.meta.bilevel.problem import BilevelProblem
from theria.meta.bilevel.trees import Tree, add, copied, descend, subtract, zeros_like


class SOBAState(NamedTuple):
    """z, v, x and the number of steps done; constants."""

    inner: Tree
    v: Tree
    outer: Tree
    step: Tensor


@dataclass(frozen=True)
class _SingleLoop:
    """The rates of equation 2: numbers, or functions of the step (an int64 tensor, from 0).

    Args:
        inner_rate: rho, of z and of v: below 2 / (largest eigenvalue of H).
        outer_rate: gamma; the theory wants it small beside rho.
        linear_rate: another rate for v; None: `inner_rate`.
    """

    inner_rate: Rate
    outer_rate: Rate
    linear_rate: Rate | None = None

    def __post_init__(self) -> None:
        check_rates(inner_rate=self.inner_rate, outer_rate=self.outer_rate, linear_rate=self.linear_rate)

    def _moved(self, z: Tree, v: Tree, x: Tree, step: Tensor, directions: Directions) -> tuple[Tree, Tree, Tree]:
        """Equation 2."""
        rho = rate_at(self.inner_rate, step)
        linear = rho if self.linear_rate is None else rate_at(self.linear_rate, step)
        gamma = rate_at(self.outer_rate, step)
        return descend(z, rho, directions.inner), descend(v, linear, directions.v), descend(x, gamma, directions.outer)


@dataclass(frozen=True)
class SOBA(_SingleLoop):
    """Equation 2 with the terms of two batches: stochastic, without memory; its directions are unbiased.

    With constant rates it ends in a ball around the solution, with rates that fall as the inverse square root of the
    step it converges (theorem 1 of the paper). Arguments: inner_rate, outer_rate, linear_rate, as above.
    """

    def init(self, outer: Tree, inner: Tree, v: Tree | None = None) -> SOBAState:
        """The state at these variables; v starts at 0."""
        return SOBAState(*_start(outer, inner, v))

    def step(self, problem: BilevelProblem, state: SOBAState) -> tuple[SOBAState, Directions]:
        """One step on the batches of `problem`, such as `problem.on(inner_batch, outer_batch)`.

        Returns:
            The new state, and the directions at the old one.
        """
        with torch.no_grad():
            z, v, x, step = state
            directions = combine(inner_terms(problem, z, v, x), outer_terms(problem, z, x))
            return SOBAState(*self._moved(z, v, x, step, directions), step + 1), directions


class Table(NamedTuple):
    """A term of every sample as last seen, with a leading dimension n, and their mean."""

    values: Tree
    mean: Tree


class SABAState(NamedTuple):
    """z, v, x, the number of steps done, and the two memories; constants."""

    inner: Tree
    v: Tree
    outer: Tree
    step: Tensor
    inner_memory: Table
    outer_memory: Table


@dataclass(frozen=True)
class SABA(_SingleLoop):
    """Equation 2 with every term by SAGA's estimate: linear convergence at constant rates on a finite sum.

    A term phi of sample i, last seen as phi_i in the memory, is estimated by phi - phi_i + mean of the memory (section
    2 of the paper; Defazio et al. 2014, arXiv 1407.0202). The losses take the index of a sample as their batch: an
    int64 tensor of no dimension, also under `vmap`.

    Arguments: inner_rate, outer_rate, linear_rate, as above. The memory holds, for each sample of g, two pytrees like z
    and one like x; for each of f one of each. `step` is pure and copies the memory: it costs as much traffic as that.
    """

    def init(
        self,
        problem: BilevelProblem,
        outer: Tree,
        inner: Tree,
        n_inner: int,
        n_outer: int,
        v: Tree | None = None,
        *,
        chunk_size: int | None = None,
    ) -> SABAState:
        """The state at these variables; one pass over all samples fills the memory.

        Args:
            problem: with losses (inner, outer, index).
            n_inner, n_outer: the number of samples of each loss.
            chunk_size: how many samples run at once; None for all.
        """
        with torch.no_grad():
            z, v, x, step = _start(outer, inner, v)
            device = step.device
            rows_g = torch.func.vmap(lambda i: inner_terms(problem.on(i), z, v, x), chunk_size=chunk_size)
            rows_f = torch.func.vmap(lambda j: outer_terms(problem.on(None, j), z, x), chunk_size=chunk_size)
            g, f = rows_g(torch.arange(n_inner, device=device)), rows_f(torch.arange(n_outer, device=device))
            return SABAState(z, v, x, step, Table(g, _mean(g)), Table(f, _mean(f)))

    def step(self, problem: BilevelProblem, state: SABAState, i: Tensor, j: Tensor) -> tuple[SABAState, Directions]:
        """One step on the samples i of g and j of f.

        Args:
            i, j: int64, of no dimension, or (b,) for several samples, all distinct.
        """
        with torch.no_grad():
            z, v, x, step, inner_memory, outer_memory = state
            i, j = i.reshape(-1), j.reshape(-1)
            new_g = torch.func.vmap(lambda i: inner_terms(problem.on(i), z, v, x))(i)
            new_f = torch.func.vmap(lambda j: outer_terms(problem.on(None, j), z, x))(j)
            g, inner_memory = _saga(inner_memory, i, new_g)
            f, outer_memory = _saga(outer_memory, j, new_f)
            directions = combine(InnerTerms(*g), OuterTerms(*f))
            moved = self._moved(z, v, x, step, directions)
            return SABAState(*moved, step + 1, inner_memory, outer_memory), directions


def _start(outer: Tree, inner: Tree, v: Tree | None) -> tuple[Tree, Tree, Tree, Tensor]:
    device = pytree.tree_leaves(inner)[0].device
    step = torch.zeros((), dtype=torch.int64, device=device)
    return copied(inner), zeros_like(inner) if v is None else copied(v), copied(outer), step


def _mean(rows: Tree) -> Tree:
    return pytree.tree_map(lambda row: row.mean(0), rows)


def _saga(memory: Table, index: Tensor, new: Tree) -> tuple[Tree, Table]:
    """SAGA's estimate (a pytree like one row), and the memory with the rows `index` replaced."""
    old = pytree.tree_map(lambda values: values[index], memory.values)
    change = subtract(new, old)
    estimate = add(_mean(change), memory.mean)
    n = pytree.tree_leaves(memory.values)[0].shape[0]
    mean = pytree.tree_map(lambda mean, change: mean + change.sum(0) / n, memory.mean, change)
    values = pytree.tree_map(lambda values, rows: values.index_copy(0, index, rows), memory.values, new)
    return estimate, Table(values, mean)
