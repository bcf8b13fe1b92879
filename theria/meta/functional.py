"""An `nn.Module` as a pure function of its parameters.

NOTE [buffers are constants]. Every forward reads copies of the buffers; the module's own are never written. A learner
takes them once for each outer loss (`constants`), so that a derivative that runs the model again reads the same. So:
- BatchNorm normalises by the batch it is given, in training and in evaluation, as the MAML paper does ("transductive"),
  and keeps no running average; with `batch_norm="running"` it uses the stored averages as constants instead.
- A module that writes another buffer in its forward (a counter, spectral norm's vectors) raises: under `vmap` each task
  would need its own, and a forward would no longer be a function of its arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from theria.curvature.precision import at_least_float32
from theria.meta.optimisers import Params
from theria.nn.plain import is_plain

T = TypeVar("T")
STEM = "stem"
Predictor = Callable[..., Tensor]  # (params, x) -> prediction; CAVIA's take a context after x


def pure_function(module: nn.Module, batch_norm: str) -> Predictor:
    """The function (params, *inputs) -> module(*inputs) with these parameters.

    Shared parameters are given once, by their first name. Buffers may be given among them; the others are those of now.

    Raises:
        ValueError: an unknown `batch_norm`, or "running" where a BatchNorm layer keeps no running statistics.
        RuntimeError: when called, if the forward writes a buffer.
    """
    if batch_norm not in ("batch", "running"):
        raise ValueError(f"batch_norm={batch_norm!r} is not known: give 'batch' or 'running'")
    if batch_norm == "running":
        for name, layer in _batch_norms(module):
            if layer.running_mean is None:
                raise ValueError(f"batch_norm='running', but layer {name!r} keeps no running statistics: give 'batch'")

    def predict(params: Params, *inputs: Tensor) -> Tensor:
        buffers = {name: params.get(name, buffer).clone() for name, buffer in module.named_buffers()}
        with _statistics(module, batch_norm):
            try:
                with _kept(module, buffers):
                    out = functional_call(module, {**params, **buffers}, inputs)
            except RuntimeError as error:
                # What vmap says of an in-place update of something that is not mapped over.
                written = any(s in str(error) for s in ("vmap: inplace", "doesn't match the broadcast shape"))
                if buffers and written and _recurrent(module) is None:
                    raise RuntimeError(_written(", ".join(buffers))) from error
                raise
        for name, copy in buffers.items():
            if copy._version:
                raise RuntimeError(_written(name))
        return out

    return predict


def constants(module: nn.Module) -> Params:
    """Copies of the buffers, to be given to its function beside its parameters."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def first_names(module: nn.Module, part: str = "") -> dict[str, str]:
    """Every name of every parameter and buffer, those of a shared one too, and the name by which it is given.

    Args:
        part: only what this submodule has, by the submodule's own names.
    """
    given = {id(x): name for name, x in (*module.named_parameters(), *module.named_buffers())}
    of = module.get_submodule(part)
    named = (of.named_parameters(remove_duplicate=False), of.named_buffers(remove_duplicate=False))
    return {name: given[id(x)] for name, x in chain(*named)}


