"""The `higher` library as another engine for the unrolled inner loop (Grefenstette et al. 2019, arXiv 1910.01727)."""

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from theria.meta.adjoint import Adjoint, Context, InnerLoss
from theria.meta.optimisers import SGD, Adam, Hyper, InnerOptimiser, Params
from theria.meta.optimisers.hyperparameters import Chosen
from theria.meta.values import check_problem


@dataclass(frozen=True)
class Higher(Adjoint):
    """Unrolls with `higher`: an independent implementation to compare with. Tasks run in a loop.

    The released library (0.2.1) adds Adam's eps before the bias correction instead of after; it is given
    eps sqrt(1 - b2^t) in step t, which makes it torch's.

    Raises:
        ModuleNotFoundError: when `higher` is not installed.
        TypeError: for an inner optimiser other than `SGD` and `Adam`.
        ValueError: for a hyperparameter other than the rates.
        NotImplementedError: under torch.func transforms, which the library does not know.
    """

    vmappable: ClassVar[bool] = False

    def solve(
        self,
        inner_loss: InnerLoss,
        params: Params,
        context: Context,
        optimiser: InnerOptimiser,
        hyper: Hyper,
        steps: int,
    ) -> Params:
        inner_loss = check_problem(inner_loss, params, optimiser, steps)
        higher = _import_higher()
        if not isinstance(optimiser, (SGD, Adam)):
            raise TypeError(
                f"adjoint=Higher() runs SGD and Adam only and was given {optimiser!r}: use adjoint=Unrolled()"
            )
        if hyper.keys() - {"lr"}:
            raise ValueError(f"adjoint=Higher() takes learned rates alone, not {sorted(hyper)}: use adjoint=Unrolled()")
        if _functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "adjoint=Higher() runs under torch.autograd (loss.backward()), not inside torch.func transforms: "
                "leave them, or use adjoint=Unrolled() or MixedMode()"
            )
        tracked = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():  # the gradient of a step is autograd's
            params, context, hyper = pytree.tree_map_only(Tensor, _recordable, (params, context, hyper))
            module = _AsModule(inner_loss, params)
            fast = higher.monkeypatch(module, copy_initial_weights=True, track_higher_grads=tracked)
            # Without a graph new leaves: a view that was made under `no_grad` is a leaf that gets no gradient.
            start = [p if tracked and p.requires_grad else p.detach().requires_grad_() for p in params.values()]
            fast.update_params(start)
            stepper = higher.get_diff_optim(
                _reference(optimiser, list(module.parameters())),
                module.parameters(),
                fmodel=fast,
                track_higher_grads=tracked,
            )
            for t in range(steps):
                stepper.step(fast(context), override=_settings(optimiser, hyper, params, t))
        return dict(zip(params, (p if tracked else p.detach() for p in fast.fast_params), strict=True))


def _recordable(x: Tensor) -> Tensor:
    """A copy of what was made in inference mode; anything else as it is."""
    return x.clone() if x.is_inference() else x


def _reference(optimiser: SGD | Adam, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of torch that `higher` takes as its model, with a group for each parameter and so its own rate."""
    groups = [{"params": [p]} for p in parameters]
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": optimiser.weight_decay}  # the rate comes with each step
    if isinstance(optimiser, Adam):
        return torch.optim.Adam(groups, betas=optimiser.betas, eps=optimiser.eps, amsgrad=optimiser.amsgrad, **options)
    momentum, nesterov, dampening = optimiser.momentum, optimiser.nesterov, optimiser.dampening
    return torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, dampening=dampening, **options)


def _settings(optimiser: SGD | Adam, hyper: Hyper, params: Params, t: int) -> dict[str, list[Any]]:
    """What differs between the steps: the rate of each parameter, and an eps that undoes `higher`'s error."""
    count = torch.tensor(float(t), dtype=torch.float64)
    chosen = Chosen(optimiser, {"lr": optimiser.lr}, hyper, count)
    settings: dict[str, list[Any]] = {"lr": [chosen("lr", name, p) for name, p in params.items()]}
    if isinstance(optimiser, Adam):
        settings["eps"] = [optimiser.eps * math.sqrt(1 - optimiser.betas[1] ** (t + 1))]
    return settings


class _AsModule(nn.Module):
    """The inner loss as the forward of a module, the form `higher` works on."""

    def __init__(self, inner_loss: InnerLoss, params: Params) -> None:
        super().__init__()
        self.inner_loss, self.names = inner_loss, list(params)
        for i, p in enumerate(params.values()):
            self.register_parameter(f"p{i}", nn.Parameter(p.detach()))

    def forward(self, context: Context) -> Tensor:
        return self.inner_loss({name: getattr(self, f"p{i}") for i, name in enumerate(self.names)}, context)


def _import_higher() -> Any:
    try:
        with warnings.catch_warnings():  # its docstrings have escapes that Python 3.12 warns about
            warnings.simplefilter("ignore", SyntaxWarning)
            import higher
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'adjoint=Higher() needs the `higher` library: pip install -e ".[experiments]", or use adjoint=Unrolled()'
        ) from error
    return higher
