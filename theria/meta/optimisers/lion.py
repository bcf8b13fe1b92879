"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

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
class Lion:
    """Steps of the sign of an interpolated momentum.

        c = b1 m + (1 - b1) g;   p <- p - lr (sign(c) + decay p);   m <- b2 m + (1 - b2) g

    The derivative of the sign is zero wherever it exists, and that is the derivative returned: theta_T depends on its
    start, the rates and the decay directly, as in p (1 - lr decay)^T - ..., and has zero derivative in the data, the
    betas and everything else that acts through the gradients. Every exact adjoint therefore equals `FirstOrder`.
    The function has jumps there, which no derivative sees; `theria.meta.evolution` estimates through them.

    Args:
        lr, learn_lr: see `SGD`.
        betas: b1 and b2 in [0, 1).
        weight_decay: decay, decoupled.

    `hyper` may give lr, beta1, beta2 and weight_decay.

    Raises:
        ValueError, TypeError: for a hyperparameter out of range, or a rate that is none.
    """

    lr: Rate = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    learn_lr: bool | str = field(default=False, kw_only=True)

    linear_in_gradient: ClassVar[bool] = True  # the derivative in g, 0 of p and 1 - b2 of m, is the same everywhere

    def __post_init__(self) -> None:
        object.__setattr__(self, "lr", check_rate(self.lr, self.learn_lr))
        object.__setattr__(self, "betas", tuple(self.betas))
        check_fraction(beta1=self.betas[0], beta2=self.betas[1])
        check_decay(self.weight_decay)

    def hyper(self, params: Params) -> Hyper:
        """The initial values of what is learned beside the parameters: {} or {"lr": {name: rates}}."""
        return initial_rates(self.lr, self.learn_lr, params)

    def init(self, params: Params) -> State:
        """Zero momentum, and the count of steps where the rate depends on it."""
        state: State = {"momentum": {name: torch.zeros_like(p) for name, p in params.items()}}
        return state if isinstance(self.lr, (int, float)) else state | {"count": zero_count(params)}

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        """One step; every output is a new tensor."""
        (b1, b2), decay = self.betas, self.weight_decay
        defaults = {"lr": self.lr, "beta1": b1, "beta2": b2, "weight_decay": decay}
        chosen = Chosen(self, defaults, hyper, state.get("count"))
        new: State = {"count": state["count"] + 1} if "count" in state else {}
        new["momentum"], moved = {}, {}
        for name, p in params.items():
            g, m = grads[name], state["momentum"][name]
            b1, b2 = chosen("beta1", name, p), chosen("beta2", name, p)
            direction = torch.sign(b1 * m + (1 - b1) * g)
            if chosen.has("weight_decay"):
                direction = direction + chosen("weight_decay", name, p) * p
            moved[name] = p - chosen("lr", name, p) * direction
            new["momentum"][name] = b2 * m + (1 - b2) * g
        return moved, new
