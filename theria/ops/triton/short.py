"""The short regime, where few-shot learning lives: all keys of a head fit one tile, and one launch does everything.

Since a row's keys are all there, its sums are complete at once: neither O nor tO is read, delta is rowsum(P∘dP) and
tdelta is rowsum(tP∘dP + P∘tdP) (README (6), (15)). Scores and their tangents are computed once for the jvp and the
hvp: 12 products for a double backward instead of 20, and every tensor is read or written once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.parts import static_for
from theria.ops.triton.short_kernels import second_short_kernel, vjp_short_kernel
from theria.ops.triton.tiles import LEAST, Tile, kind, power_of_two, select

ROWS, KEYS, WIDTH = 256, 128, 128  # the most rows and keys and the widest head of a program
AREA = {"half": 64 * 128, "float": 64 * 32}  # and the most of keys times width, half of it where memory is small:
# 64 keys of width 128 need 8 warps, which then share the columns of a product: Triton 3.6 makes a program of that which
# reads outside of its shared memory.
SHARED_COLUMNS = (64, 128)
SHARED = 160 * 1024  # bytes of shared memory a program that the tiles were chosen for (compute capability 8.0, 9.0)
PACKED = 32  # the most rows or keys of a head that shares a program,
PACKED_AREA = {"half": 1024, "float": 256}  # and the most of them times width: a warp holds a head
VJP_NAMES = ("q", "k", "v", "mask", "seed", "do", "dq", "dk", "dv")
SECOND_NAMES = ("q", "k", "v", "mask", "seed", "do", "tq", "tk", "tv", "tdo", "to", "dq", "dk", "dv")


class _Sizes(Protocol):
    """A frame, or what has its sizes."""

    N: int
    M: int
    D: int
    E: int


@lru_cache
def _area(kind: str, device: torch.device) -> int:
    """The most of keys times width on a device; the interpreter has room for all."""
    if device.type != "cuda":
        return AREA[kind]
    small = torch.cuda.get_device_properties(device).shared_memory_per_block_optin < SHARED
    return AREA[kind] // 2 if small else AREA[kind]


def fits(sizes: _Sizes, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> bool:
    """Whether the short kernels take a call: whether one program holds the keys of a head and what belongs to them."""
    keys, width = power_of_two(sizes.M), power_of_two(max(sizes.D, sizes.E))
    within = sizes.N <= ROWS and sizes.M > 0 and keys <= KEYS and width <= WIDTH
    return within and keys * width <= _area(kind(dtype), torch.device(device)) and (keys, width) != SHARED_COLUMNS


def heads_of(tile: Tile, frame: Frame, grouped: bool) -> int:
    """Heads of a program: as many as the rows of its tile hold, where they are small enough to share one."""
    rows, keys = power_of_two(frame.N), power_of_two(frame.M)
    side, width = max(rows, keys), power_of_two(max(frame.D, frame.E))
    small = side <= PACKED and side * width <= PACKED_AREA[kind(frame.dtype)]
    return max(tile.rows // rows, 1) if small and not grouped else 1


def _launch(kernel: Any, name: str, frame: Frame, names: tuple[str, ...], rows: tuple[Any, ...], grouped: bool):
    """Start a short kernel on the heads of a frame."""
    tile = select(name, frame)
    pack = heads_of(tile, frame, grouped)
    tile = tile._replace(rows=min(tile.rows, power_of_two(frame.N)), keys=power_of_two(frame.M))
    tensors, strides, call, static = frame.describe(names, tile, grouped)
    static = second = static_for(frame, static)
    if tile.split:  # its second walk takes half as many rows
        *_, second = frame.describe(names, tile._replace(rows=max(tile.rows // 2, LEAST)), grouped)
        second = static_for(frame, second)
    walks = (second,) if kernel is second_short_kernel else ()
    flat = (1, 1, frame.heads) == (call.L1, call.L2, call.L3)
    one = tile.rows >= frame.N and not grouped
    programs = frame.heads // frame.lead[-1] if grouped else -(-frame.heads // pack)
    args = (*tensors, *rows, strides, call, frame.heads, pack, flat, one, *walks)
    launch(kernel, programs, frame, args, static, tile)


def vjp_short(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, spec: AttentionSpec, shapes: Shapes):
    """dq, dk, dv, None; see :func:`theria.ops.reference.vjp`."""
    del o
    frame = Frame(ops, spec, do=do)
    out, grouped = _cotangents(frame, shapes)
    _launch(vjp_short_kernel, "vjp_short", frame, VJP_NAMES, (frame.rows(lse),), grouped)
    return *map(frame.finish, out, shapes[:3]), None


def jvp_hvp_short(
    ops: Operands,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    t: Tangents,
    tdo: Tensor | None,
    spec: AttentionSpec,
    shapes: Shapes,
):
    """to, tau, tdq, tdk, tdv, None: :func:`theria.ops.reference.jvp` and :func:`theria.ops.reference.hvp` at once."""
    del o
    frame = Frame(ops, spec, do=do, tq=t.q, tk=t.k, tv=t.v, tdo=tdo)
    to, tau = frame.new_output("to"), frame.new_rows()
    out, grouped = _cotangents(frame, shapes)
    _launch(second_short_kernel, "second_short", frame, SECOND_NAMES, (frame.rows(lse), tau), grouped)
    return to, tau, *map(frame.finish, out, shapes[:3]), None


def hvp_short(
    ops: Operands,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    t: Tangents,
    tdo: Tensor | None,
    to: Tensor,
    tau: Tensor,
    spec: AttentionSpec,
    shapes: Shapes,
):
    """tdq, tdk, tdv, None; see :func:`theria.ops.reference.hvp`. What the jvp has given is not read."""
    del o, to, tau
    frame = Frame(ops, spec, do=do, tq=t.q, tk=t.k, tv=t.v, tdo=tdo)
    out, grouped = _cotangents(frame, shapes)
    _launch(second_short_kernel, "second_short", frame, SECOND_NAMES, (frame.rows(lse), None), grouped)
    return *map(frame.finish, out, shapes[:3]), None


def _cotangents(frame: Frame, shapes: Shapes) -> tuple[tuple[Tensor | None, ...], bool]:
    """What the kernels write for q, k and v, and whether a program sums over a group of query heads."""
    grouped = frame.sums_last(shapes[1], shapes[2])
    dq = frame.new_cotangent("dq", shapes[0])
    return (dq, frame.new_cotangent("dk", shapes[1], grouped), frame.new_cotangent("dv", shapes[2], grouped)), grouped
