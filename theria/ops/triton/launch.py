"""The host side of every kernel: what it is given, and its launch.

:class:`Frame` brings the tensors of one call under one set of leading dimensions; :func:`launch` fills in what the
compiler specialises on and starts the kernel on the tensors' device and the current stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf
from typing import Any

import torch
from torch import Tensor

from theria.ops.dropout import keep_scale, threshold
from theria.ops.operands import AttentionSpec, Operands, Shapes, batch_shape, sum_to
from theria.ops.precision import matmul_precision
from theria.ops.triton import plans
from theria.ops.triton.tensors import Call, Static, Strides
from theria.ops.triton.tiles import Tile, power_of_two

LEADING = 4  # leading dimensions that a kernel can address
MAX_ROW_STRIDE = 2**22  # offsets inside a tile, of at most 256 rows, are 32-bit
PRECISIONS = {"highest": "tf32x3", "high": "tf32", "medium": "tf32"}
UNALIGNED = ("mask", "seed")  # addressed element by element

WIDE_E = ("v", "o", "do", "tv", "tdo", "to", "tv2", "ttv", "dv")  # the others have width D

Steps = tuple[tuple[int, ...], ...]
Layout = tuple[str, Sequence[int], Sequence[int]]  # name, shape, strides


def precision(dtype: torch.dtype) -> str:
    """How products are computed: float32 follows PyTorch's setting (:func:`matmul_precision`)."""
    return PRECISIONS[matmul_precision()] if dtype == torch.float32 else "ieee"


@lru_cache(maxsize=4096)
def collapse(sizes: tuple[int, ...], steps: Steps, keep_last: bool) -> tuple[tuple[int, ...], Steps] | None:
    """Leading dimensions merged to four, and each tensor's strides over them; None where more would remain.

    Two neighbours merge when every tensor walks through both with one stride. With ``keep_last`` the last one stays by
    itself.
    """
    merged: list[tuple[int, tuple[int, ...]]] = []  # from the last dimension to the first
    for dim in range(len(sizes) - 1, -1, -1):
        size, strides = sizes[dim], tuple(step[dim] for step in steps)
        if keep_last and not merged:
            merged.append((size, strides))
        elif size != 1:
            inner = merged[-1] if len(merged) > keep_last else None
            if inner and all(s == i * inner[0] for s, i in zip(strides, inner[1], strict=True)):
                merged[-1] = (size * inner[0], inner[1])
            else:
                merged.append((size, strides))
    if len(merged) > LEADING:
        return None
    merged += [(1, (0,) * len(steps))] * (LEADING - len(merged))
    merged.reverse()
    return tuple(size for size, _ in merged), tuple(zip(*(strides for _, strides in merged), strict=True))


