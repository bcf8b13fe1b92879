"""Functions of PyTorch whose second derivative is wrong or missing, by plain operations that have it.

NOTE [PyTorch's fused norms and higher derivatives]. The formulas of `F.layer_norm`, `F.batch_norm` and
`F.instance_norm`, and of the same functions in `torch`, read the saved mean and reciprocal deviation, which carry no
derivative once they come out of `vmap` or forward mode. The gradient of `vmap(grad(loss))`, which is MAML unrolled over
a batch of tasks, is then wrong by 10 % to 1,400 % without an error (PyTorch 2.13, affine layers, random input), and so
are `grad(jvp)` and `jvp(jvp)` (pytorch/pytorch#196699, #196700). `vmap(grad(grad))` and `jvp(grad)` are right, and so
are group and RMS norm.

`F.mse_loss` raises under `jvp(grad)` ("ZeroTensors are immutable") and `F.huber_loss` has no such derivative. That of
`F.group_norm` raises where the gradient keeps no graph of its own, as in `theria.meta.MixedMode`.

NOTE [what autocast computes in]. An operation on autocast's float32 list takes its arguments in float32: layer and
group norm on a GPU, `torch.linalg.solve` on a CPU, the two losses on both. One on no list may be given half precision
beside parameters in float32, and returns half precision: batch and instance norm, and on a CPU all norms. So they do
here, where such a mixture runs under `vmap` too; PyTorch's kernels on a CPU raise there.

`torch.linalg.solve`, determinants and their like: see NOTE [PyTorch's solve and determinants over forward mode] in
`theria.curvature.dense`. `torch._weight_norm` has no forward mode, and its double backward is wrong (by 86 % on random
input). Products by `scatter_reduce` and `torch.native_batch_norm` are wrong, too; they raise where they are
differentiated.

NOTE [a tensor of no dimension and a number]. PyTorch's forward-mode formulas of sums, products and quotients take a
Python number for a float64 tensor, and the tangent of `0.5 * x` is float64 where x is float32 and has no dimension. It
then meets float32 and raises, or ends as a float64 derivative. With a dimension of 1 in between, x decides.

Inside `second_order` all but the two that raise are computed by operations that are right in every composition.
"""

from collections.abc import Callable
from functools import wraps
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from theria.curvature import dense, norms
from theria.curvature.precision import float32_under_autocast
from theria.ops.transforms import differentiated


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


def _refused(function: Callable[..., Any], instead: str, only: str = "") -> Callable[..., Any]:
    """The function, which raises NotImplementedError where it is differentiated; `only`: where it is given this."""

    @wraps(function)
    def applied(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        meant = not only or any(isinstance(x, str) and x == only for x in given)
        if meant and any(isinstance(x, Tensor) and differentiated(x) for x in given):
            call = f"{function.__name__}(reduce={only!r})" if only else function.__name__
            raise NotImplementedError(f"the second derivative of torch.{call} is wrong in PyTorch: {instead}")
        return function(*args, **kwargs)

    return applied


def _of_own_dtype(function: Callable[..., Any]) -> Callable[..., Any]:
    """Arithmetic with its tangent in the dtype of its value: see NOTE [a tensor of no dimension and a number]."""

    @wraps(function)
    def applied(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 2 and "out" not in kwargs else None
        if isinstance(x, Tensor) and x.ndim == 0 and x.dtype in _BELOW_FLOAT64 and isinstance(args[1], Number):
            return function(x.unsqueeze(0), args[1], **kwargs).squeeze(0)
        return function(*args, **kwargs)

    return applied


_PRODUCT = (
    "multiply over a dimension instead, for vectors "
    "torch.where(index == torch.arange(n)[:, None], src, 1).prod(1), (n,)"
)
_BELOW_FLOAT64 = (torch.float32, torch.float16, torch.bfloat16)
_ARITHMETIC = ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide")

_REPLACEMENTS = {
    **norms.REPLACEMENTS,
    F.mse_loss: mse_loss,
    F.huber_loss: huber_loss,
    **dense.REPLACEMENTS,
    torch.native_batch_norm: _refused(torch.native_batch_norm, "use F.batch_norm, or BatchNorm2d of theria.nn"),
    **{f: _refused(f, _PRODUCT, "prod") for f in (torch.scatter_reduce, Tensor.scatter_reduce, Tensor.scatter_reduce_)},
    **{f: _of_own_dtype(f) for name in _ARITHMETIC for f in (getattr(torch, name), getattr(Tensor, name))},
    Tensor.__rdiv__: _of_own_dtype(Tensor.__rdiv__),  # a / x
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
