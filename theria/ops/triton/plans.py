"""What a rule allocates and launches, recorded at its first call with a layout and replayed at the next ones.

A rule on small tensors costs what the host spends on it: choosing kernels and tiles, describing strides, Triton's own
lookup of a kernel. All of that depends on shapes, strides and dtypes alone. A replay allocates the same tensors and
starts the same compiled kernels with the new addresses. A rule that does anything besides (copies of what no kernel
can read in place, sums over broadcast dimensions) is not replayed but run again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._dynamo import guards
from torch.nn import Parameter
from triton import knobs

from theria.ops.operands import Operands, Tangents
from theria.ops.precision import matmul_precision
from theria.ops.triton import tiles

MAXIMUM = 4096  # plans that are kept
# What compiled graphs allocate with, on the current device: half the time of torch.empty_strided.
ALLOCATE = {name: getattr(guards, f"_empty_strided_{name}", None) for name in ("cuda", "cpu")}


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
        self.device, self.on_gpu = device, device.type == "cuda"
        self.allocate = ALLOCATE.get(device.type) or partial(_empty_strided, device)
        self.allocations = [(tuple(x.shape), x.stride(), x.dtype) for x in recording.allocated]
        self.launches = recording.launches
        self.single = isinstance(results, Tensor)
        first = len(recording.slots) - len(recording.allocated)
        place = {id(x): first + i for i, x in enumerate(recording.allocated)}
        self.results = [None if x is None else place[id(x)] for x in ((results,) if self.single else results)]

    def run(self, tensors: list[Tensor], addresses: list[int]) -> Any:
        """The results for other tensors of the same layout; both lists are used up."""
        if self.on_gpu and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self._run(tensors, addresses)
        return self._run(tensors, addresses)

    def _run(self, tensors: list[Tensor], addresses: list[int]) -> Any:
        allocate = self.allocate
        for layout in self.allocations:
            x = allocate(*layout)
            tensors.append(x)
            addresses.append(x.data_ptr())
        if self.on_gpu:
            self._launch(addresses, torch._C._cuda_getCurrentRawStream(self.device.index))
        else:
            self._launch(tensors, None)
        results = [None if i is None else tensors[i] for i in self.results]
        return results[0] if self.single else tuple(results)

    def _launch(self, pointers: Sequence[Any], stream: int | None) -> None:
        bare = stream is not None and not _watched()
        for kernel, programs, fixed, holes in self.launches:
            args = fixed.copy()
            for position, slot in holes:
                args[position] = pointers[slot]
            if bare:  # what kernel[grid] does, without collecting what hooks are told: a microsecond or two
                kernel.run(programs, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *args)
            else:
                kernel[programs, 1, 1](*args)


def _watched() -> bool:
    """Whether a profiler wants to be told of launches."""
    runtime: Any = knobs.runtime
    hooks = runtime.launch_enter_hook, runtime.launch_exit_hook
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _empty_strided(device: torch.device, shape: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


_plans: dict[Any, Plan | None] = {}
_UNKNOWN: Any = object()  # no plan was tried
_current = threading.local()


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


class Described(NamedTuple):
    """The arguments of a rule: its tensors, their addresses, and a key of all that decides what the rule does."""

    tensors: list[Tensor]
    addresses: list[int]
    key: tuple[Any, ...]


def described(rule: Callable[..., Any], args: Sequence[Any]) -> Described | None:
    """The arguments of a rule; None where the memory of a tensor is not what it holds, or it has none.

    The dispatcher makes plain tensors of such ones.
    """
    tensors: list[Tensor] = []
    addresses: list[int] = []
    key: list[Any] = [rule, matmul_precision()]
    low = 0
    for x in args:
        for y in x if type(x) is Operands or type(x) is Tangents else (x,):
            if y is None or not isinstance(y, Tensor):
                key.append(y)
                continue
            if type(y) is not Tensor and type(y) is not Parameter:
                return None
            try:
                address = y.data_ptr()
            except RuntimeError:  # mapped by is_grads_batched, whose tensors are of no type of their own
                return None
            # without an address are tensors of no element and forward mode's zeros, which have no memory;
            # the memory of a negative view (the imaginary part of a conjugate) has the other sign
            if not address or y.is_neg():
                return None
            tensors.append(y)
            addresses.append(address)
            key += y.shape, y.stride(), y.dtype
            low |= address
    key += tensors[0].device, low & 15 and tuple([address & 15 for address in addresses])
    return Described(tensors, addresses, tuple(key))


def replayed(rule: Callable[..., Any], args: Sequence[Any], given: Described) -> Any:
    """Call a rule on plain tensors: by its plan where there is one."""
    tensors, addresses, key = given
    if tiles.overridden() or recording() is not None or len(set(addresses)) < len(addresses):
        # in a recording its kernels are the caller's; which of two tensors in one place a kernel got is unknown
        return rule(*args)
    plan = _plans.get(key, _UNKNOWN)  # one look: another thread may clear them
    if plan is _UNKNOWN:
        return _record(rule, args, tensors, tensors[0].device, key)
    return rule(*args) if plan is None else plan.run(tensors, addresses)


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
