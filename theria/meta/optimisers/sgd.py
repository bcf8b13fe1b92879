"""Stochastic gradient descent."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from theria.meta.optimisers.base import Hyper, Params, State
from theria.meta.optimisers.hyperparameters import (
    Chosen,
    Rate,
    check_decay,
    check_fraction,
    check_rate,
    initial_rates,
    zero_count,
)


@dataclass(frozen=True)
class SGD:
    """Gradient descent as `torch.optim.SGD` does it.

        g <- g + decay p;   buf <- mu buf + (1 - dampening) g   (buf = g at the first step)
        p <- p - lr (g + mu buf if nesterov, else buf)

    Args:
        lr: the rate: a number, a sequence with one for each step, or a function of the step.
        momentum: mu in [0, 1).
        dampening: of the gradient that enters the buffer, in [0, 1); needs momentum.
        weight_decay: decay, of the loss's gradient (L2).
        nesterov: look ahead along the buffer; needs momentum, and no dampening.
        learn_lr: learn the rates, from `lr`: True for one for each entry of each parameter, "tensor" for one for each
            parameter; with a sequence, for each step too. NOTE [shapes of hyperparameters] has the shapes.

    `hyper` may give lr, weight_decay, and what construction has above 0 of momentum and dampening.

    Raises:
        ValueError: for a rate that is not a positive finite number, a momentum or dampening outside [0, 1), a
            negative decay, or options that do not go together.
        TypeError: for a rate that is a tensor (it belongs into `hyper`) or none at all.
    """

    lr: Rate
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    learn_lr: bool | str = field(default=False, kw_only=True)

    linear_in_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", check_rate(self.lr, self.learn_lr))
        check_fraction(momentum=self.momentum, dampening=self.dampening)
        check_decay(self.weight_decay)
        if self.nesterov and (self.momentum == 0 or self.dampening):
            raise ValueError("nesterov=True looks ahead along the momentum buffer: give momentum > 0 and no dampening")
        if self.dampening and self.momentum == 0:
            raise ValueError(f"dampening={self.dampening} is of the momentum buffer: give momentum > 0 with it")

    def hyper(self, params: Params) -> Hyper:
        """The initial values of what is learned beside the parameters: {} or {"lr": {name: rates}}."""
        return initial_rates(self.lr, self.learn_lr, params)

    def init(self, params: Params) -> State:
        """The state before the first step: zero buffers and the count of steps, each only if it is read."""
        state: State = {}
        if self.momentum:
            state["momentum"] = {name: torch.zeros_like(p) for name, p in params.items()}
        if self.dampening or not isinstance(self.lr, (int, float)):
            state["count"] = zero_count(params)
        return state

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        """One step; every output is a new tensor."""
        count = state.get("count")
        chosen = Chosen(self, self._read(), hyper, count)
        directions = grads
        if chosen.has("weight_decay"):
            directions = {name: g + chosen("weight_decay", name, g) * params[name] for name, g in grads.items()}
        new = {} if count is None else {"count": count + 1}
        if self.momentum:
            directions, new["momentum"] = self._along_buffers(directions, state["momentum"], count, chosen)
        return {name: _descend(p, chosen("lr", name, p), directions[name]) for name, p in params.items()}, new

    def _along_buffers(
        self, grads: Params, buffers: Params, count: Tensor | None, chosen: Chosen
    ) -> tuple[Params, Params]:
        """The directions, and the new buffers."""
        new: Params = {}
        for name, g in grads.items():
            entering = g
            if self.dampening:  # torch starts from the first gradient, undampened
                assert count is not None
                entering = torch.where(count == 0, g, (1 - chosen("dampening", name, g)) * g)
            new[name] = chosen("momentum", name, g) * buffers[name] + entering
        if not self.nesterov:
            return new, new
        return {name: g + chosen("momentum", name, g) * new[name] for name, g in grads.items()}, new

    def _read(self) -> dict[str, object]:
        read: dict[str, object] = {"lr": self.lr, "weight_decay": self.weight_decay}
        return read | {kind: value for kind in ("momentum", "dampening") if (value := getattr(self, kind))}


def _descend(p: Tensor, lr: float | Tensor, direction: Tensor) -> Tensor:
    """p - lr direction, in one operation where the rate is a number."""
    return p - lr * direction if isinstance(lr, Tensor) else torch.sub(p, direction, alpha=lr)
