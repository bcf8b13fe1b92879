"""What a kernel is given, and how it addresses its tensors: any strides, four leading dimensions, past 2³¹ elements.

A (*L, N, D) tensor is a pointer and its :class:`Strides` entry ``(s0, s1, s2, s3, row)`` in units of ``S.VEC``
elements; its last dimension has stride one. A broadcast leading dimension (grouped queries, an operand that ``vmap``
leaves unbatched) has stride 0. Row statistics are contiguous (*L, N). An absent tensor is None, and what would be
computed from it is not compiled.

``head`` counts the leading index, ``lead`` is the same as four coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

if TYPE_CHECKING:  # what a kernel is compiled for is a value like any other, what it calls a function like any other
    from typing import Any as constexpr

    def device(function: Callable[..., Any]) -> Callable[..., Any]: ...

else:
    from triton.language import constexpr

    device = triton.jit


class Strides(NamedTuple):
    """Strides of every tensor that a kernel may be given; None for an absent one."""

    q: Any = None
    k: Any = None
    v: Any = None
    mask: Any = None  # (s0, s1, s2, s3, row, column), in elements
    seed: Any = None  # in elements
    o: Any = None
    do: Any = None
    tq: Any = None
    tk: Any = None
    tv: Any = None
    tdo: Any = None
    to: Any = None
    tq2: Any = None
    tk2: Any = None
    tv2: Any = None
    ttq: Any = None
    ttk: Any = None
    ttv: Any = None
    vjp_dq: Any = None  # dQ of the vjp, where dq is its tangent
    dq: Any = None
    dk: Any = None
    dv: Any = None


class Call(NamedTuple):
    """The numbers of a call that do not make another kernel."""

    scale: Any
    N: Any
    M: Any
    L1: Any  # sizes of the last three leading dimensions
    L2: Any
    L3: Any
    heads: Any  # number of logical heads, for dropout
    threshold: Any  # smallest random word that is kept
    keep_scale: Any  # 1 / (1 − p)


@dataclass(frozen=True)
class Static:
    """What makes another kernel. ``S`` in their code.

    Attributes:
        D, E: head dimensions of queries and values.
        BLOCK_D, BLOCK_E: the powers of two, at least 16, that hold them.
        BLOCK_M, BLOCK_N: rows and keys of a tile.
        CAUSAL: row n sees the keys up to n.
        EVEN_N, EVEN_M: the tiles divide the rows, the keys.
        VEC: elements in 16 bytes when every address of the call divides by 16 bytes, else 1.
        PRECISION: what ``tl.dot`` does with float32 operands; "ieee" if they are of half precision.
        NATURAL: exponents are of base e, as lse is, and not of base 2 (:mod:`theria.ops.triton.softmax`).
        ROW_D, ROW_E: the stride that all rows of width D, of width E have in common; 0 where there is none. As a
            constant it saves some thirty registers a thread.
        HELD: left operands that a loop does not change stay in registers.
        ANCHORED: with causality, rows are counted from the tile's first (:mod:`theria.ops.triton.masks`).
        SPLIT: float32 operands are pairs of fp16 parts (:mod:`theria.ops.triton.products`).
        APART: a short kernel walks over the rows once for each of its two accumulators.
        GROUPED: sum the cotangents of keys and values over the last leading dimension (grouped queries).
    """

    D: int
    E: int
    BLOCK_D: int
    BLOCK_E: int
    BLOCK_M: int
    BLOCK_N: int
    CAUSAL: bool
    EVEN_N: bool
    EVEN_M: bool
    VEC: int
    PRECISION: str
    NATURAL: bool = False
    ROW_D: int = 0
    ROW_E: int = 0
    HELD: bool = False
    ANCHORED: bool = False
    SPLIT: bool = False
    APART: bool = False
    GROUPED: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, tl.constexpr(getattr(self, field.name)))


@triton.jit
def coordinates(head, call):
    """The four coordinates of a leading index: 64-bit, as addresses must be, from 32-bit divisions (cheaper)."""
    outer = head // call.L3
    i3 = head - outer * call.L3
    head = outer // call.L2
    i2 = outer - head * call.L2
    outer = head // call.L1
    i1 = head - outer * call.L1
    return outer.to(tl.int64), i1.to(tl.int64), i2.to(tl.int64), i3.to(tl.int64)


@triton.jit
def at(pointer, strides, lead, VEC: constexpr):
    """Address of the first element of one head; None for an absent tensor."""
    if pointer is None:
        return
    else:
        i0, i1, i2, i3 = lead
        return pointer + (i0 * strides[0] + i1 * strides[1] + i2 * strides[2] + i3 * strides[3]) * VEC


@triton.jit
def at_row(pointer, head, call):
    """Address of the first row statistic of one head; None for an absent one."""
    if pointer is None:
        return
    else:
        return pointer + tl.cast(head, tl.int64) * call.N


@triton.jit
def _addresses(base, start, strides, BLOCK: constexpr, WIDTH: constexpr, S: constexpr):
    """Addresses of the rows from ``start``; only offsets inside the tile are 32-bit."""
    BLOCK_W: constexpr = S.BLOCK_D if WIDTH == "D" else S.BLOCK_E
    ROW: constexpr = S.ROW_D if WIDTH == "D" else S.ROW_E
    row = ROW if ROW > 0 else strides[4] * S.VEC
    first = base + tl.cast(start, tl.int64) * row
    return first + (tl.arange(0, BLOCK)[:, None] * row + tl.arange(0, BLOCK_W)[None, :])


@triton.jit
def _inside(start, count, BLOCK: constexpr, WIDTH: constexpr, BLOCK_W: constexpr):
    """(BLOCK, BLOCK_W): which elements of a tile exist."""
    rows = start + tl.arange(0, BLOCK) < count
    return rows[:, None] & (tl.arange(0, BLOCK_W) < WIDTH)[None, :]


@triton.jit
def load(base, start, count, strides, BLOCK: constexpr, WIDTH: constexpr, EVEN: constexpr, S: constexpr):
    """Rows [start, start + BLOCK) of one head, zero outside; None for an absent tensor.

    Args:
        count: number of rows of the tensor.
        WIDTH: "D" or "E".
        EVEN: all rows of the tile exist.
    """
    if base is None:
        return
    else:
        SIZE: constexpr = S.D if WIDTH == "D" else S.E
        BLOCK_W: constexpr = S.BLOCK_D if WIDTH == "D" else S.BLOCK_E
        addresses = _addresses(base, start, strides, BLOCK, WIDTH, S)
        if EVEN and SIZE == BLOCK_W:
            return tl.load(addresses)
        elif EVEN:
            return tl.load(addresses, mask=(tl.arange(0, BLOCK_W) < SIZE)[None, :], other=0.0)
        else:
            return tl.load(addresses, mask=_inside(start, count, BLOCK, SIZE, BLOCK_W), other=0.0)


@triton.jit
def store(base, x, start, count, strides, BLOCK: constexpr, WIDTH: constexpr, EVEN: constexpr, S: constexpr):
    """Write ``x`` to the rows [start, start + BLOCK) of one head, where they exist, in the tensor's dtype."""
    SIZE: constexpr = S.D if WIDTH == "D" else S.E
    BLOCK_W: constexpr = S.BLOCK_D if WIDTH == "D" else S.BLOCK_E
    addresses = _addresses(base, start, strides, BLOCK, WIDTH, S)
    x = x.to(base.dtype.element_ty)
    if EVEN and SIZE == BLOCK_W:
        tl.store(addresses, x)
    else:
        tl.store(addresses, x, mask=_inside(start, count, BLOCK, SIZE, BLOCK_W))


@triton.jit
def load_row(base, start, count, other, BLOCK: constexpr, EVEN: constexpr):
    """Row statistics of the rows [start, start + BLOCK) of one head, ``other`` where there is no row."""
    rows = start + tl.arange(0, BLOCK)
    if EVEN:  # N, and with it every address, divides by BLOCK: 16 bytes at a time
        return tl.load(tl.multiple_of(base, 16) + tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK))
    else:
        return tl.load(base + rows, mask=rows < count, other=other)


@triton.jit
def store_row(base, x, start, count, BLOCK: constexpr, EVEN: constexpr):
    """Write a row statistic."""
    rows = start + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(base + rows, x)
    else:
        tl.store(base + rows, x, mask=rows < count)