class Frame:
    """The tensors of one call under one set of leading dimensions.

    Args:
        ops: canonical operands.
        spec: the call.
        factor: a number (a tensor) that the cotangents are divided by when they are finished; None for one.
        tensors: by the names of :class:`Strides`, what kernels read besides the operands; None for absent ones.

    Attributes:
        lead: the broadcast leading shape of all of them; ``heads`` its number of elements.
        N, M, D, E: rows, keys, widths of queries and values.
    """

    def __init__(
        self, ops: Operands, spec: AttentionSpec, *, factor: Tensor | None = None, **tensors: Tensor | None
    ) -> None:
        given = {"q": ops.q, "k": ops.k, "v": ops.v, **tensors}
        self.tensors = {name: _readable(x) for name, x in given.items() if x is not None}
        if ops.mask is not None:
            self.tensors["mask"] = ops.mask.view(torch.uint8) if ops.mask.dtype == torch.bool else ops.mask
        if ops.seed is not None:
            self.tensors["seed"] = ops.seed
        self.spec, self.factor, self.additive = spec, factor, ops.additive
        self.lead = batch_shape(*self.tensors.values())
        self.heads = self.lead.numel()
        (self.N, self.D), (self.M, self.E) = ops.q.shape[-2:], ops.v.shape[-2:]
        self.dtype, self.device = ops.q.dtype, ops.q.device
        self._make_addressable()

    def _make_addressable(self) -> None:
        """Copy what more than four leading dimensions keep from being read in place (nested ``vmap`` at its worst)."""
        if len(self.lead) <= LEADING:
            return
        copies: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda x: x,
            lambda x: x.contiguous(),
            lambda x: x.expand(*self.lead, *x.shape[-2:]).contiguous(),
        )
        whole = torch.empty(*self.lead, 1, 1, device="meta").stride()[:-2]
        for copy in copies:
            self.tensors = {name: copy(x) for name, x in self.tensors.items()}
            steps = (whole, *(_steps(x.shape, x.stride()) for x in self.tensors.values()))
            if collapse(tuple(self.lead), steps, True) is not None:
                break

    def rows(self, x: Tensor) -> Tensor:
        """A row statistic as kernels read it: contiguous (*L, N)."""
        shape = (*self.lead, self.N)
        return (x if x.shape == shape else x.expand(shape)).contiguous()

    def new_rows(self) -> Tensor:
        """An uninitialised row statistic (*L, N)."""
        return plans.allocated(torch.empty((*self.lead, self.N), dtype=torch.float32, device=self.device))

    def new(self, name: str, like: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor that a kernel writes, with the order of dimensions of the tensor ``like``."""
        x = self.tensors[name] = _empty_in_order(self.tensors[like], tuple(shape), dtype or self.dtype)
        return x

    def new_output(self, name: str = "o") -> Tensor:
        """An uninitialised output or tangent of it, (*L, N, E)."""
        return self.new(name, "q", (*self.lead, self.N, self.E))

    def new_cotangents(self, shapes: Shapes) -> tuple[Tensor | None, ...]:
        """The wanted cotangents of q, k, v as :meth:`finish` gives them, uninitialised, and None for the mask."""
        names = zip("qkv", shapes, strict=False)
        return (
            *(None if s is None else _empty_in_order(self.tensors[name], tuple(s), self.dtype) for name, s in names),
            None,
        )

    def new_cotangent(self, name: str, shape: torch.Size | None, grouped: bool = False) -> Tensor | None:
        """What a kernel writes for the wanted cotangent ``name`` ("dq", "dk", "dv") of every head.

        It is float32 where :meth:`finish` then sums over broadcast dimensions or divides.
        """
        if shape is None:
            return None
        full = (*self.lead[:-1], 1, *shape[-2:]) if grouped else (*self.lead, *shape[-2:])
        last = full == tuple(shape) and self.factor is None
        return self.new(name, name[-1], full, self.dtype if last else torch.float32)

    def finish(self, x: Tensor | None, shape: torch.Size | None) -> Tensor | None:
        """A wanted cotangent from what the kernel wrote."""
        if x is None or shape is None or (x.shape == shape and self.factor is None):
            return x
        plans.unplanned()
        name = next(name for name in ("dq", "dk", "dv") if self.tensors.get(name) is x)
        total = sum_to(x, shape) if self.factor is None else sum_to(x, shape) / self.factor
        return _empty_in_order(self.tensors[name[-1]], tuple(shape), self.dtype).copy_(total)

    def sums_last(self, *shapes: torch.Size | None) -> bool:
        """Whether one program may sum over the last leading dimension (grouped queries).

        Every wanted cotangent has to be such a sum, and all that belongs to keys has to be shared there: the program
        reads it once. One of key and value may be shared and the other not.
        """
        wanted = [shape for shape in shapes if shape is not None]
        read = [self.tensors[name].shape for name in ("k", "v", "tk", "tv") if name in self.tensors]
        many = bool(self.lead) and self.lead[-1] > 1 and bool(wanted)
        return many and all(shape[-3:-2] in ((), (1,)) for shape in (*wanted, *read))

    def describe(
        self, names: Sequence[str], tile: Tile, grouped: bool = False
    ) -> tuple[list[Tensor | None], Strides, Call, Static]:
        """The named tensors (None where absent), their strides, the numbers of the call, what to compile for."""
        tensors = [self.tensors.get(name) for name in names]
        layouts, aligned, size = [], True, self.dtype.itemsize
        for name, x in zip(names, tensors, strict=True):
            if x is not None:
                layouts.append((name, x.shape, x.stride()))
                if x.data_ptr() % 16 or (x.dtype is not self.dtype and x.dtype.itemsize < size):
                    aligned = aligned and name in UNALIGNED
        sizes = self.N, self.M, self.D, self.E
        described = _describe(
            tuple(layouts),
            self.lead,
            sizes,
            16 // size if aligned else 1,
            precision(self.dtype),
            self.spec,
            tile,
            grouped,
            self.additive,
        )
        return tensors, *described


# One object for equal values: Triton looks a kernel up by it, and compares slowly what is equal and not the same.
_static = lru_cache(maxsize=4096)(Static)


@lru_cache(maxsize=4096)
def _describe(
    layouts: tuple[Layout, ...],
    lead: torch.Size,
    sizes: tuple[int, int, int, int],
    vec: int,
    precision: str,
    spec: AttentionSpec,
    tile: Tile,
    grouped: bool,
    additive: bool,
) -> tuple[Strides, Call, Static]:
    """What :meth:`Frame.describe` says about tensors of these layouts.

    ``vec``: elements in 16 bytes, 1 where an address
    does not divide by them.
    """
    merged = collapse(tuple(lead), tuple(_steps(shape, stride) for _, shape, stride in layouts), grouped)
    assert merged is not None, "outputs have the order of dimensions of an input or are contiguous"
    (_, L1, L2, L3), walked = merged
    strides = {layout[0]: (*steps, *_inner(*layout)) for layout, steps in zip(layouts, walked, strict=True)}
    operands = [layout for layout in layouts if layout[0] not in UNALIGNED]
    if any(s % vec for name, *_ in operands for s in strides[name]):
        vec = 1
    strides |= {name: tuple(s // vec for s in strides[name]) for name, *_ in operands}
    N, M, D, E = sizes
    heads = max(torch.Size(spec.heads).numel(), 1)
    call = Call(spec.scale, N, M, L1, L2, L3, heads, threshold(spec.dropout_p), keep_scale(spec.dropout_p))
    static = _static(
        D=D,
        E=E,
        BLOCK_D=power_of_two(D),
        BLOCK_E=power_of_two(E),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        CAUSAL=spec.is_causal,
        EVEN_N=N % tile.rows == 0,
        EVEN_M=M % tile.keys == 0,
        VEC=vec,
        PRECISION=precision,
        NATURAL=precision != "ieee" or additive,
        ROW_D=_common_row([layout for layout in operands if layout[0] not in WIDE_E]),
        ROW_E=_common_row([layout for layout in operands if layout[0] in WIDE_E]),
        HELD=tile.held,
        ANCHORED=tile.anchored,
        APART=tile.split,
        GROUPED=grouped,
    )
    return Strides(**strides), call, static


def launch(kernel: Any, programs: int, frame: Frame, args: Sequence[Any], static: Static, tile: Tile) -> None:
    """Start ``programs`` programs of a kernel; ``args`` are its arguments before ``S``."""
    if programs == 0:
        return
    options = {"num_warps": tile.warps, "num_stages": tile.stages} | ({"maxnreg": tile.most} if tile.most else {})
    if frame.device.type == "cuda" and frame.device.index != torch.cuda.current_device():
        with torch.cuda.device(frame.device):
            compiled = kernel[(programs,)](*args, S=static, **options)
    else:
        compiled = kernel[(programs,)](*args, S=static, **options)
    if (record := plans.recording()) is not None:
        record.launch(compiled or plans.Interpreted(kernel, static, options), programs, (*args, static))


def _readable(x: Tensor) -> Tensor:
    """A tensor whose last dimension has stride one and whose tiles 32-bit offsets reach: x itself almost always."""
    if (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(-2) < MAX_ROW_STRIDE:
        return x
    return x.contiguous()


def _steps(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Strides over the leading dimensions, 0 where a tensor is broadcast."""
    return tuple(0 if size == 1 else step for size, step in zip(shape[:-2], stride[:-2], strict=True))


def _common_row(layouts: Sequence[Layout]) -> int:
    """The stride that the rows of all tensors have in common, 0 where they have none (a single row has any)."""
    rows = {stride[-2] for _, shape, stride in layouts if shape[-2] > 1}
    return rows.pop() if len(rows) == 1 else 0


def _inner(name: str, shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Strides over rows (and columns of a mask)."""
    if name == "seed":
        return ()
    row = 0 if shape[-2] == 1 else stride[-2]
    return (row, 0 if shape[-1] == 1 else stride[-1]) if name == "mask" else (row,)


def _empty_in_order(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor with the order of dimensions of ``like`` where their leading shapes agree.

    The last dimension stays the last one; one in which ``like`` is expanded comes first.
    """
    if like.shape[:-1] != shape[:-1] or like.is_contiguous():
        return plans.allocated(torch.empty(shape, dtype=dtype, device=like.device))
    last = len(shape) - 1
    order = [*sorted(range(last), key=lambda dim: (-like.stride(dim) or -inf, dim)), last]
    back = [order.index(dim) for dim in range(len(shape))]
    x = torch.empty([shape[dim] for dim in order], dtype=dtype, device=like.device)
    return plans.allocated(x.permute(back))
