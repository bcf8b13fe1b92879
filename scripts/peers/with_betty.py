"""betty: approximate implicit differentiation by its engine, with the inner problem held at its exact solution."""
# pyright: reportMissingImports=false

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from given import ITERATIONS, Given
from torch import nn
from torches import losses

VERSION = version("betty-ml")


class Variable(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.from_numpy(np.array(value)))

    def forward(self) -> torch.Tensor:
        return self.value


def hypergradient(given: Given, **config: Any) -> np.ndarray:
    """The step that SGD with rate 1 takes in the outer problem; inner SGD with rate 0 stays at the solution."""
    inner_loss, outer_loss = losses(given)

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return outer_loss(self.inner(), self.module())

    class Inner(ImplicitProblem):
        def training_step(self, batch: Any) -> Any:
            return inner_loss(self.module(), self.outer())

    loader = [torch.zeros(1)]
    x, z = Variable(given.outer0), Variable(given.solution)
    config["retain_graph"] = True  # the outer loss reads x itself too
    moving, still = torch.optim.SGD(x.parameters(), lr=1.0), torch.optim.SGD(z.parameters(), lr=0.0)
    outer = Outer("outer", Config(retain_graph=True), x, moving, train_data_loader=loader)
    inner = Inner("inner", Config(unroll_steps=1, **config), z, still, train_data_loader=loader)
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    engine = Engine(
        problems=[outer, inner],
        config=EngineConfig(train_iters=1, valid_step=10**9, strategy="default"),
        dependencies=dependencies,
    )
    engine.run()
    return given.outer0 - x.value.detach().numpy()


def methods(given: Given) -> Mapping[str, Callable[[], np.ndarray]]:
    if given.series is not None:
        options = {"neumann_iterations": given.series, "neumann_alpha": given.rate}
        return {"neumann": partial(hypergradient, given, type="neumann", **options)}
    if not given.solved:
        return {}
    n = min(int(np.size(given.solution)), ITERATIONS)  # exact after as many iterations as unknowns
    return {
        "cg": partial(hypergradient, given, type="cg", cg_iterations=n),
        "neumann": partial(
            hypergradient, given, type="neumann", neumann_iterations=given.steps, neumann_alpha=given.rate
        ),
    }
