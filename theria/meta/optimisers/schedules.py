"""Rates as functions of the step: values with `schedule(count) -> rate`, as `lr` of every optimiser takes.

A schedule is fixed: a tensor that it closes over and that is differentiated is refused by the adjoints that recompute.
What is learned is a sequence of rates, see NOTE [shapes of hyperparameters].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exponential:
    """lr * gamma^t, as `torch.optim.lr_scheduler.ExponentialLR`.

    Raises:
        ValueError: for a rate or a factor that is not positive.
    """

    lr: float
    gamma: float

    def __post_init__(self) -> None:
        _check_positive(lr=self.lr, gamma=self.gamma)

    def __call__(self, count: Tensor) -> Tensor:
        """The rate after `count` steps, both 0-dim."""
        return self.lr * self.gamma**count


@dataclass(frozen=True)
class Cosine:
    """From lr down to `last` along half a cosine over `steps` steps, then `last`: `CosineAnnealingLR` of torch.

    Raises:
        ValueError: for a rate or a number of steps that is not positive, or a negative `last`.
    """

    lr: float
    steps: int
    last: float = 0.0

    def __post_init__(self) -> None:
        _check_positive(lr=self.lr, steps=self.steps)
        if not (math.isfinite(self.last) and self.last >= 0):
            raise ValueError(f"last={self.last}: the rate at the end has to be at least 0")

    def __call__(self, count: Tensor) -> Tensor:
        """The rate after `count` steps, both 0-dim."""
        share = (1 + torch.cos(math.pi * count.clamp(max=self.steps) / self.steps)) / 2
        return self.last + (self.lr - self.last) * share


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} has to be a positive finite number")
