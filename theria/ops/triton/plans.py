"""What a rule allocates and launches, recorded at its first call with a layout and replayed at the next ones.

A rule on small tensors costs what the host spends on it: choosing kernels and tiles, describing strides, Triton's own
lookup of a kernel. All of that depends on shapes, strides and dtypes alone. A replay allocates the same tensors and
starts the same compiled kernels with the new addresses. A rule that does anything besides (copies of what no kernel
can read in place, sums over broadcast dimensions) is not replayed but run again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from theria.ops.operands import Operands, Tangents
from theria.ops.triton import tiles

MAXIMUM = 4096  # plans that are kept


class Interpreted:
    """Stands for a compiled kernel in Triton's interpreter."""

    def __init__(self, kernel: Any, static: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, {"S": static, **options}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *args: self.kernel[grid[:1]](*args[:-1], **self.options)


class Recording:
    """What one call of a rule does."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.slots = {x.data_ptr(): i for i, x in enumerate(inputs)}
        self.allocated: list[Tensor] = []
        self.launches: list[tuple[Any, int, list[Any], list[tuple[int, int]]]] = []
        self.whole = True  # nothing else was done

    def allocate(self, x: Tensor) -> None:
        self.whole = self.whole and x.data_ptr() not in self.slots  # as tensors of no element are
        self.slots[x.data_ptr()] = len(self.slots)
        self.allocated.append(x)

    def launch(self, compiled: Any, programs: int, args: Sequence[Any]) -> None:
        tensors = [(i, x.data_ptr()) for i, x in enumerate(args) if isinstance(x, Tensor)]
        if any(address not in self.slots for _, address in tensors):
            self.whole = False
            return
        holes = [(i, self.slots[address]) for i, address in tensors]
        fixed = [None if isinstance(x, Tensor) else x for x in args]
        self.launches.append((compiled, programs, fixed, holes))


class Plan:
    """A rule's work for one layout of its arguments."""

    def __init__(self, recording: Recording, results: Any, device: torch.device) -> None:
        self.device = device
        self.allocations = [(tuple(x.shape), x.stride(), x.dtype) for x in recording.allocated]
        self.launches = recording.launches
        self.single = isinstance(results, Tensor)
        first = len(recording.slots) - len(recording.allocated)
        place = {id(x): first + i for i, x in enumerate(recording.allocated)}
        self.results = [None if x is None else place[id(x)] for x in ((results,) if self.single else results)]

    def run(self, tensors: list[Tensor], addresses: list[int]) -> Any:
        """The results for other tensors of the same layout; both lists are used up."""
        device = self.device
        for shape, stride, dtype in self.allocations:
            x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            tensors.append(x)
            addresses.append(x.data_ptr())
        if device.type != "cuda":
            self._launch(tensors)
        elif device.index == torch.cuda.current_device():
            self._launch(addresses)
        else:
            with torch.cuda.device(device):
                self._launch(addresses)
        results = [None if i is None else tensors[i] for i in self.results]
        return results[0] if self.single else tuple(results)

    def _launch(self, pointers: Sequence[Any]) -> None:
        for compiled, programs, fixed, holes in self.launches:
            args = fixed.copy()
            for position, slot in holes:
                args[position] = pointers[slot]
            compiled[programs, 1, 1](*args)


_plans: dict[Any, Plan | None] = {}
_UNKNOWN: Any = object()  # no plan was tried
_current = threading.local()


def matmul_precision() -> str:
    """``torch.get_float32_matmul_precision()``, also where it refuses to tell."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch.backends.*.fp32_precision, which the older name does not know
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def recording() -> Recording | None:
    """The recording of the call that this thread is in."""
    return getattr(_current, "recording", None)


def allocated(x: Tensor) -> Tensor:
    """Note a tensor that a rule has allocated; returns it."""
    if (record := recording()) is not None:
        record.allocate(x)
    return x


def unplanned() -> None:
    """Note that a rule does something that a replay would not."""
    if (record := recording()) is not None:
        record.whole = False


def replayed(rule: Callable[..., Any], args: Sequence[Any], tensors: list[Tensor], addresses: list[int]) -> Any:
    """Call a rule on plain tensors: by its plan where there is one.

    Args:
        tensors: those among ``args``. addresses: of each.
    """
    if tiles.overridden() or recording() is not None or len(set(addresses)) < len(addresses):
        # in a recording its kernels are the caller's; which of two tensors in one place a kernel got is unknown
        return rule(*args)
    device = tensors[0].device
    key = (
        rule,
        device,
        matmul_precision(),
        *[(x.shape, x.stride(), x.dtype, address & 15) for x, address in zip(tensors, addresses, strict=True)],
        *[_without_tensors(x) for x in args],
    )
    plan = _plans.get(key, _UNKNOWN)  # one look: another thread may clear them
    if plan is _UNKNOWN:
        return _record(rule, args, tensors, device, key)
    return rule(*args) if plan is None else plan.run(tensors, addresses)


def _without_tensors(x: Any) -> Any:
    """An argument as a key, with its tensors as mere places."""
    if isinstance(x, Tensor):
        return Tensor
    if isinstance(x, (Operands, Tangents)):
        return tuple([None if y is None else Tensor for y in x])
    return x


def _record(rule: Callable[..., Any], args: Sequence[Any], tensors: list[Tensor], device: Any, index: Any) -> Any:
    record = _current.recording = Recording(tensors)
    try:
        results = rule(*args)
    finally:
        _current.recording = None
    own = {id(x) for x in record.allocated}
    whole = all(x is None or id(x) in own for x in ((results,) if isinstance(results, Tensor) else results))
    if len(_plans) >= MAXIMUM:
        _plans.clear()
    _plans[index] = Plan(record, results, device) if record.whole and whole else None
    return results
