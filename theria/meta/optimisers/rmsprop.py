"""RMSprop (Hinton 2012, lecture 6e of Neural Networks for Machine Learning)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from theria.meta.optimisers.base import Hyper, Params, State
from theria.meta.optimisers.hyperparameters import (
    Chosen,
    Rate,
    check_decay,
    check_eps,
    check_fraction,
    check_rate,
    initial_rates,
    safe_sqrt,
    zero_count,
)


@dataclass(frozen=True)
class RMSprop:
    """RMSprop as `torch.optim.RMSprop` does it.

        g <- g + decay p;   v <- a v + (1 - a) g^2;   centered: u <- a u + (1 - a) g, and v - u^2 for v below
        d = g / (sqrt(v) + eps);   with momentum buf <- mu buf + d and d = buf;   p <- p - lr d

    The derivatives of the square root at 0 are taken as 0, as in `Adam`. Centred, v - u^2 can come out below zero by
    rounding; it counts as zero then, where torch gives NaN.

    Args:
        lr, learn_lr: see `SGD`.
        alpha: a in [0, 1).
        eps: above 0.
        weight_decay: decay, of the loss's gradient (L2).
        momentum: mu in [0, 1).
        centered: divide by an estimate of the standard deviation.

    `hyper` may give lr, alpha, eps, weight_decay, and momentum where construction has it above 0.

    Raises:
        ValueError, TypeError: for a hyperparameter out of range, or a rate that is none.
    """

    lr: Rate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    learn_lr: bool | str = field(default=False, kw_only=True)

    linear_in_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", check_rate(self.lr, self.learn_lr))
        check_fraction(alpha=self.alpha, momentum=self.momentum)
        check_eps(self.eps)
        check_decay(self.weight_decay)

    def hyper(self, params: Params) -> Hyper:
        """The initial values of what is learned beside the parameters: {} or {"lr": {name: rates}}."""
        return initial_rates(self.lr, self.learn_lr, params)

    def init(self, params: Params) -> State:
        """Zero means and buffers, and the count of steps where the rate depends on it."""
        kinds = ["square", *(["mean"] if self.centered else []), *(["momentum"] if self.momentum else [])]
        state: State = {kind: {name: torch.zeros_like(p) for name, p in params.items()} for kind in kinds}
        return state if isinstance(self.lr, (int, float)) else state | {"count": zero_count(params)}

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        """One step; every output is a new tensor."""
        defaults = {"lr": self.lr, "alpha": self.alpha, "eps": self.eps, "weight_decay": self.weight_decay}
        defaults |= {"momentum": self.momentum} if self.momentum else {}
        chosen = Chosen(self, defaults, hyper, state.get("count"))
        new: State = {"count": state["count"] + 1} if "count" in state else {}
        new |= {key: {} for key in state if key != "count"}
        moved: Params = {}
        for name, p in params.items():
            g = grads[name]
            if chosen.has("weight_decay"):
                g = g + chosen("weight_decay", name, p) * p
            direction = g / (self._root(name, g, state, new, chosen) + chosen("eps", name, p))
            if self.momentum:
                direction = chosen("momentum", name, p) * state["momentum"][name] + direction
                new["momentum"][name] = direction
            moved[name] = p - chosen("lr", name, p) * direction
        return moved, new

    def _root(self, name: str, g: Tensor, state: State, new: State, chosen: Chosen) -> Tensor:
        """sqrt(v), or sqrt(v - u^2); writes the new means into `new`."""
        alpha = chosen("alpha", name, g)
        square = new["square"][name] = alpha * state["square"][name] + (1 - alpha) * (g * g)
        if self.centered:
            mean = new["mean"][name] = alpha * state["mean"][name] + (1 - alpha) * g
            square = square - mean * mean
        return safe_sqrt(square)
