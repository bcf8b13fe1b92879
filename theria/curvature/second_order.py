"""Functions of PyTorch whose second derivative is wrong or missing, by plain operations that have it.

NOTE [PyTorch's fused norms and higher derivatives]. The formulas of `F.layer_norm`, `F.batch_norm` and
`F.instance_norm` read the saved mean and reciprocal deviation, which carry no derivative once they come out of `vmap`
or forward mode. The gradient of `vmap(grad(loss))`, which is MAML unrolled over a batch of tasks, is then wrong by
10 % to 1,400 % without an error (PyTorch 2.13, affine layers, random input), and so are `grad(jvp)` and `jvp(jvp)`
(pytorch/pytorch#196699, #196700). `vmap(grad(grad))` and `jvp(grad)` are right, and so are group and RMS norm.

`F.mse_loss` raises under `jvp(grad)` ("ZeroTensors are immutable") and `F.huber_loss` has no such derivative.

`torch.linalg.solve` and determinants: see NOTE [PyTorch's solve and determinants over forward mode] in
`theria.curvature.dense`.

Inside `second_order` all are computed by operations that are right in every composition.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from theria.curvature import dense


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, for what needs more digits; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over `dims`, biased variance; half precision leaves in float32."""
    x = at_least_float32(x)
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`; shapes that do not fit are left to its own errors."""
    shapes = [tuple(x.shape) for x in (weight, bias) if x is not None] + [tuple(input.shape[-len(normalized_shape) :])]
    if any(shape != tuple(normalized_shape) for shape in shapes) or not _same_dtype(input, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(input, dims, weight, bias, eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`; with running statistics it is the fused one: affine in evaluation, in training it writes them."""
    fits = input.ndim > 1 and input[:, :1].numel() > 1 and _fits_channels(input, weight, bias)
    if running_mean is not None or not training or not fits:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _affine(input, (0, *range(2, input.ndim)), *_per_channel(input, weight, bias), eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.instance_norm`; with running statistics it is the fused one."""
    fits = input.ndim > 2 and input[:1, :1].numel() > 1 and _fits_channels(input, weight, bias)
    if running_mean is not None or not use_input_stats or not fits:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _affine(input, tuple(range(2, input.ndim)), *_per_channel(input, weight, bias), eps)


def _same_dtype(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return all(x is None or x.dtype == input.dtype for x in (weight, bias))


def _fits_channels(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """One weight a channel, of the input's dtype; anything else is left to PyTorch's own errors."""
    shapes_fit = all(x is None or x.shape == input.shape[1:2] for x in (weight, bias))
    return shapes_fit and _same_dtype(input, weight, bias)


def _per_channel(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    shape = (-1, *(1 for _ in range(input.ndim - 2)))
    return None if weight is None else weight.reshape(shape), None if bias is None else bias.reshape(shape)


def _affine(input: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(biased variance + eps) * weight + bias; half precision is computed in float32, as there."""
    y = standardise(input, dims, eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(input.dtype)


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """`F.mse_loss`; with a legacy argument, weights or broadcasting (of which it warns) it is the fused one."""
    if size_average is not None or reduce is not None or weight is not None or input.shape != target.shape:
        options: dict[str, Any] = {} if weight is None else {"weight": weight}
        return F.mse_loss(input, target, size_average, reduce, reduction, **options)
    return _reduce((input - target).square(), reduction)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """`F.huber_loss`; with weights or broadcasting it is the fused one."""
    if weight is not None or input.shape != target.shape:
        options: dict[str, Any] = {} if weight is None else {"weight": weight}
        return F.huber_loss(input, target, reduction, delta, **options)
    error = (input - target).abs()
    return _reduce(torch.where(error <= delta, error.square() / 2, delta * (error - delta / 2)), reduction)


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is not known: give 'mean', 'sum' or 'none'")
    return losses if reduction == "none" else getattr(losses, reduction)()


_REPLACEMENTS = {
    F.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.mse_loss: mse_loss,
    F.huber_loss: huber_loss,
    **dense.REPLACEMENTS,
}


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def second_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with the functions of this module and of `dense` in place of PyTorch's, in modules too."""

    @wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        with _Mode():
            return function(*args, **kwargs)

    return replaced
