"""Peak memory of a block of code, exact and repeatable on the CPU."""

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory:
    """The most bytes of tensor storage alive at a time inside the block, beyond those alive at its start.

    On the CPU every operation is watched and the storages it makes are counted until they are freed, under autograd
    and torch.func alike; what a kernel allocates and frees within itself is not seen, and the watching slows the
    block down, so do not time it. On CUDA it is the allocator's own peak.

        with PeakMemory() as memory:
            loss.backward()
        print(memory.peak)

    Attributes:
        peak: the maximum so far, in bytes.
        live: the bytes alive now that the block made.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._watch = _Watch()
        self._start = 0
        self._cuda_peak = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            self._watch.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._cuda_peak = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self._watch.__exit__(kind, error, trace)

    @property
    def peak(self) -> int:
        return self._cuda_peak if self.device.type == "cuda" else self._watch.peak

    @property
    def live(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self._start
        return self._watch.live


class _Watch(TorchDispatchMode):
    """Below autograd and torch.func: sees the plain tensors that every operation takes and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in pytree.tree_iter((args, kwargs)):
            self._meet(tensor, ours=False)  # alive before the block: counts nothing
        out = func(*args, **kwargs)
        for tensor in pytree.tree_iter(out):
            self._meet(tensor, ours=True)
        return out

    def _meet(self, tensor: Any, *, ours: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if ours else 0
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            if not ours or known[1] >= size or known[1] == 0:
                return
            self._add(size - known[1])  # resized
            self._known[key] = (known[0], size)
            return
        self._known[key] = (weakref.ref(storage, lambda ref: self._forget(key, ref)), size)
        self._add(size)

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, ref: weakref.ref[Any]) -> None:
        if key in self._known and self._known[key][0] is ref:
            self.live -= self._known.pop(key)[1]
