"""The launches that both orders of cotangents share: one kernel by blocks of rows, one by blocks of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Size, Tensor

from theria.ops.operands import Shapes
from theria.ops.triton.launch import Frame, launch
from theria.ops.triton.parts import factors
from theria.ops.triton.tiles import select


def by_rows(kernel: Any, name: str, reads: Sequence[str], frame: Frame, stats: Tensor, shape: Size | None):
    """The wanted cotangent of q, or its tangent; None where it is not wanted.

    Args:
        kernel: the kernel, with its ``name`` in the tile table.
        reads: names of the tensors that it reads.
        stats: packed row statistics.
    """
    if shape is None:
        return None
    dq = frame.new_cotangent("dq", shape)
    tile = select(name, frame)
    tensors, strides, call, static = frame.describe((*reads, "dq"), tile)
    programs = -(-frame.N // tile.rows) * frame.heads
    launch(
        kernel,
        programs,
        frame,
        (*tensors, stats, factors(frame, "rows"), factors(frame, "keys"), strides, call),
        static,
        tile,
    )
    return frame.finish(dq, shape)


def by_keys(
    kernel: Any, name: str, reads: Sequence[str], frame: Frame, stats: Tensor, shapes: tuple[Size | None, Size | None]
) -> tuple[Tensor | None, Tensor | None]:
    """The wanted cotangents of k and v, or their tangents, in one launch, or in two where the tile says so."""
    if shapes == (None, None):
        return None, None
    tile = select(name, frame)
    if tile.split and None not in shapes:
        dk, _ = by_keys(kernel, name, reads, frame, stats, (shapes[0], None))
        _, dv = by_keys(kernel, name, reads, frame, stats, (None, shapes[1]))
        return dk, dv
    grouped = frame.sums_last(*shapes)
    dk, dv = (frame.new_cotangent(x, shape, grouped) for x, shape in zip(("dk", "dv"), shapes, strict=True))
    names = tuple(x for x, cotangent in (("dk", dk), ("dv", dv)) if cotangent is not None)
    tensors, strides, call, static = frame.describe((*reads, *names), tile, grouped)
    programs = -(-frame.M // tile.keys) * (frame.heads // frame.lead[-1] if grouped else frame.heads)
    written = dk, dv, stats, factors(frame, "rows"), factors(frame, "keys")
    launch(kernel, programs, frame, (*tensors[: len(reads)], *written, strides, call), static, tile)
    return frame.finish(dk, shapes[0]), frame.finish(dv, shapes[1])


def cotangents(
    order: str, kernels: tuple[Any, Any], reads: Sequence[str], frame: Frame, stats: Tensor, shapes: Shapes
) -> tuple[Tensor | None, ...]:
    """Those of q, k and v that are wanted, and None for the mask; ``order`` is "vjp" or "hvp"."""
    dq = by_rows(kernels[0], f"{order}_dq", reads, frame, stats, shapes[0])
    dk, dv = by_keys(kernels[1], f"{order}_dkv", reads, frame, stats, shapes[1:3])
    return dq, dk, dv, None