class _AfterStem(nn.Module):
    """What a module does with the outputs of its stem."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, tokens: Tensor) -> Tensor:
        return self.whole.after_stem(tokens)  # type: ignore[operator]


def has_stages(module: nn.Module) -> bool:
    """Whether a module works in two stages, `forward(x)` being `after_stem(stem(x))`.

    The class that has `after_stem` says so, of its own `forward`: another one, of a subclass or of the instance, or a
    hook on the module may do more.
    """
    owners = [next((c for c in type(module).__mro__ if name in vars(c)), None) for name in ("forward", "after_stem")]
    return owners[0] is owners[1] and isinstance(getattr(module, "stem", None), nn.Module) and is_plain(module)


def stages(module: nn.Module, batch_norm: str) -> tuple[Predictor, Predictor]:
    """The two stages of a module as functions of its parameters, by its own names: x -> stem(x) -> prediction.

    A parameter that both stages have is one of both functions.
    """
    names = first_names(module, STEM)
    stem, rest = pure_function(module.stem, batch_norm), pure_function(_AfterStem(module), batch_norm)  # type: ignore[arg-type]

    def before(params: Params, x: Tensor) -> Tensor:
        return stem({name: params[given] for name, given in names.items() if given in params}, x)

    def after(params: Params, tokens: Tensor) -> Tensor:
        return rest({f"whole.{name}": p for name, p in params.items()}, tokens)

    return before, after


def one_hot(y: Tensor, ways: int) -> Tensor:
    """Labels (S,) -> bool (S, ways). A comparison, not F.one_hot: that one looks at the values, which vmap cannot.

    Raises:
        ValueError: when `y` is not one integer a sample.
    """
    if y.ndim != 1 or not _is_integer(y):
        raise ValueError(f"support_y has shape {tuple(y.shape)}, {y.dtype}: class labels are integers, (S,) in a task")
    return as_target(y).unsqueeze(-1) == torch.arange(ways, device=y.device)


def as_target(y: Tensor) -> Tensor:
    """Integers as int64, which are labels to PyTorch's losses on every device; anything else as it is."""
    return y.long() if _is_integer(y) else y


def _is_integer(y: Tensor) -> bool:
    return not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)


def in_full(function: Callable[..., T]) -> Callable[..., T]:
    """`function` without autocast, on what autocast had left in half precision as float32.

    For what is made of embeddings: differences, squares and inverses of them need more digits than half precision has.
    """

    @wraps(function)
    def run(*tensors: Tensor) -> T:
        whole = [at_least_float32(x) for x in tensors]
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*whole)

    return run


@contextmanager
def recurrence(module: nn.Module | None) -> Iterator[None]:
    """Say what to do where PyTorch has no rule for a fused recurrent layer of the module.

    Under `vmap` they write in place into a state that is not mapped over, or have no rule at all; that of an LSTM in
    float32 on a CPU has no derivative in `torch.func.vjp` (PyTorch 2.13).
    """
    try:
        yield
    except RuntimeError as error:
        layer, said = None if module is None else _recurrent(module), str(error)
        if layer is not None and any(part in said for part in _NO_RULE):
            raise RuntimeError(
                f"the model has an nn.{layer}, whose fused kernel PyTorch can neither run on several tasks at a time "
                f"(torch.func.vmap) nor, of an LSTM in float32 on a CPU, differentiate here: {said.splitlines()[0]}. "
                f"Give the tasks one by one (batched=False), an LSTM in float64, or write the recurrence with nn.Linear"
            ) from error
        raise


_NO_RULE = ("doesn't match the broadcast shape", "vmap: inplace", "Batching rule not implemented", "'workspace'")


def _recurrent(module: nn.Module) -> str | None:
    """The class of the first fused recurrent layer or cell."""
    kinds = nn.RNNBase, nn.RNNCellBase
    return next((type(layer).__name__ for layer in module.modules() if isinstance(layer, kinds)), None)


@contextmanager
def _kept(module: nn.Module, buffers: Params) -> Iterator[None]:
    """Raise when the forward puts another tensor in the place of a buffer, which `functional_call` would undo."""

    def check(*_: object) -> None:
        for name, buffer in module.named_buffers():
            if buffer is not buffers.get(name):
                raise RuntimeError(_written(name))

    handle = module.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _written(names: str) -> str:
    return (
        f"the module's forward writes to a buffer (of: {names}). Inside a meta-learner buffers are "
        f"constants: remove the update, or replace the layer by one without running state"
    )


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm))


@contextmanager
def _statistics(module: nn.Module, batch_norm: str) -> Iterator[None]:
    """For one forward: every BatchNorm reads the batch (and writes nothing), or reads its running averages."""
    layers = [(layer, layer.training, layer.track_running_stats) for _, layer in _batch_norms(module)]
    try:
        for layer, _, _ in layers:
            # Training without tracking passes no running statistics to the kernel; evaluation passes them read-only.
            layer.training = batch_norm == "batch"
            layer.track_running_stats = batch_norm == "running"
        yield
    finally:
        for layer, training, tracking in layers:
            layer.training, layer.track_running_stats = training, tracking
