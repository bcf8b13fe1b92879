"""Tile shapes by kernel, head width, dtype, causality and architecture. Written by ``scripts/tune.py``."""

from __future__ import annotations

from typing import Any, NamedTuple


class Tile(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its loads."""

    rows: int
    keys: int
    warps: int
    stages: int
    split: bool = False  # cotangents of keys and of values by two launches: fewer accumulators a program


def select(kernel: str, frame: Any) -> Tile:
    """The tile of a kernel for a call."""
    N, M = frame.N, frame.M
    return Tile(min(64, max(16, 1 << (N - 1).bit_length())), min(64, max(16, 1 << (M - 1).bit_length())), 4, 2)
