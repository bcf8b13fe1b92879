"""Ridge regression on the diabetes data; x is the logarithm of the penalty, then of one penalty for each feature.

The features are the 10 of the data set and their 55 products, standardised. Inner: mean r^2 / 2 + sum_j exp(x_j)
w_j^2 / 2 on the training samples; outer: mean r^2 / 2 on the validation samples.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.bilevel_config import RidgeConfig
from experiments.bilevel_data import Experiment, Figures, Stage, load, split
from experiments.errors import UserError
from theria.meta.bilevel import BilevelProblem


def build(config: RidgeConfig, seed: int) -> Experiment:
    """Two stages, "single" and "per_feature".

    Raises:
        UserError: a grid or sizes that do not fit.
    """
    if config.grid < 3 or not config.grid_from < config.grid_to:
        raise UserError(
            "problem.grid, grid_from, grid_to: needed are 3 points or more, from a lower to a higher number"
        )
    ridge = draw(config, seed)
    problem = BilevelProblem(ridge.inner_loss, ridge.outer_loss)
    top = torch.linalg.eigvalsh(ridge.gram)[-1]
    start = torch.tensor(config.start, dtype=torch.float64)

    def stage(x: Tensor) -> Stage:
        return Stage(problem, x, torch.zeros_like(ridge.moment), lambda x: top + x.exp().max(), ridge.figures)

    stages = {"single": stage(start), "per_feature": stage(start.expand_as(ridge.moment).clone())}
    return Experiment(stages, ridge.report)


def draw(config: RidgeConfig, seed: int) -> "Ridge":
    """Split and standardise the data, by the seed."""
    X, y = load("diabetes")
    y = y.double()
    train, validation, test = split(len(y), config, torch.Generator().manual_seed(seed))
    X = (X - X[train].mean(0)) / X[train].std(0)
    i, j = torch.triu_indices(X.shape[1], X.shape[1])
    X = torch.cat([X, X[:, i] * X[:, j]], 1)
    X = (X - X[train].mean(0)) / X[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    samples = ((X[which], y[which]) for which in (train, validation, test))
    return Ridge(*samples, grid=torch.linspace(config.grid_from, config.grid_to, config.grid, dtype=torch.float64))


@dataclass(frozen=True)
class Ridge:
    """The problem, its closed form, and what its answer amounts to.

    Attributes:
        train, validation, test: X (n, p) and y (n,).
        grid: logarithms of single penalties to compare with.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    grid: Tensor

    @property
    def gram(self) -> Tensor:
        return self.train[0].T @ self.train[0] / len(self.train[1])

    @property
    def moment(self) -> Tensor:
        return self.train[0].T @ self.train[1] / len(self.train[1])

    def inner_loss(self, w: Tensor, x: Tensor) -> Tensor:
        return error(w, self.train) / 2 + (x.exp() * w.square()).sum() / 2

    def outer_loss(self, w: Tensor, x: Tensor) -> Tensor:
        return error(w, self.validation) / 2

    def solution(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.gram + torch.diag(x.exp().expand_as(self.moment)), self.moment)

    def value(self, x: Tensor) -> Tensor:
        """h in closed form; its gradient by autograd is the hypergradient."""
        return self.outer_loss(self.solution(x), x)

    def figures(self, x: Tensor, w: Tensor) -> Figures:
        return {"validation_error": float(error(w, self.validation)), "test_error": float(error(w, self.test))}

    def report(self, outer: dict[str, Tensor]) -> dict[str, Any]:
        best = self.grid[torch.func.vmap(self.value)(self.grid).argmin()]
        points = {**outer, "grid": best, "no_penalty": best - 60}
        errors = {
            f"{name}_error": {point: float(error(self.solution(x), samples)) for point, x in points.items()}
            for name, samples in (("validation", self.validation), ("test", self.test))
        }
        step = float(self.grid[1] - self.grid[0])
        return {
            "log_penalty": {"learned": float(outer["single"]), "grid": float(best), "step": step},
            "log_penalty_per_feature": outer["per_feature"].tolist(),
            **errors,
            "hypergradient_left": {name: float(torch.func.grad(self.value)(x).norm()) for name, x in outer.items()},
            "samples": {name: len(getattr(self, name)[1]) for name in ("train", "validation", "test")},
        }


def error(w: Tensor, samples: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    X, y = samples
    return (X @ w - y).square().mean()
