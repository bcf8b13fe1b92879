"""Tile shapes by kernel, head width, dtype, causality and architecture.

The measured ones are data in :mod:`theria.ops.triton.tile_table`, which ``scripts/tune.py`` writes. What is not in the
table, another chip among it, gets a safe default: small enough for 99 KB of shared memory, the least of any chip since
sm_80.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from theria.ops.triton.tile_table import TABLE


class Tile(NamedTuple):
    """Rows and keys of a tile, warps of a program, stages of its loads.

    A program of a short kernel holds all keys of its heads; ``rows`` are those of all its heads together, and of the
    first of its walks where it is split: the second one takes half of them.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    split: bool = False  # what keys and values gather one after the other, in two launches or walks: fewer accumulators
    held: bool = False  # left operands that a loop does not change stay in registers (half precision)
    most: int = 0  # registers of a thread at most, so that a multiprocessor has room for more programs; 0 for any
    anchored: bool = False  # with causality, rows are counted from the tile's first: more registers here, fewer there


class Key(NamedTuple):
    """What a tile is chosen by.

    Attributes:
        kernel: its name; with the suffix "_all" where tdO is given besides the tangents.
        width: the power of two, 16 to 256, that holds the wider of the two head dimensions.
        kind: "half" (bfloat16, float16) or "float".
        causal: whether rows see the keys up to themselves; False where it does not matter.
        arch: compute capability, 90 for 9.0; 0 where there is no CUDA device.
        keys: the tile side that holds the keys of a short kernel; 0 for the others.
    """

    kernel: str
    width: int
    kind: str
    causal: bool
    arch: int
    keys: int = 0


INTERPRETER = Tile(64, 64, 1, 1)  # there a tile costs the same at any size: few large ones
# The side that a program keeps, with its accumulators, the side it walks over, warps and stages, by kind and width.
DEFAULTS = {
    "first": {
        ("half", 16): (64, 64, 4, 2),
        ("half", 32): (64, 64, 4, 2),
        ("half", 64): (64, 32, 4, 2),
        ("half", 128): (64, 32, 4, 1),
        ("half", 256): (32, 16, 4, 1),
        ("float", 16): (64, 32, 4, 1),
        ("float", 32): (64, 16, 4, 1),
        ("float", 64): (32, 32, 4, 1),
        ("float", 128): (32, 16, 4, 1),
        ("float", 256): (16, 16, 8, 1),
    },
    "second": {
        ("half", 16): (64, 32, 4, 2),
        ("half", 32): (64, 32, 4, 2),
        ("half", 64): (64, 16, 4, 1),
        ("half", 128): (32, 16, 4, 1),
        ("half", 256): (16, 16, 8, 1),
        ("float", 16): (64, 16, 4, 1),
        ("float", 32): (32, 16, 4, 1),
        ("float", 64): (16, 16, 4, 1),
        ("float", 128): (16, 16, 8, 1),
        ("float", 256): (16, 16, 8, 1),
    },
}
DEFAULTS["mixed"] = DEFAULTS["second"] | {("float", 32): (64, 16, 4, 1)}  # 32 rows spill: no wgmma for so few
LEAST, LARGEST = 16, 256  # sides of a tile
WIDTHS = (16, 32, 64, 128, 256)
DTYPES = {"half": torch.bfloat16, "float": torch.float32}  # one of each kind
VARIANT = "_all"
# width, or keys of a short kernel, from which a mask or dropout leave too little room for the tile of a plain call
CROWDED = {"half": 128, "float": 64}
SHORT = "short"
ROWS_ONLY = ("row_stats",)  # kernels without scores
# Kernels of half precision alone, and the widest head whose accumulators and tiles of scores fit the registers.
NARROW = {"jvp_dq": 64}

_overrides: dict[str, Tile] = {}


def kind(dtype: torch.dtype) -> str:
    return "float" if dtype == torch.float32 else "half"


def power_of_two(n: int) -> int:
    """The smallest tile side that holds ``n``, within the sides that a tile may have."""
    return min(max(1 << max(n - 1, 0).bit_length(), LEAST), LARGEST)


