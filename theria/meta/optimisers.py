"""Inner optimisers: pure, differentiable in everything they are given."""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Params = dict[str, Tensor]
State = dict[str, Tensor]
Hyper = dict[str, Params]  # {} or {"lr": a rate for each parameter}


class InnerOptimiser(Protocol):
    """What an adjoint needs of an optimiser. All three methods are pure; `update` is element-wise in each parameter.

    `linear_in_gradient` promises that `update` is affine in `grads`: its derivative in them does not need their
    value, which lets `MixedMode` run backwards with a single forward-over-reverse pass in each step.
    """

    linear_in_gradient: ClassVar[bool]

    def hyper(self, params: Params) -> Hyper: ...

    def init(self, params: Params) -> State: ...

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]: ...


@dataclass(frozen=True)
class SGD:
    """Gradient descent as `torch.optim.SGD` does it: buf <- mu buf + g; p <- p - lr (buf, or g + mu buf if nesterov).

    Args:
        lr: the rate; with `learn_lr` the initial value of the learned ones.
        momentum: mu in [0, 1).
        nesterov: look ahead along the buffer; needs momentum.
        learn_lr: one learned rate for each entry of each parameter (Meta-SGD, Li et al. 2017, arXiv 1707.09835).

    Raises:
        ValueError: for a rate that is not a positive finite number, a momentum outside [0, 1), nesterov without it.
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    learn_lr: bool = False

    linear_in_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr={self.lr}: the inner rate has to be a positive finite number, such as 0.1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} is outside [0, 1): give 0 for none, or such as 0.9")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov=True looks ahead along the momentum buffer: give momentum > 0 with it")

    def hyper(self, params: Params) -> Hyper:
        """The initial values of what is learned beside the parameters: {} or {"lr": {name: rates}}."""
        return {"lr": {name: torch.full_like(p, self.lr) for name, p in params.items()}} if self.learn_lr else {}

    def init(self, params: Params) -> State:
        """The state before the first step: {} or zero buffers (torch starts from the first gradient: the same)."""
        return {name: torch.zeros_like(p) for name, p in params.items()} if self.momentum else {}

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        """One step; every output is a new tensor.

        Args:
            hyper: {} for the rate given at construction, or {"lr": {name: rate broadcastable to the parameter}}.
        """
        rates = hyper.get("lr", {})
        directions = grads
        if self.momentum:
            state = {name: self.momentum * state[name] + g for name, g in grads.items()}
            ahead = {name: g + self.momentum * state[name] for name, g in grads.items()} if self.nesterov else state
            directions = ahead
        return {name: p - rates.get(name, self.lr) * directions[name] for name, p in params.items()}, state
