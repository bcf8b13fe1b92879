"""Functions of PyTorch whose second derivative is wrong or missing, by plain operations that have it.

NOTE [PyTorch's fused norms and higher derivatives]. The formulas of `F.layer_norm`, `F.batch_norm` and
`F.instance_norm` read the saved mean and reciprocal deviation, which carry no derivative once they come out of `vmap`
or forward mode. The gradient of `vmap(grad(loss))`, which is MAML unrolled over a batch of tasks, is then wrong by
10 % to 1,400 % without an error (PyTorch 2.13, affine layers, random input), and so are `grad(jvp)` and `jvp(jvp)`
(pytorch/pytorch#196699, #196700). `vmap(grad(grad))` and `jvp(grad)` are right, and so are group and RMS norm.

`F.mse_loss` raises under `jvp(grad)` ("ZeroTensors are immutable") and `F.huber_loss` has no such derivative. That of
`F.group_norm` raises where the gradient keeps no graph of its own, as in `theria.meta.MixedMode`.

NOTE [what autocast computes in]. An operation on autocast's float32 list takes its arguments in float32: layer and
group norm on a GPU, `torch.linalg.solve` on a CPU, the two losses on both. One on no list may be given half precision
beside parameters in float32, and returns half precision: batch and instance norm, and on a CPU all norms. So they do
here, where such a mixture runs under `vmap` too; PyTorch's kernels on a CPU raise there.

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
from theria.curvature.precision import HALF, at_least_float32, float32_under_autocast


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
    input, weight, bias = _from_autocast(input, weight, bias)
    shapes = [tuple(x.shape) for x in (weight, bias) if x is not None] + [tuple(input.shape[-len(normalized_shape) :])]
    fits = all(shape == tuple(normalized_shape) for shape in shapes)
    if not fits or not _fits_dtype(input, weight, bias, mixed=_cpu(input)):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(standardise(input, dims, eps), weight, bias).to(input.dtype)


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
    """`F.batch_norm`; in training the fused one writes the running statistics, and nothing else is taken from it."""
    fits = input.ndim > 1 and _fits_channels(input, weight, bias, running_mean, running_var)
    if fits and not training and running_mean is not None and running_var is not None:
        mean, variance = _per_channel(input, running_mean, running_var)
        y = (at_least_float32(input) - mean) * torch.rsqrt(at_least_float32(variance) + eps)
    elif fits and training and (running_mean is None) == (running_var is None) and input[:, :1].numel() > 1:
        if running_mean is not None:
            F.batch_norm(input.detach(), running_mean, running_var, None, None, training, momentum, eps)
        y = standardise(input, (0, *range(2, input.ndim)), eps)
    else:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _affine(y, *_per_channel(input, weight, bias)).to(input.dtype)


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
    """`F.instance_norm`; running statistics as in `batch_norm`, which it is where it reads them."""
    fits = input.ndim > 2 and input[:1, :1].numel() > 1 and _fits_channels(input, weight, bias)
    if not use_input_stats and running_mean is not None and fits:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if not use_input_stats or not fits:
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if running_mean is not None:
        F.instance_norm(input.detach(), running_mean, running_var, None, None, use_input_stats, momentum, eps)
    y = standardise(input, tuple(range(2, input.ndim)), eps)
    return _affine(y, *_per_channel(input, weight, bias)).to(input.dtype)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.group_norm`."""
    input, weight, bias = _from_autocast(input, weight, bias)
    fits = input.ndim > 1 and input.shape[1] % num_groups == 0 and input.numel() > num_groups
    if not fits or not _fits_channels(input, weight, bias, mixed=_cpu(input)):
        return F.group_norm(input, num_groups, weight, bias, eps)
    grouped = input.unflatten(1, (num_groups, -1))
    y = standardise(grouped, tuple(range(2, grouped.ndim)), eps).flatten(1, 2)
    return _affine(y, *_per_channel(input, weight, bias)).to(input.dtype)


def _from_autocast(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> list[Any]:
    """What layer and group norm get: see NOTE [what autocast computes in]."""
    given = [input, weight, bias]
    return given if _cpu(input) else float32_under_autocast(*given)


def _cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _fits_dtype(input: Tensor, *others: Tensor | None, mixed: bool = True) -> bool:
    """One dtype, or `mixed`: float32 beside half precision. Anything else is left to PyTorch's own errors."""
    dtypes = {x.dtype for x in others if x is not None}
    return dtypes <= {input.dtype} or (mixed and input.dtype in HALF and dtypes == {torch.float32})


def _fits_channels(input: Tensor, *others: Tensor | None, mixed: bool = True) -> bool:
    """One number a channel, of a dtype that fits; anything else is left to PyTorch's own errors."""
    return all(x is None or x.shape == input.shape[1:2] for x in others) and _fits_dtype(input, *others, mixed=mixed)


def _per_channel(input: Tensor, *others: Tensor | None) -> list[Any]:
    return [x if x is None else x.reshape(-1, *(1 for _ in range(input.ndim - 2))) for x in others]


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


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
    input, target = float32_under_autocast(input, target)
    return _reduce((input - target).square(), reduction)


def huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """`F.huber_loss`; with weights or broadcasting it is the fused one."""
    if weight is not None or input.shape != target.shape:
        options: dict[str, Any] = {} if weight is None else {"weight": weight}
        return F.huber_loss(input, target, reduction, delta, **options)
    input, target = float32_under_autocast(input, target)
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
    F.group_norm: group_norm,
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
