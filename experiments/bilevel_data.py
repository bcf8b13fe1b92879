"""What the problems of `python -m experiments.bilevel` share: stages, and data that scikit-learn carries."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.bilevel_config import HyperCleaningConfig, RidgeConfig
from experiments.errors import UserError
from theria.meta.bilevel import BilevelProblem

Figures = dict[str, float]


@dataclass(frozen=True)
class Stage:
    """One outer optimisation.

    Attributes:
        problem: what is minimised.
        outer0, inner0: where it begins.
        largest: outer -> a bound of the largest eigenvalue of the inner Hessian, () : its inverse is a safe rate.
        figures: (outer, inner) -> what a line of metrics.jsonl shows.
    """

    problem: BilevelProblem
    outer0: Tensor
    inner0: Tensor
    largest: Callable[[Tensor], Tensor]
    figures: Callable[[Tensor, Tensor], Figures]


@dataclass(frozen=True)
class Experiment:
    """Stages, in order, and what their answers amount to: (the outer variable of each stage) -> results."""

    stages: dict[str, Stage]
    report: Callable[[dict[str, Tensor]], dict[str, Any]]


def load(name: str) -> tuple[Tensor, Tensor]:
    """A data set that scikit-learn carries, "digits" or "diabetes", in float64."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise UserError('scikit-learn is not installed: pip install -e ".[experiments]"') from error
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return torch.from_numpy(x).double(), torch.from_numpy(y)


def split(n: int, config: HyperCleaningConfig | RidgeConfig, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the training, validation and test samples.

    Raises:
        UserError: where nothing is left to test on.
    """
    if config.train < 1 or config.validation < 1 or config.train + config.validation >= n:
        raise UserError(
            f"problem.train={config.train}, problem.validation={config.validation}: both are at least 1, and of {n} "
            f"samples some have to be left to test on"
        )
    order = torch.randperm(n, generator=source)
    return order[: config.train], order[config.train :][: config.validation], order[config.train + config.validation :]
