"""Random numbers that are a pure function of (seed, step), the same on every platform, process and version of torch.

`torch.Generator` on the CPU keeps 32 bits of its seed, so that two steps of a long run can share their episodes, and
numpy is no dependency of torch. SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) is a counter passed through a mixing function: vectorised in int64, whose products wrap modulo 2^64.
"""

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned `value`."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def mix64(value: int) -> int:
    """SplitMix64's output function on a Python integer: a bijection of the 64-bit integers."""
    value &= _MASK
    for shift, factor in _MIX:
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> _LAST_SHIFT)


def _xor_shift_(z: Tensor, shift: int) -> Tensor:
    logical = (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # `>>` copies the sign bit: mask it away
    return z.bitwise_xor_(logical)


class Draws:
    """The stream of random tensors that belongs to (seed, step); each call continues the stream.

    The tensors are on the CPU, or where `device` says. The numbers are the same on every device: integers modulo 2^64,
    and floats that no operation rounds differently.
    """

    def __init__(self, seed: int, step: int = 0) -> None:
        # mix64 is a bijection: one seed never gives two steps the same state.
        self._state = mix64(mix64(seed + _GAMMA) + step + _GAMMA)

    def bits(self, *shape: int, device: torch.device | str | None = None) -> Tensor:
        """int64 of the given shape; every one of the 2^64 patterns is equally likely."""
        n = math.prod(shape)
        z = torch.arange(1, n + 1, dtype=torch.int64, device=device).mul_(_signed(_GAMMA)).add_(_signed(self._state))
        self._state = (self._state + n * _GAMMA) & _MASK
        for shift, factor in _MIX:
            z = _xor_shift_(z, shift).mul_(_signed(factor))
        return _xor_shift_(z, _LAST_SHIFT).view(shape)

    def uniform(
        self, *shape: int, low: float = 0.0, high: float = 1.0, device: torch.device | str | None = None
    ) -> Tensor:
        """float64 of the given shape in the open interval (low, high): the midpoints of 2^52 equal cells."""
        cells = (self.bits(*shape, device=device) >> 12).bitwise_and_((1 << 52) - 1).to(torch.float64)
        return cells.add_(0.5).mul_(2.0**-52).mul_(high - low).add_(low)

    def normal(self, *shape: int) -> Tensor:
        """float64 standard normal of the given shape, by the inverse of its distribution function."""
        return torch.special.ndtri(self.uniform(*shape))

    def integers(self, bound: int, *shape: int) -> Tensor:
        """int64 of the given shape, uniform on [0, bound) up to a bias of bound / 2^52."""
        return (self.uniform(*shape) * bound).to(torch.int64)

    def choose(self, available: Tensor, k: int) -> Tensor:
        """For each row of the boolean `available` (..., n): k of its true places, no two equal, in random order.

        Returns int64 (..., k). Every row needs at least k true places.
        """
        keys = self.bits(*available.shape).masked_fill_(~available, torch.iinfo(torch.int64).min)
        return keys.topk(k, dim=-1).indices

    def distinct(self, bound: int, *shape: int) -> Tensor:
        """int64 (..., k): in each row k distinct integers of [0, bound), in random order.

        What `choose` draws where every one of `bound` places is available, without a mask to read.
        """
        *rows, k = shape
        return self.bits(*rows, bound).topk(k, dim=-1).indices

    def permutation(self, *shape: int) -> Tensor:
        """int64 of the given shape whose last axis is a uniform permutation."""
        return self.bits(*shape).argsort(dim=-1)