@lru_cache
def architecture(device: torch.device) -> int:
    """Compute capability as one number; 0 for what is no CUDA device."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def is_short(kernel: str) -> bool:
    return SHORT in kernel


def covers(kernel: str, width: int, kind: str) -> bool:
    """Whether a kernel takes heads of a width (a power of two) and a kind of dtype at all."""
    widest = NARROW.get(kernel.removesuffix(VARIANT))
    return widest is None or (kind == "half" and width <= widest)


def measured(key: Key) -> Tile | None:
    """The entry of the table; without one of its own a variant has that of its kernel."""
    entry = TABLE.get(key) or TABLE.get(key._replace(kernel=key.kernel.removesuffix(VARIANT)))
    return Tile(*entry) if entry else None


def lookup(key: Key) -> Tile:
    """The tile of the table, else a default that works on every chip."""
    tile = measured(key)
    if tile:
        return tile
    if key.kernel.removesuffix(VARIANT) in ROWS_ONLY:
        return Tile(max(4096 // key.width, LEAST), LEAST, 4, 1)
    if is_short(key.kernel):
        side = max(key.keys, key.width)
        area = 1024 if key.kind == "float" else 2048 if side > 32 else 4096
        return Tile(min(max(area // side, LEAST), 64), key.keys, 8 if side > 64 else 4, 1)
    second = key.kernel.startswith(("hvp", "forward_jvp", "jvp_dq"))
    order = "mixed" if key.kernel == "jvp_jvp" else "second" if second else "first"
    kept, walked, warps, stages = DEFAULTS[order][key.kind, key.width]
    return Tile(walked, kept, warps, stages) if "dkv" in key.kernel else Tile(kept, walked, warps, stages)


def shrink(tile: Tile, rows: int, keys: int, width: int) -> Tile:
    """A tile no larger than the call, and warps no more than its smaller products keep busy."""
    rows, keys = min(tile.rows, rows), min(tile.keys, keys)
    if rows == tile.rows and keys == tile.keys:
        return tile
    busy = max(rows * keys // 1024, max(rows, keys) * width // 2048, 1)
    return tile._replace(rows=rows, keys=keys, warps=min(tile.warps, busy))


@lru_cache(maxsize=4096)
def choose(key: Key, rows: int, keys: int) -> Tile:
    """The tile of a call whose rows and keys tiles of these sides hold."""
    if is_short(key.kernel):
        return lookup(key)  # a head with fewer rows leaves room for others
    return shrink(lookup(key) if key.arch else INTERPRETER, rows, keys, key.width)


def key_of(kernel: str, frame: Any) -> Key:
    """What the tile of a call is chosen by."""
    name = kernel + VARIANT if "tdo" in frame.tensors else kernel
    width = power_of_two(max(frame.D, frame.E))
    short = is_short(kernel)
    causal = frame.spec.is_causal and not short and kernel not in ROWS_ONLY
    keys = power_of_two(frame.M) if short else 0
    return Key(name, width, kind(frame.dtype), causal, architecture(frame.device), keys)


def with_room(tile: Tile, key: Key) -> Tile:
    """The tile of a call with a mask or dropout, which take registers and pass through shared memory."""
    tile = tile._replace(most=0)
    if max(key.width, key.keys) < CROWDED[key.kind]:
        return tile
    if "dkv" in key.kernel or is_short(key.kernel):
        return tile._replace(rows=max(tile.rows // 2, LEAST))
    return tile._replace(keys=max(tile.keys // 2, LEAST))


def select(kernel: str, frame: Any) -> Tile:
    """The tile of a kernel for a call (:class:`theria.ops.triton.launch.Frame`)."""
    if kernel in _overrides:
        return _overrides[kernel]
    key = key_of(kernel, frame)
    tile = choose(key, power_of_two(frame.N), power_of_two(frame.M))
    return with_room(tile, key) if "mask" in frame.tensors or "seed" in frame.tensors else tile


def overridden() -> bool:
    """Whether tiles are chosen by :func:`override`."""
    return bool(_overrides)


@contextmanager
def override(kernel: str, tile: Tile) -> Iterator[None]:
    """Inside, every call of ``kernel`` uses ``tile`` (of the whole process: backward has threads of its own)."""
    before = dict(_overrides)
    _overrides[kernel] = tile
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
