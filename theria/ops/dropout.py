"""Stateless dropout: the mask is a pure function of (seed, position), so that every derivative replays it.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The counter of
the entry (head, n, m) of P is (m // 4, n, head mod 2³², head // 2³²), its word m mod 4; the key is the 64-bit seed.
An entry is kept when its word, a uniform integer below 2³², is at least p·2³².
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from theria.ops.operands import AttentionSpec

_LOW = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b. The int64 product wraps modulo 2⁶⁴, which keeps all 64 bits of the true one."""
    product = a * b
    return (product >> 32) & _LOW, product & _LOW


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random 32-bit words (in int64) for each counter; everything broadcasts."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIER[0])
        high1, low1 = _multiply(c2, _MULTIPLIER[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, spec: AttentionSpec, rows: range, M: int) -> Tensor:
    """Which entries of P survive, for a block of rows.

    Args:
        seed: int64 (*L, 1, 1).
        spec: gives ``dropout_p`` and the logical ``heads``.
        rows: the rows n of the block.
        M: number of keys.

    Returns:
        bool (*L, len(rows), M), L the broadcast of ``seed``'s and ``heads``.
    """
    device = seed.device
    head = torch.arange(math.prod(spec.heads), device=device).reshape(*spec.heads, 1, 1)
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    group = torch.arange((M + 3) // 4, device=device)
    words = philox((group, row, head & _LOW, head >> 32), (seed & _LOW, (seed >> 32) & _LOW))
    return (torch.stack(torch.broadcast_tensors(*words), -1) >= threshold(spec.dropout_p)).flatten(-2)[..., :M]


def threshold(dropout_p: float) -> int:
    """Smallest 32-bit word that is kept."""
    return min(round(dropout_p * 2**32), 2**32)


def keep_scale(dropout_p: float) -> float:
    """1 / (1 − p), the factor of a kept entry; 0 when everything is dropped."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
