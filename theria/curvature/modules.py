"""A module as the pure functions of its parameters that the products take."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

Params = dict[str, Tensor]


def module_function(module: nn.Module, *inputs: Any, **options: Any) -> tuple[Callable[[Params], Any], Params]:
    """The function params -> module(*inputs, **options), and where to evaluate it: the module's parameters, detached.

    Buffers are read from copies made at each call and never written. The module's mode is what it is at the call: a
    BatchNorm layer in training normalises by its batch, and needs `module.eval()` before several directions at once.

    Example:
        model_fn, params = module_function(model, x)
        hvp(lambda p: F.cross_entropy(model_fn(p), y), params, v)
        gauss_newton_product(model_fn, lambda logits: F.cross_entropy(logits, y), params, v)

    Raises:
        ValueError: a module without parameters.
    """
    params = {name: p.detach() for name, p in module.named_parameters()}
    if not params:
        raise ValueError(f"{type(module).__name__} has no parameters; a module with at least one is needed.")

    def function(p: Params) -> Any:
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        return functional_call(module, {**p, **buffers}, inputs, options)

    return function, params


def module_loss(
    module: nn.Module, loss_fn: Callable[..., Tensor], inputs: Any, *targets: Any
) -> tuple[Callable[[Params], Tensor], Params]:
    """The function params -> loss_fn(module(inputs), *targets), and the module's parameters, see `module_function`."""
    function, params = module_function(module, inputs)
    return lambda p: loss_fn(function(p), *targets), params
