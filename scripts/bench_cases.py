"""What the GPU benchmark times: orders, implementations and shapes, and what a row could cost at least."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bench_peers import COMPILED, CUDNN, EAGER, FLASH, JVP_FLASH, MATH, THERIA, Candidate

Shape = tuple[int, int, int, int]

# Products of 2·B·H·N²·D, halved when causal: nominal ones that rates are given in, and the fewest that suffice.
NOMINAL = {"forward": 2, "vjp": 5, "jvp": 5, "double backward": 17, "forward over reverse": 17}
ONE_TILE = 128  # keys up to which the scores of jvp and hvp are computed once: 12 products for a double backward
FEWEST = {"forward": 2, "vjp": 5, "jvp": 7, "double backward": 15, "forward over reverse": 17}
# Tensors of the size of q that are read or written at least.
TENSORS = {"forward": 4, "vjp": 7, "jvp": 8, "double backward": 11, "forward over reverse": 11}
# Measured on an H200: bytes/s of a copy, and products at bf16 and, three tf32 products to one, float32.
COPY = 4.28e12
PRODUCTS = {torch.bfloat16: 672e12, torch.float16: 647e12, torch.float32: 348e12 / 3}

BF16, FP32 = torch.bfloat16, torch.float32
LONG = [
    *(((4, 16, 4096, 64), False), ((4, 16, 4096, 64), True), ((4, 16, 4096, 128), False), ((4, 16, 4096, 128), True)),
    ((1, 16, 32768, 64), False),
]
SHORT = [
    *(((8192, 4, 16, 16), BF16), ((2048, 4, 64, 32), BF16), ((512, 8, 128, 64), BF16), ((64, 8, 256, 64), BF16)),
    ((2048, 4, 64, 32), FP32),
]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    section: str
    order: str
    candidate: Candidate
    shape: Shape
    dtype: torch.dtype = BF16
    causal: bool = False

    @property
    def unit(self) -> float:
        B, H, N, D = self.shape
        return 2.0 * B * H * N * N * D * (0.5 if self.causal else 1.0)

    @property
    def floor_ms(self) -> float:
        bytes_moved = TENSORS[self.order] * math.prod(self.shape) * self.dtype.itemsize
        once = self.order == "double backward" and self.shape[2] <= ONE_TILE
        products = (12 if once else FEWEST[self.order]) * self.unit
        return 1e3 * max(products / PRODUCTS[self.dtype], bytes_moved / COPY)


def cases() -> Iterator[Case]:
    """What is timed; those of one shape follow one another."""
    for shape, causal in LONG:
        for candidate in (THERIA, EAGER, MATH):
            yield Case("double backward", "double backward", candidate, shape, BF16, causal)
    for shape, dtype in SHORT:
        for candidate in (THERIA, EAGER, MATH):
            yield Case("short", "double backward", candidate, shape, dtype)
    for shape, causal in LONG[:4]:
        yield Case("forward over reverse", "forward over reverse", THERIA, shape, BF16, causal)
        for order in ("forward", "vjp"):
            for candidate in (THERIA, FLASH, CUDNN):
                yield Case(order, order, candidate, shape, BF16, causal)
        yield Case("jvp", "jvp", THERIA, shape, BF16, causal)
    for order in ("forward", "vjp"):
        for candidate in (THERIA, FLASH, CUDNN):
            yield Case(order, order, candidate, (64, 8, 256, 64))
    for candidate in (THERIA, MATH):
        yield Case("float32", "double backward", candidate, (4, 16, 4096, 64), FP32)


def slow_to_start() -> Iterator[Case]:
    """Peers that compile, or tune themselves, first."""
    for shape, dtype in SHORT:
        yield Case("short", "double backward", COMPILED, shape, dtype)
    for shape, causal in LONG:
        yield Case("double backward", "double backward", COMPILED, shape, BF16, causal)
    for shape, causal in LONG[:4]:
        yield Case("jvp", "jvp", JVP_FLASH, shape, BF16, causal)


def name_of(case: Case) -> dict[str, Any]:
    return {
        "section": case.section,
        "order": case.order,
        "candidate": case.candidate.name,
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
        "causal": case.causal,
        "floor_ms": case.floor_ms,
    }
