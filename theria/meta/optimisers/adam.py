"""Adam (Kingma and Ba 2015, arXiv 1412.6980) and AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

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
class Adam:
    """Adam as `torch.optim.Adam` does it; t counts from 1.

        g <- g + decay p;   m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2   (amsgrad: the largest v so far)
        p <- p - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)

    The derivatives of the square root at v = 0 are taken as 0 (`safe_sqrt`), so that a parameter with zero gradients
    has finite derivatives of every order, those of the step itself included: 1/eps in g.

    Args:
        lr, learn_lr: see `SGD`.
        betas: b1 and b2 in [0, 1).
        eps: above 0.
        weight_decay: decay, of the loss's gradient (L2).
        amsgrad: the variant of Reddi et al. 2018 (arXiv 1904.09237).

    `hyper` may give lr, beta1, beta2, eps and weight_decay.

    Raises:
        ValueError, TypeError: for a hyperparameter out of range, or a rate that is none.
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    learn_lr: bool | str = field(default=False, kw_only=True)

    linear_in_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self)

    def hyper(self, params: Params) -> Hyper:
        """The initial values of what is learned beside the parameters: {} or {"lr": {name: rates}}."""
        return initial_rates(self.lr, self.learn_lr, params)

    def init(self, params: Params) -> State:
        """Zero moments and the count of steps."""
        return _init(params, self.amsgrad)

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        """One step; every output is a new tensor."""
        chosen = _choose(self, hyper, state)
        if chosen.has("weight_decay"):
            grads = {name: g + chosen("weight_decay", name, g) * params[name] for name, g in grads.items()}
        return _step(params, grads, state, chosen)


@dataclass(frozen=True)
class AdamW:
    """Adam whose weight decay does not pass the moments, as `torch.optim.AdamW`: p <- (1 - lr decay) p comes first.

    Args and errors as for `Adam`.
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    learn_lr: bool | str = field(default=False, kw_only=True)

    linear_in_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self)

    def hyper(self, params: Params) -> Hyper:
        """The initial values of what is learned beside the parameters: {} or {"lr": {name: rates}}."""
        return initial_rates(self.lr, self.learn_lr, params)

    def init(self, params: Params) -> State:
        """Zero moments and the count of steps."""
        return _init(params, self.amsgrad)

    def update(self, grads: Params, state: State, params: Params, hyper: Hyper) -> tuple[Params, State]:
        """One step; every output is a new tensor."""
        chosen = _choose(self, hyper, state)
        if chosen.has("weight_decay"):
            params = {
                name: p * (1 - chosen("lr", name, p) * chosen("weight_decay", name, p)) for name, p in params.items()
            }
        return _step(params, grads, state, chosen)


def _check(optimiser: Adam | AdamW) -> None:
    object.__setattr__(optimiser, "lr", check_rate(optimiser.lr, optimiser.learn_lr))
    object.__setattr__(optimiser, "betas", tuple(optimiser.betas))
    check_fraction(beta1=optimiser.betas[0], beta2=optimiser.betas[1])
    check_eps(optimiser.eps)
    check_decay(optimiser.weight_decay)


def _init(params: Params, amsgrad: bool) -> State:
    moments = ("first", "second", "largest") if amsgrad else ("first", "second")
    state: State = {moment: {name: torch.zeros_like(p) for name, p in params.items()} for moment in moments}
    return state | {"count": zero_count(params)}


def _choose(optimiser: Adam | AdamW, hyper: Hyper, state: State) -> Chosen:
    (b1, b2), o = optimiser.betas, optimiser
    defaults = {"lr": o.lr, "beta1": b1, "beta2": b2, "eps": o.eps, "weight_decay": o.weight_decay}
    return Chosen(optimiser, defaults, hyper, state["count"])


def _step(params: Params, grads: Params, state: State, chosen: Chosen) -> tuple[Params, State]:
    """The moments of the new gradients and the step along them; torch's order of operations."""
    count = state["count"] + 1
    corrections = _Corrections(count)
    new: State = {key: {} for key in state if key != "count"} | {"count": count}
    moved: Params = {}
    for name, p in params.items():
        g, b1, b2 = grads[name], chosen("beta1", name, p), chosen("beta2", name, p)
        first = new["first"][name] = b1 * state["first"][name] + (1 - b1) * g
        second = new["second"][name] = b2 * state["second"][name] + (1 - b2) * (g * g)
        if "largest" in state:
            second = new["largest"][name] = torch.maximum(state["largest"][name], second)
        root = safe_sqrt(second) / corrections(b2, p).sqrt()
        rate = chosen("lr", name, p) / corrections(b1, p)
        moved[name] = p - rate * (first / (root + chosen("eps", name, p)))
    return moved, new


class _Corrections:
    """1 - beta^t, once for each number that is given as a beta."""

    def __init__(self, count: Tensor) -> None:
        self._count = count.detach()
        self._known: dict[tuple[float, torch.dtype], Tensor] = {}

    def __call__(self, beta: float | Tensor, p: Tensor) -> Tensor:
        if isinstance(beta, Tensor):
            return (1 - beta**self._count).to(p.dtype)
        key = (beta, p.dtype)
        if key not in self._known:
            self._known[key] = (1 - beta**self._count).to(p.dtype)
        return self._known[key]
