"""Deep equilibrium models: a block applied to its own output until nothing changes (Bai et al. 2019, arXiv 1909.01377).

Depth is a tolerance, not a number of layers, and memory does not depend on it: the derivative is that of the fixed
point.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from theria.meta.implicit import Method, fixed_point
from theria.meta.solvers import LinearSolver, Solution
from theria.nn.attention import MultiheadAttention
from theria.nn.norm import LayerNorm


class DeepEquilibrium(nn.Module):
    """z with z = block(x, z), differentiable in x and in the block's parameters.

    The batch is one equation, solved until its residual as a whole is small; under `torch.func.vmap` each sample is
    its own. The block must be the same function at each call: no dropout, no running averages that it updates.

    Args:
        block: (x, z) -> a tensor like z; a contraction in z near the equilibrium, or `solver=Anderson()`.
        solver, linear_solver, tol, max_iter, throw: those of `theria.meta.implicit.fixed_point`.

    Raises:
        SolverError: by forward and by backward, with `throw`, where a solve does not converge.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        solver: Method | None = None,
        linear_solver: LinearSolver | None = None,
        tol: float = 1e-6,
        max_iter: int = 100,
        throw: bool = True,
    ) -> None:
        super().__init__()
        self.block = block
        self.solver, self.linear_solver = solver, linear_solver
        self.tol, self.max_iter, self.throw = tol, max_iter, throw

    def forward(self, x: Tensor, z0: Tensor | None = None) -> Tensor:
        """x (...), z0 (...) where to start, default 0 -> z (...)."""
        return self.solve(x, z0).value

    def solve(self, x: Tensor, z0: Tensor | None = None) -> Solution:
        """The equilibrium with its result, residual and iterations."""
        weights = dict(self.block.named_parameters()), dict(self.block.named_buffers())
        return fixed_point(
            self._step,
            torch.zeros_like(x) if z0 is None else z0,
            x,
            weights,
            solver=self.solver,
            linear_solver=self.linear_solver,
            tol=self.tol,
            max_iter=self.max_iter,
            throw=self.throw,
        )

    def _step(self, z: Tensor, x: Tensor, weights: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Tensor:
        return functional_call(self.block, weights, (x, z))

    def extra_repr(self) -> str:
        return f"tol={self.tol}, max_iter={self.max_iter}, solver={self.solver}"


class EquilibriumBlock(nn.Module):
    """A transformer block with the input injected: h = norm(x + attention(z)), z <- norm(h + feed-forward(h)).

    The output layers start at `gain` times their usual size, so that the block starts as a contraction in z; nothing
    keeps it one in training, and an equilibrium that is not reached raises.

    Args:
        d_model: width of the tokens; a multiple of `n_heads`.
        n_heads: number of heads.
        d_ff: width of the feed-forward; default 4 d_model.
        gain: of the attention's and the feed-forward's output at the start.
        backend: which implementation of attention runs, see `theria.ops.sdpa`.
    """

    def __init__(
        self, d_model: int, n_heads: int, *, d_ff: int | None = None, gain: float = 0.5, backend: str = "auto"
    ) -> None:
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        self.attention = MultiheadAttention(d_model, n_heads, backend=backend)
        self.norm1 = LayerNorm(d_model)
        last = nn.Linear(d_ff, d_model)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), last)
        self.norm2 = LayerNorm(d_model)
        with torch.no_grad():
            for weight in (self.attention.out.weight, last.weight):
                weight.mul_(gain)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z (..., N, d_model) -> (..., N, d_model)."""
        h = self.norm1(x + self.attention(z))
        return self.norm2(h + self.feed_forward(h))
