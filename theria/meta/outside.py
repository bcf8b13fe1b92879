"""What a function reads that is not among its arguments, for those who run it again in a derivative.

A derivative that runs a function again runs it in the surroundings of then. `Outside` keeps those of the first run: a
module's mode is put back for the later ones, and of a tensor that was written or replaced in between, whose values are
gone, it says so.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.overrides import TorchFunctionMode


class Outside:
    """The surroundings of a function: modes of modules, and versions of the tensors that a run of it was seen to read.

    Modules are known where the function holds them: bound to it, closed over, named as globals, in a `partial` or in
    the attributes of a dataclass or of the object that a method is bound to. Tensors are known where an operation of
    torch is given them. No tensor is kept alive, and none is known that has no version (inference mode).
    """

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        modules = [] if function is None else list(_modules(function))
        self._modes = [(module, module.training) for module in modules]
        self._versions: list[tuple[weakref.ref[Tensor], int]] = []
        self._places: list[tuple[nn.Module, str, weakref.ref[Tensor]]] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A run, whose reads are kept."""
        with _Reads() as reads:
            yield
        for module, _ in self._modes:
            buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None}
            if any(reads.has(buffer) for buffer in buffers.values()):
                # All of them: batch normalisation writes its averages without counting a version, and counts batches.
                for name, buffer in buffers.items():
                    reads.add(buffer)
                    self._places.append((module, name, weakref.ref(buffer)))
        self._versions += [(weakref.ref(x), x._version) for x in reads.alive()]

    @contextmanager
    def again(self) -> Iterator[None]:
        """A later run: the modules are in the mode that they were in.

        Raises:
            RuntimeError: for a tensor that was written since, or a buffer that is another tensor now.
        """
        for ref, version in self._versions:
            x = ref()
            if x is not None and x._version != version:
                raise RuntimeError(_CHANGED.format(what=f"a tensor {tuple(x.shape)}, {x.dtype},", how="written"))
        for module, name, ref in self._places:
            if module._buffers.get(name) is not ref():
                what = f"the buffer {name!r} of {type(module).__name__}"
                raise RuntimeError(_CHANGED.format(what=what, how="replaced"))
        moved = [(module, module.training) for module, mode in self._modes if module.training is not mode]
        try:
            for module, now in moved:
                module.training = not now
            yield
        finally:
            for module, now in moved:
                module.training = now

    def repeated(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each run of it in these surroundings."""

        def run(*args: Any) -> Any:
            with self.again():
                return function(*args)

        return run


class _Reads(TorchFunctionMode):
    """Collects the tensors that operations are given."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref[Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for x in (*args, *kwargs.values()):
            for y in x if isinstance(x, list | tuple) else (x,):
                if isinstance(y, Tensor):
                    self.add(y)
        return func(*args, **kwargs)

    def add(self, x: Tensor) -> None:
        """It is read now."""
        if not (self.has(x) or x.is_inference() or _functorch.is_functorch_wrapped_tensor(x)):
            self._seen[id(x)] = weakref.ref(x)

    def has(self, x: Tensor) -> bool:
        """Whether it was read."""
        known = self._seen.get(id(x))
        return known is not None and known() is x

    def alive(self) -> Iterator[Tensor]:
        """Those that something outside still holds."""
        return (x for ref in self._seen.values() if (x := ref()) is not None)


def _modules(function: Callable[..., Any]) -> Iterator[nn.Module]:
    """The modules that a function holds, see `Outside`, and theirs."""
    known: dict[int, Any] = {}  # with the objects: the number of one that is gone is given to another
    todo: list[Any] = [function]
    while todo:
        x = todo.pop()
        if id(x) in known:
            continue
        known[id(x)] = x
        if isinstance(x, nn.Module):
            yield x
            todo += x.children()
        else:
            todo += _held(x)


def _held(x: Any) -> Iterable[Any]:
    """What an object holds that may be, or hold, a module."""
    if isinstance(x, MethodType):
        owner = x.__self__
        return (
            (owner,) if isinstance(owner, nn.Module | type) else (x.__func__, *getattr(owner, "__dict__", {}).values())
        )
    if isinstance(x, partial):
        return x.func, *x.args, *x.keywords.values()
    if isinstance(x, FunctionType):
        return *_cells(x), *(x.__defaults__ or ()), *_globals(x)
    return vars(x).values() if is_dataclass(x) and not isinstance(x, type) and hasattr(x, "__dict__") else ()


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue


def _globals(function: FunctionType) -> Iterator[Any]:
    """The globals that a function, or one that is defined inside it, names; not those of libraries."""
    if (function.__module__ or "").partition(".")[0] in ("torch", "theria"):
        return
    codes: list[CodeType] = [function.__code__]
    while codes:
        code = codes.pop()
        codes += (c for c in code.co_consts if isinstance(c, CodeType))
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)


_CHANGED = (
    "{what} that the inner loss reads, and that is not among its arguments, was {how} between the inner steps and "
    "their derivative, which runs the loss again: it would be the derivative of another function. Take the derivative "
    "before (loss.backward()), give the loss a copy (clone()), or use adjoint=Unrolled(), which runs nothing again"
)
