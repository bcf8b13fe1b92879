"""Hyperparameters that are numbers, tensors or functions of the step; and what all optimisers share.

NOTE [shapes of hyperparameters]. `hyper` may give any hyperparameter of an optimiser as a tensor: one for all
parameters, or a dict with one for each, broadcastable to the parameter p. Each replaces the number of construction.
Rates have one case more: where the optimiser was made with a sequence of T rates, every tensor of rates starts with a
dimension of T, the inner step, and what follows it broadcasts to p.

| made with                       | hyper(params)["lr"][name] | known as                                              |
|---------------------------------|---------------------------|-------------------------------------------------------|
| lr=0.1, learn_lr=True           | (*p.shape)                | Meta-SGD (Li et al. 2017, arXiv 1707.09835)           |
| lr=0.1, learn_lr="tensor"       | ()                        | one rate for each parameter tensor                    |
| lr=[0.1] * T, learn_lr="tensor" | (T,)                      | MAML++'s rates (Antoniou et al. 2019, 1810.09502, 3)  |
| lr=[0.1] * T, learn_lr=True     | (T, *p.shape)             | a rate for each entry and step                        |

Steps beyond the T-th use the last rate.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from theria.meta.optimisers.base import Hyper, Params

Schedule = Callable[[Tensor], Tensor]  # the number of steps done so far, 0-dim float64 -> the rate, 0-dim
Rate = float | Sequence[float] | Schedule


def check_rate(lr: Any, learn_lr: Any) -> Any:
    """`lr` with a sequence as a tuple of floats, when it and `learn_lr` fit.

    Raises:
        TypeError: for a tensor, which belongs into `hyper`, or something else that is no rate.
        ValueError: for a rate that is not a positive finite number, or a function whose values cannot be learned.
    """
    if learn_lr not in (False, True, "tensor"):
        raise ValueError(f"learn_lr={learn_lr!r} is not known: give True (one rate for each entry), 'tensor' or False")
    if isinstance(lr, Tensor):
        raise TypeError("lr is a tensor: give its initial value as a number here, and the tensor as hyper={'lr': ...}")
    if callable(lr):
        if learn_lr:
            raise ValueError(f"lr={lr!r} is a function of the step, which leaves no rates to learn: give a sequence")
        return lr
    if isinstance(lr, str) or not isinstance(lr, (int, float, Sequence)):
        raise TypeError(f"lr={lr!r}: give a number, a sequence with one for each step, or a function of the step")
    rates = tuple(lr) if isinstance(lr, Sequence) else (lr,)
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise ValueError(f"lr={lr}: the inner rate has to be a positive finite number, such as 0.1")
    return rates if isinstance(lr, Sequence) else lr


def check_fraction(**values: float) -> None:
    """Each value lies in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} is outside [0, 1): give 0 for none, or such as 0.9")


def check_decay(weight_decay: float) -> None:
    """A finite weight decay of at least 0."""
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay={weight_decay}: give 0 for none, or a positive finite number such as 0.01")


def check_eps(eps: float) -> None:
    """A positive eps: with 0 the step at a zero gradient is 0/0, and its derivative 1/eps infinite."""
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps={eps}: it has to be a positive finite number such as 1e-8, or a zero gradient gives NaN")


def initial_rates(lr: Any, learn_lr: bool | str, params: Params) -> Hyper:
    """{} or {"lr": ...} of NOTE [shapes of hyperparameters], for `InnerOptimiser.hyper`."""
    if not learn_lr:
        return {}

    def rates(p: Tensor) -> Tensor:
        one = torch.ones_like(p) if learn_lr is True else p.new_ones(())
        return torch.stack([rate * one for rate in lr]) if isinstance(lr, tuple) else lr * one

    return {"lr": {name: rates(p) for name, p in params.items()}}


def zero_count(params: Params) -> Tensor:
    """The number of steps done, 0, as a tensor: a state that is all tensors maps under vmap.

    In float64, because 1 - beta^t in float32 is off by 6e-5 of itself for beta = 0.999 and t = 1; floating, because a
    state is differentiated as a whole.
    """
    return (
        torch.zeros((), dtype=torch.float64, device=next(iter(params.values())).device) if params else torch.zeros(())
    )


class Chosen:
    """The hyperparameters of one update: from `hyper` where it has them, else those of construction.

    Args:
        optimiser: for messages.
        defaults: a number for each hyperparameter that may be given; the rate may be a tuple or a function.
        hyper: see NOTE [shapes of hyperparameters].
        count: the number of steps done, where the rate depends on it.

    Raises:
        ValueError: for a name in `hyper` that the optimiser does not read: its derivative would be zero in silence.
    """

    def __init__(self, optimiser: Any, defaults: Mapping[str, Any], hyper: Hyper, count: Tensor | None) -> None:
        unknown = sorted(hyper.keys() - defaults.keys())
        if unknown:
            raise ValueError(
                f"hyper gives {unknown}, which {optimiser!r} does not read: it takes {sorted(defaults)}. What needs a "
                f"buffer or a count (momentum, dampening) can be given where construction has it above 0"
            )
        self._defaults, self._hyper = dict(defaults), hyper
        self._index: Tensor | None = None
        lr, self._steps = defaults["lr"], 1
        if callable(lr):
            assert count is not None
            self._defaults["lr"] = lr(count.detach())
        elif isinstance(lr, tuple):
            assert count is not None
            self._steps = len(lr)
            self._index = count.detach().clamp(max=self._steps - 1).long().reshape(1)
            self._defaults["lr"] = _scheduled(lr, count.detach())

    def __call__(self, kind: str, name: str, p: Tensor) -> float | Tensor:
        """The hyperparameter `kind` of the parameter `name`: a number, or a tensor of p's dtype."""
        given = self._hyper.get(kind)
        if isinstance(given, Mapping):
            given = given.get(name)
        if given is None:
            value = self._defaults[kind]
        else:
            value = self._at_step(given, name) if kind == "lr" and self._index is not None else given
        return value.to(p.dtype) if isinstance(value, Tensor) and value.dtype != p.dtype else value

    def has(self, kind: str) -> bool:
        """Whether the hyperparameter is given or not zero."""
        return kind in self._hyper or bool(self._defaults[kind])

    def _at_step(self, rates: Tensor, name: str) -> Tensor:
        assert self._index is not None
        if rates.shape[:1] != (self._steps,):
            raise ValueError(
                f"hyper['lr'] for {name!r} has shape {tuple(rates.shape)}, and lr is a sequence of {self._steps} "
                f"rates: its tensors need a leading dimension of {self._steps}, the inner step"
            )
        # By comparisons, whose derivative scatters nothing: PyTorch's compiler adds what index_select's scatters twice
        # on a CPU (2.13, under vmap), or fails.
        others = torch.arange(self._steps, device=rates.device) != self._index
        return rates.masked_fill(others.view(-1, *[1] * (rates.ndim - 1)), 0.0).sum(0)


def _scheduled(rates: Sequence[float], count: Tensor) -> Tensor:
    """The rate of this step by comparisons: no copy from the host, which a CUDA graph could not hold."""
    rate = torch.full_like(count, rates[0])
    for t, later in enumerate(rates[1:], start=1):
        if later != rates[t - 1]:
            rate = torch.where(count >= t, later, rate)
    return rate


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt(max(x, 0)) whose derivatives of every order are 0 where x <= 0, instead of infinite.

    x is a mean of squared gradients. Where it is 0, so are its derivatives in the gradients, and 0 * inf is NaN. With
    0 in its place the derivative of Adam's step g / (|g| + eps) at g = 0 is 1/eps, the true one.
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
