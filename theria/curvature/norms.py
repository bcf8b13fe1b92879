"""PyTorch's norms by plain operations, whose derivatives are right in every composition.

See NOTE [PyTorch's fused norms and higher derivatives] in `theria.curvature.second_order`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`, of `nn.utils.parametrizations.weight_norm`: g v / |v|, |v| over all dimensions but `dim`.

    With dim=-1 it is the norm of all of v, as there.
    """
    x, dims = at_least_float32(v), tuple(i for i in range(v.ndim) if dim == -1 or i != dim)
    size = torch.linalg.vector_norm(x, dim=dims, keepdim=True) if dims else x.abs()
    return (x * (g / size)).to(v.dtype)


class NativeLayerNormResult(NamedTuple):
    output: Tensor
    mean: Tensor
    rstd: Tensor


def native_layer_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> NativeLayerNormResult:
    """`torch.native_layer_norm`: the norm, and the mean and the reciprocal deviation that it was made with."""
    output = layer_norm(input, normalized_shape, weight, bias, eps)
    x, dims = at_least_float32(input), tuple(range(-len(normalized_shape), 0))
    mean = x.mean(dims, keepdim=True)
    return NativeLayerNormResult(output, mean, torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + eps))


def _of_torch(norm: Callable[..., Tensor], order: Sequence[str]) -> Callable[..., Tensor]:
    """A norm of `torch.nn.functional` with the arguments of that of `torch`, whose last one is of the backend."""

    def direct(*args: Any, **kwargs: Any) -> Tensor:
        given = dict(zip(order, args, strict=False)) | kwargs
        return norm(**{name: value for name, value in given.items() if not name.startswith("cudnn_enable")})

    return direct


_LAYER = ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
_GROUP = ("input", "num_groups", "weight", "bias", "eps", "cudnn_enabled")
_BATCH = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_INSTANCE = tuple("use_input_stats" if name == "training" else name for name in _BATCH)

REPLACEMENTS = {
    F.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.group_norm: group_norm,
    torch.layer_norm: _of_torch(layer_norm, _LAYER),
    torch.batch_norm: _of_torch(batch_norm, _BATCH),
    torch.instance_norm: _of_torch(instance_norm, _INSTANCE),
    torch.group_norm: _of_torch(group_norm, _GROUP),
    torch.native_layer_norm: native_layer_norm,
    torch._weight_norm: weight_norm,  # pyright: ignore[reportPrivateImportUsage]
}
