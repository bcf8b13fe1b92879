"""Float32 operands split before the kernels read them (:mod:`theria.ops.triton.products`).

A kernel reads an operand many times, and would split it each time, the right one of a product by way of shared memory.
Split once, both parts are loaded as tensors of half precision are. A row of x becomes a row of its parts, hi then lo,
as many bytes as x: what second order adds to memory is the size of its operands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from theria.ops.triton import plans
from theria.ops.triton.launch import LEADING, WIDE_E, Frame, launch, precision
from theria.ops.triton.products import OPERAND, split
from theria.ops.triton.row_stats import PADDING
from theria.ops.triton.tensors import Call, Static, Strides, at, constexpr, coordinates, load
from theria.ops.triton.tiles import LEAST, Tile, power_of_two

Groups = Mapping[str, Sequence[str]]
# Operands of as many rows, four of them, in the order of their factors. Those of the queries are "rows".
GROUPS: Groups = {"rows": ("q", "tq", "do", "tdo"), "keys": ("k", "tk", "v", "tv")}
COUNT = tl.constexpr(4)
MULTIPLE = tl.constexpr(8)  # of columns: 16 bytes of fp16


@triton.jit
def load_factors(factors, head, start, count, BLOCK: constexpr):
    """The factors of four operands of the rows [start, start + BLOCK) of one head; None if they are not split."""
    if factors is None:
        return
    else:
        padded = tl.cdiv(count, PADDING) * PADDING
        base = tl.multiple_of(factors + tl.cast(head, tl.int64) * padded * COUNT, 16)
        packed = tl.load(base + tl.multiple_of(start, BLOCK) * COUNT + tl.arange(0, BLOCK * COUNT))
        even, odd = tl.split(tl.reshape(packed, (BLOCK, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return first, second, third, fourth


@triton.jit
def _split_rows(
    x, parts, factors, strides, places, lead, row, count, WIDTHS: constexpr, INDEX: constexpr, S: constexpr
):
    """Split a block of rows of one tensor; the factors are 1 where it is absent or has ended."""
    rows = row + tl.arange(0, S.BLOCK_M)
    if x is None:
        tl.store(factors + rows * COUNT, rows * 0.0 + 1.0)
    else:
        WIDTH: constexpr = WIDTHS[INDEX]
        SIZE: constexpr = (S.D + 7) // 8 * 8 if WIDTH == "D" else (S.E + 7) // 8 * 8
        BLOCK_W: constexpr = S.BLOCK_D if WIDTH == "D" else S.BLOCK_E
        x = load(at(x, strides, lead, S.VEC), row, count, strides, S.BLOCK_M, WIDTH, False, S)
        hi, lo, factor = split(x, OPERAND)
        tl.store(factors + rows * COUNT, factor)
        columns = tl.arange(0, BLOCK_W)
        inside = (rows < count)[:, None] & (columns < SIZE)[None, :]
        head = tl.multiple_of(at(parts, places, lead, MULTIPLE).to(tl.pointer_type(tl.float16)), 16)
        out = head + (rows.to(tl.int64)[:, None] * (2 * SIZE) + columns[None, :])
        tl.store(out, hi, mask=inside)
        tl.store(out + SIZE, lo, mask=inside)


@triton.jit(do_not_specialize=["strides", "places", "call", "count"])
def parts_kernel(x0, x1, x2, x3, parts0, parts1, parts2, parts3, factors, strides, places, call, count,
                 WIDTHS: constexpr, S: constexpr):  # fmt: skip
    """The parts of a block of rows of up to four tensors; WIDTHS has a "D" or an "E" for each.

    Their factors are side by side, (*L, padded rows, 4). A tensor that several heads share is written by each of them,
    with the same bits.
    """
    padded = tl.cdiv(count, PADDING) * PADDING
    blocks = padded // S.BLOCK_M
    head = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * S.BLOCK_M
    lead = coordinates(head, call)
    factors += tl.cast(head, tl.int64) * padded * COUNT
    _split_rows(x0, parts0, factors, strides[0], places[0], lead, row, count, WIDTHS, 0, S)
    _split_rows(x1, parts1, factors + 1, strides[1], places[1], lead, row, count, WIDTHS, 1, S)
    _split_rows(x2, parts2, factors + 2, strides[2], places[2], lead, row, count, WIDTHS, 2, S)
    _split_rows(x3, parts3, factors + 3, strides[3], places[3], lead, row, count, WIDTHS, 3, S)


class SplitFrame(Frame):
    """A frame whose kernels are given the parts of what they multiply.

    Attributes:
        factors: by the names of groups, those of their operands side by side.
    """

    def __init__(self, frame: Frame, operands: Sequence[str], groups: Groups) -> None:
        vars(self).update(vars(frame))
        self.operands = operands
        self.parts: dict[str, Tensor] = {}
        counts = {group: self.N if group == "rows" else self.M for group in groups}
        self.factors = {group: self._split(names, counts[group]) for group, names in groups.items()}

    def _split(self, names: Sequence[str], count: int) -> Tensor:
        """Factors (*L, padded rows, 4) of the named tensors; their parts go to ``self.parts``."""
        tile = Tile(min(max(4096 // power_of_two(max(self.D, self.E)), LEAST), PADDING.value), LEAST, 4, 1)
        sources, strides, call, static = super().describe(names, tile)
        sources = [x if name in self.operands else None for x, name in zip(sources, names, strict=True)]
        made = [None if x is None else self._new_parts(x) for x in sources]
        self.parts |= {name: x for name, x in zip(names, made, strict=True) if x is not None}
        padded = -(-count // PADDING.value) * PADDING.value
        factors = plans.allocated(
            torch.empty((*self.lead, padded, COUNT.value), dtype=torch.float32, device=self.device)
        )
        # Sources and parts may merge their leading dimensions in different ways: here none are.
        row = [
            None if x is None else (*_steps(x, int(static.VEC)), getattr(strides, name)[-1])
            for x, name in zip(sources, names, strict=True)
        ]
        places = [None if x is None else _steps(x, MULTIPLE.value) for x in made]
        _, L1, L2, L3 = (1,) * (LEADING - len(self.lead)) + tuple(self.lead)
        widths = "".join("E" if name in WIDE_E else "D" for name in names)
        args = (*sources, *made, factors, tuple(row), tuple(places), call._replace(L1=L1, L2=L2, L3=L3), count, widths)
        launch(parts_kernel, padded // tile.rows * self.heads, self, args, static, tile)
        return factors

    def _new_parts(self, x: Tensor) -> Tensor:
        """Uninitialised parts of a tensor; what is expanded is split once."""
        lead = [1 if step == 0 else size for size, step in zip(x.shape[:-2], x.stride()[:-2], strict=True)]
        columns = -(-x.shape[-1] // MULTIPLE.value) * MULTIPLE.value
        return plans.allocated(torch.empty((*lead, x.shape[-2], columns), dtype=torch.float32, device=self.device))

    def describe(
        self, names: Sequence[str], tile: Tile, grouped: bool = False
    ) -> tuple[list[Tensor | None], Strides, Call, Static]:
        whole = self.tensors
        self.tensors = whole | self.parts
        try:
            tensors, strides, call, static = super().describe(names, tile, grouped)
        finally:
            self.tensors = whole
        return tensors, strides, call, _with_parts(static)


def _steps(x: Tensor, unit: int) -> tuple[int, ...]:
    """Strides of four leading dimensions, 0 where there is one index."""
    steps = [0 if size == 1 else step // unit for size, step in zip(x.shape[:-2], x.stride()[:-2], strict=True)]
    return (0,) * (LEADING - len(steps)) + tuple(steps)


@lru_cache(maxsize=4096)
def _with_parts(static: Static) -> Static:
    return replace(static, SPLIT=True)


def splits(frame: Frame) -> bool:
    """Whether float32 products of a call are made of parts: with PyTorch's "highest" precision."""
    return frame.dtype == torch.float32 and precision(frame.dtype) == "tf32x3"


def static_for(frame: Frame, static: Static) -> Static:
    """What to compile a kernel for that splits its operands itself."""
    return _with_parts(static) if splits(frame) else static


def with_parts(frame: Frame, operands: Sequence[str], groups: Groups = GROUPS) -> Frame:
    """The frame to describe kernels with that load ``operands`` by ``load_operand``, and these alone."""
    return SplitFrame(frame, operands, groups) if splits(frame) and len(frame.lead) <= LEADING else frame


def reading(frame: Frame, operands: Sequence[str]) -> Frame:
    """The frame to describe a kernel with that loads fewer operands by ``load_operand`` than are split."""
    if not isinstance(frame, SplitFrame):
        return frame
    fewer = copy(frame)
    fewer.parts = {name: x for name, x in frame.parts.items() if name in operands}
    return fewer


def factors(frame: Frame, group: str) -> Tensor | None:
    """Those of the operands of a group; None where operands are not split."""
    return frame.factors[group] if isinstance(frame, SplitFrame) else None
