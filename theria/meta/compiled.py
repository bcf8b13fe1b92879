"""The outer step of a learner as a pure function of tensors: compiled (`theria.meta.fused`), compared with itself."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from theria.meta.checks import recording
from theria.meta.fused import Fused
from theria.ops.precision import convolution_precision, matmul_precision

Run = Callable[[Any, list[nn.Parameter]], Tensor]  # (episode, parameters) -> the detached loss; gradients in `.grad`
Loss = Callable[[Callable[[Any], Any], Any], Tensor]  # (learner, episode) -> its loss, in the precision of the step

# The largest relative difference between what a compiled step gives and the step itself, by the least precise dtype.
# Both round, in another order, through an inner loop; a compiler's mistake is of the order of 1.
SAME = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 3e-1}


class Compiled:
    """`step(episode, parameters)` as compiled pieces, made anew for each layout of episode and learner.

    Args:
        learner: whose parameters and buffers are inputs of what is compiled.
        loss: of the learner, or of another function in its place, on an episode.
        plain: the step that is compiled, to compare with.
        autocast: the dtype in which `loss` computes, if it says so itself.

    Raises: see `theria.meta.CapturedStep`.
    """

    def __init__(self, learner: nn.Module, loss: Loss, plain: Run, autocast: torch.dtype | None = None) -> None:
        self.learner, self.loss, self.plain, self.autocast = learner, loss, plain, autocast
        self._of: dict[Any, _Step] = {}

    def __call__(self, episode: Any, parameters: list[nn.Parameter]) -> Tensor:
        leaves, structure = pytree.tree_flatten(episode)
        state = {**dict(self.learner.named_parameters()), **dict(self.learner.named_buffers())}
        name_of = {id(tensor): name for name, tensor in state.items()}
        names = [name_of.get(id(p)) for p in parameters]
        if None in names:
            raise ValueError(
                "a parameter that is not the learner's gets no gradient from a compiled step: make it one of the "
                "learner's, or give compile=False"
            )
        around = surroundings(self.learner)
        key = layout(leaves), structure, tuple(state), layout(list(state.values())), tuple(names), around
        precision = around.autocast if self.autocast is None else self.autocast
        step = self._of.get(key) or _Step(self, leaves, structure, state, names, precision)
        compared = step.checked
        loss = step(leaves, state, parameters)
        if not compared:  # the step itself has run, and a learner may count its runs
            self._of[*key[:-1], surroundings(self.learner)] = step
        return loss


class _Step:
    """One layout."""

    def __init__(
        self,
        of: Compiled,
        leaves: list[Any],
        structure: Any,
        state: dict[str, Tensor],
        names: list[Any],
        precision: torch.dtype | None,
    ) -> None:
        self.of, self.structure, self.precision = of, structure, precision
        self.used, self.checked = [True] * len(names), False

        def function(tensors: list[Tensor]) -> list[Tensor]:
            own = {name: tensor.detach() for name, tensor in zip(state, tensors, strict=False)}
            wanted = [own[name].requires_grad_() for name in names]
            given = iter(tensors[len(own) :])
            episode = pytree.tree_unflatten([next(given) if isinstance(x, Tensor) else x for x in leaves], structure)
            with torch.enable_grad():
                learner = partial(torch.func.functional_call, of.learner, own)
                loss = of.loss(lambda episode: learner((episode,)), episode)
                with outside_autocast(loss.device):
                    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
            self.used = [grad is not None for grad in grads]
            return [loss.detach(), *(grad for grad in grads if grad is not None)]

        with unchanged(of.learner):
            self.fused = Fused(function, _inputs(leaves, state))

    def __call__(self, leaves: list[Any], state: dict[str, Tensor], parameters: list[nn.Parameter]) -> Tensor:
        inputs = _inputs(leaves, state)
        # first, because the compiled one may write buffers
        wanted = None if self.checked or recording() else self._expected(leaves, parameters)
        loss, *found = self.fused(inputs)
        used = [p for p, used in zip(parameters, self.used, strict=True) if used]
        if wanted is not None:
            self._check([loss, *found], wanted, [p.grad is not None for p in parameters])
        for p in parameters:
            p.grad = None
        for p, grad in zip(used, _apart(found, used, [*inputs, *self.fused.constants]), strict=True):
            p.grad = grad
        return loss

    def _expected(self, leaves: list[Any], parameters: list[nn.Parameter]) -> list[Tensor]:
        """The loss and gradients of the step itself."""
        with unchanged(self.of.learner):
            loss = self.of.plain(pytree.tree_unflatten(leaves, self.structure), parameters)
        return [loss, *(p.grad for p in parameters if p.grad is not None)]

    def _check(self, found: list[Tensor], wanted: list[Tensor], used: list[bool]) -> None:
        """Compare with the step itself; one whose numbers are not finite says nothing, and the next one is compared.

        Raises:
            ArithmeticError: the two differ by more than roundings.
        """
        if used != self.used:
            raise ArithmeticError(
                "a parameter has a gradient in the step itself and none in the compiled one, or the other way round: "
                "is it read from somewhere else than the learner (a closure)? Read it there, or give compile=False"
            )
        size, slope = _norm(wanted), _norm(wanted[1:])
        if not bool(size.isfinite()):
            return
        differences = [a.double() - b for a, b in zip(found, wanted, strict=True)]
        dtypes = {self.precision or wanted[0].dtype, *(x.dtype for x in wanted)}
        allowed = same(dtypes, wanted[0].device, self.fused.convolves)
        # the gradient by itself too: it may be small beside the loss
        for error, of in ((_norm(differences), size), (_norm(differences[1:]), slope)):
            if not error <= allowed * of:
                raise ArithmeticError(
                    f"the compiled step differs from the step itself by {float(error / of):.1e} (relative, loss and "
                    f"gradients; {allowed:.0e} is rounding): give compile=False, and report it with the versions of "
                    "torch and triton"
                )
        self.checked = True


def same(dtypes: set[torch.dtype], device: torch.device, convolves: bool) -> float:
    """What a compiled step of these dtypes, with or without convolutions, may differ from the step itself."""
    tf32 = matmul_precision() != "highest" or (convolves and convolution_precision() != "highest")
    if tf32 and device.type == "cuda" and torch.float32 in dtypes:
        dtypes = dtypes | {torch.float16}  # whose 11 bits are those of the factors of a product in TF32
    return max(SAME.get(dtype, 0.0) for dtype in dtypes)


def layout(leaves: list[Any]) -> tuple[Any, ...]:
    """What a step is recorded or compiled for: layouts, dtypes and devices of tensors, other values themselves."""
    return tuple(
        (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else _value(x)
        for x in leaves
    )


def _value(x: Any) -> Any:
    holds = hasattr(x, "__dict__") and not isinstance(x, Enum) and not callable(x)  # tensors, maybe, as attributes
    if holds or not isinstance(x, Hashable):
        raise TypeError(
            f"the episode has a {type(x).__name__}, whose value is not known to be that of the episode before: give "
            "tensors (torch.as_tensor), beside them numbers, strings or None, in tuples, dicts or a class that is "
            "registered with torch.utils._pytree"
        )
    return type(x), x  # True == 1 == 1.0


class Surroundings(NamedTuple):
    """What decides the operations of a step besides the layouts of its tensors, as a key.

    Attributes:
        modules: the learner's, each with what it is set to: its mode, numbers, an inner optimiser, an adjoint.
        autocast: the dtype of autocast, None where it is off.
        float32: how products and convolutions of float32 are computed.
        tied: which names are the same tensor.
    """

    modules: tuple[Hashable, ...]
    autocast: torch.dtype | None
    float32: tuple[str, str]
    tied: tuple[int, ...]


def surroundings(learner: nn.Module) -> Surroundings:
    """Those of a step as of now."""
    kind = next(learner.parameters()).device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    named = (learner.named_parameters(remove_duplicate=False), learner.named_buffers(remove_duplicate=False))
    first: dict[int, int] = {}
    tied = tuple(first.setdefault(id(x), len(first)) for _, x in chain(*named))
    modules = tuple((m, _settings(vars(m))) for m in learner.modules())
    return Surroundings(modules, autocast, (matmul_precision(), convolution_precision()), tied)


def _settings(attributes: dict[str, Any]) -> tuple[Hashable, ...]:
    """Public attributes, but for tensors and modules."""
    public = ((k, v) for k, v in attributes.items() if k[0] != "_" and not isinstance(v, Tensor | nn.Module))
    return tuple((k, _setting(v)) for k, v in public)


def _setting(x: Any) -> Hashable:
    """Equal for one value (numbers, frozen dataclasses) and for one object as long as its own numbers are the same."""
    if isinstance(x, list | tuple):
        return type(x), tuple(map(_setting, x))
    if isinstance(x, dict):
        return dict, tuple((_setting(k), _setting(v)) for k, v in x.items())
    numbers = tuple((k, repr(v)) for k, v in getattr(x, "__dict__", {}).items() if isinstance(v, int | float | str))
    return type(x), _Same(x) if isinstance(x, Tensor) or not _hashes(x) else x, numbers  # True == 1 == 1.0


def _hashes(x: Any) -> bool:
    """Whether ``x`` has a hash: of a frozen dataclass all fields must have one."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal to another one of the very same object, which it keeps: no other one gets its place in memory."""

    x: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


