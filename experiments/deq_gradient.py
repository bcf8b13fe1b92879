"""The derivative of an equilibrium beside backpropagation through the steps that lead to it: error, time, memory."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.deq_config import GradientConfig
from experiments.deq_network import Classifier
from theria.meta.implicit import Anderson
from theria.meta.solvers import GMRES
from theria.nn.equilibrium import DeepEquilibrium
from theria.testing.memory import PeakMemory


class UnrolledEquilibrium(nn.Module):
    """`steps` applications of the block from zero, through all of which autograd goes."""

    def __init__(self, block: nn.Module, steps: int) -> None:
        super().__init__()
        self.block, self.steps = block, steps

    def forward(self, x: Tensor) -> Tensor:
        """x (...) -> z (...)."""
        z = torch.zeros_like(x)
        for _ in range(self.steps):
            z = self.block(x, z)
        return z


def compare(network: Classifier, x: Tensor, y: Tensor, config: GradientConfig) -> dict[str, Any]:
    """Gradients of the cross-entropy in all parameters, float64: by the implicit rule, and through so many steps.

    Args:
        network: one whose core is a DeepEquilibrium; it stays as it is.
        x, y: (B, 64) images and (B,) labels.

    Returns:
        By "implicit" and "unrolled_<steps>": seconds and peak MiB of forward and backward; of the latter also
        |g - g_implicit| / |g_implicit|.
    """
    network, x = copy.deepcopy(network).double(), x.double()
    core = network.core
    assert isinstance(core, DeepEquilibrium)
    core.solver, core.tol, core.max_iter = Anderson(check_every=1), config.tol, config.max_iter
    core.linear_solver = GMRES(rtol=config.tol, max_iterations=config.max_iter)
    wanted, found = _measured(network, x, y, config.repeats)
    solution = core.solve(network.embed(x))
    results = {"implicit": {**found, "iterations": int(solution.iterations)}}
    for steps in config.unrolled:
        network.core = UnrolledEquilibrium(core.block, steps)
        gradient, found = _measured(network, x, y, config.repeats)
        difference = float((gradient - wanted).norm() / wanted.norm())
        results[f"unrolled_{steps}"] = {**found, "relative_difference": difference}
    return results


def _measured(network: Classifier, x: Tensor, y: Tensor, repeats: int) -> tuple[Tensor, dict[str, float]]:
    """The gradient as one vector, and what it costs."""
    parameters = list(network.parameters())

    def gradient() -> Tensor:
        grads = torch.autograd.grad(F.cross_entropy(network(x), y), parameters)
        return torch.cat([grad.flatten() for grad in grads])

    value = gradient()  # the first call of anything is slow
    seconds = statistics.median(_seconds(gradient) for _ in range(repeats))
    return value, {"seconds": seconds, "peak_mib": peak_mib(gradient)}


def peak_mib(function: Callable[[], Any]) -> float:
    """The most tensor memory that a call needs at a time beyond what was there before."""
    with PeakMemory() as memory:
        function()
    return memory.peak / 2**20


def _seconds(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun
