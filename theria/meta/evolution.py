"""Gradients of long unrolled computations from function values alone: evolution strategies over truncations.

A computation of many steps is cut into truncations: s_{k+1}, L_k = unroll(s_k, theta). Wanted is the gradient of
sum_k L_k in theta, smoothed by noise of deviation sigma. Particles i carry a state each. In a truncation every particle
draws eps_i ~ N(0, sigma^2 I), runs with theta + eps_i, and

    truncated ES:   g = 1 / (n sigma^2) sum_i eps_i L_i                                                         (1)
    PES:            xi_i <- xi_i + eps_i,   g = 1 / (n sigma^2) sum_i xi_i L_i                                  (2)

Equation 1 does not see how the noise of earlier truncations changed the state: it is biased to the short horizon.
Equation 2 gives a loss to all the noise that shaped it, and is unbiased for the smoothed sum (Vicol, Metz and
Sohl-Dickstein 2021, arXiv 2112.13835, algorithm 2); its variance grows with the number of truncations. Particles come
in antithetic pairs, eps and -eps, each with its own state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
Unroll = Callable[[Tree, Tree], tuple[Tree, Tensor]]


class EvolutionState(NamedTuple):
    """Of n particles, each leaf with a leading n.

    Attributes:
        inner: the state of each particle's computation.
        perturbation: xi, the noise that each particle has seen since the start (PES), or in the last truncation (ES).
    """

    inner: Tree
    perturbation: Tree


class EvolutionInfo(NamedTuple):
    """Of one truncation.

    Attributes:
        gradient: the estimate, a pytree like theta.
        losses: (n,), of each particle.
    """

    gradient: Tree
    losses: Tensor


@dataclass(frozen=True)
class _EvolutionStrategy:
    """Antithetic Gaussian estimates.

    Args:
        sigma: deviation of the noise: large smooths more and varies less.
        particles: n, even.
    """

    sigma: float
    particles: int
    persistent: ClassVar[bool]

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma={self.sigma}: give a positive finite deviation, such as 0.1")
        if isinstance(self.particles, bool) or not isinstance(self.particles, int) or self.particles < 2:
            raise ValueError(f"particles={self.particles!r}: give an even number of at least 2")
        if self.particles % 2:
            raise ValueError(f"particles={self.particles}: particles come in pairs; give {self.particles + 1}")

    def init(self, theta: Tree, inner: Tree) -> EvolutionState:
        """All particles in the state `inner`, no noise yet; also how a new computation begins after the last step.

        Args:
            theta: a pytree of floating-point tensors: what the gradient is of.
            inner: the state of one computation, a pytree of tensors.
        """
        copies = pytree.tree_map(lambda x: x.detach().expand(self.particles, *x.shape).clone(), inner)
        return EvolutionState(copies, pytree.tree_map(lambda x: x.new_zeros(self.particles, *x.shape), theta))

    def step(
        self,
        unroll: Unroll,
        theta: Tree,
        state: EvolutionState,
        generator: torch.Generator | None = None,
        *,
        chunk_size: int | None = None,
        randomness: str = "error",
    ) -> tuple[EvolutionState, EvolutionInfo]:
        """One truncation.

        Args:
            unroll: (inner, theta) -> (inner after some steps, loss of them); of one particle, runs under `vmap`. It
                needs no derivative: its loss may be an error rate.
            theta: the same as in the last truncation, or updated since: the noise stays that of the particles.
            generator: of the noise, on the device of theta; None for torch's own.
            chunk_size: how many particles run at once; None for all.
            randomness: of random numbers that `unroll` draws, as in `torch.func.vmap`; "same" for common ones.
        """
        with torch.no_grad():
            theta = pytree.tree_map_only(Tensor, Tensor.detach, theta)
            noise = pytree.tree_map(lambda x: self._antithetic(x, generator), theta)
            perturbed = pytree.tree_map(torch.add, theta, noise)
            run = torch.func.vmap(unroll, chunk_size=chunk_size, randomness=randomness)
            inner, losses = run(state.inner, perturbed)
            if losses.ndim != 1:
                raise ValueError(f"unroll returned a loss of shape {tuple(losses.shape[1:])}: a scalar is needed")
            seen = pytree.tree_map(torch.add, state.perturbation, noise) if self.persistent else noise
            scale = self.particles * self.sigma**2
            gradient = pytree.tree_map(lambda xi: torch.tensordot(losses.to(xi.dtype), xi, 1) / scale, seen)
            return EvolutionState(inner, seen), EvolutionInfo(gradient, losses)

    def _antithetic(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """(n, *x): the second half is the negative of the first."""
        shape = (self.particles // 2, *x.shape)
        half = self.sigma * torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device)
        return torch.cat([half, -half])


@dataclass(frozen=True)
class PES(_EvolutionStrategy):
    """Persistent evolution strategies, equation 2: unbiased over any number of truncations.

    Call `init` again when the computation ends: with the state, the noise that belongs to it starts anew.
    """

    persistent: ClassVar[bool] = True


@dataclass(frozen=True)
class TruncatedES(_EvolutionStrategy):
    """Evolution strategies on each truncation by itself, equation 1: blind to every effect beyond it."""

    persistent: ClassVar[bool] = False