@contextmanager
def unchanged(learner: nn.Module) -> Iterator[None]:
    """For a run that is none of the caller's steps: buffers that it writes (running averages) are as before."""
    before = [(buffer, buffer.clone()) for buffer in learner.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:  # batch normalisation writes without counting a version
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def outside_autocast(device: torch.device) -> torch.autocast:
    """For a backward: each operation has the precision of its forward, and is not to be cast anew."""
    return torch.autocast(device.type, enabled=False)


def _inputs(leaves: list[Any], state: dict[str, Tensor]) -> list[Tensor]:
    return [*(tensor.detach() for tensor in state.values()), *(x for x in leaves if isinstance(x, Tensor))]


def _apart(grads: list[Tensor], parameters: list[nn.Parameter], others: list[Tensor]) -> list[Tensor]:
    """Gradients as a backward leaves them: each in memory of its own, laid out as its parameter.

    Of two parameters that are added, or of one that is summed, they may be one tensor, or one number for all entries.
    To clip them in place would then be to scale it twice, or an error.
    """
    taken, out = {x.untyped_storage().data_ptr() for x in others}, []
    for grad, p in zip(grads, parameters, strict=True):
        place = grad.untyped_storage().data_ptr()
        out.append(torch.empty_like(p).copy_(grad) if place in taken or grad.stride() != p.stride() else grad)
        taken.add(place)
    return out


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([x.detach().double().square().sum() for x in tensors]).sum().sqrt()
