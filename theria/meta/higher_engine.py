"""The `higher` library as another engine for the unrolled inner loop (Grefenstette et al. 2019, arXiv 1910.01727)."""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]

from theria.meta.adjoint import Adjoint, Context, InnerLoss
from theria.meta.optimisers import SGD, Hyper, InnerOptimiser, Params


@dataclass(frozen=True)
class Higher(Adjoint):
    """Unrolls with `higher`: an independent implementation to compare with. Tasks run in a loop.

    Raises:
        ModuleNotFoundError: when `higher` is not installed.
        TypeError: for an inner optimiser other than `SGD`, or parameters that are not floating point.
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
        higher = _import_higher()
        if not isinstance(optimiser, SGD):
            raise TypeError(f"adjoint=Higher() runs SGD only and was given {optimiser!r}: use adjoint=Unrolled()")
        if _functorch.peek_interpreter_stack() is not None:
            raise NotImplementedError(
                "adjoint=Higher() runs under torch.autograd (loss.backward()), not inside torch.func transforms: "
                "leave them, or use adjoint=Unrolled() or MixedMode()"
            )
        module = _AsModule(inner_loss, params)
        fast = higher.monkeypatch(module, copy_initial_weights=True, track_higher_grads=torch.is_grad_enabled())
        fast.update_params([p if p.requires_grad else p.detach().requires_grad_() for p in params.values()])
        # One group for each parameter, so that each can have its own learned rate.
        groups = [{"params": [p]} for p in module.parameters()]
        reference = torch.optim.SGD(groups, lr=optimiser.lr, momentum=optimiser.momentum, nesterov=optimiser.nesterov)
        override = {"lr": [hyper["lr"][name] for name in params]} if "lr" in hyper else None
        stepper = higher.get_diff_optim(
            reference,
            module.parameters(),
            fmodel=fast,
            override=override,
            track_higher_grads=torch.is_grad_enabled(),
        )
        with torch.enable_grad():
            for _ in range(steps):
                stepper.step(fast(context))
        return dict(zip(params, fast.fast_params, strict=True))


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
