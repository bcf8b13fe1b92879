"""The dropout mask of :mod:`theria.ops.dropout` in kernels: the same Philox words at the same positions."""

from __future__ import annotations

import triton
import triton.language as tl

from theria.ops.triton.tensors import constexpr


@triton.jit
def keep_factor(seed, head, row, col, call, BLOCK_R: constexpr, BLOCK_C: constexpr, TRANSPOSED: constexpr):
    """R (3) of the tile at (row, col): 1/(1 − p) where an entry is kept, 0 where it is dropped; None without dropout.

    Args:
        seed: the key of this head; None without dropout.
        head: leading index; its position among the logical heads is part of the counter.
        col: a multiple of 4, as BLOCK_C: one Philox call gives the words of four neighbouring keys.
        TRANSPOSED: give (BLOCK_C, BLOCK_R) instead of (BLOCK_R, BLOCK_C).
    """
    if seed is None:
        return
    else:
        position = tl.cast(head, tl.int64) % call.heads
        zero = tl.zeros((BLOCK_R, BLOCK_C // 4), tl.uint32)
        group = zero + (col // 4 + tl.arange(0, BLOCK_C // 4)).to(tl.uint32)[None, :]
        rows = zero + (row + tl.arange(0, BLOCK_R)).to(tl.uint32)[:, None]
        low = zero + (position & 0xFFFFFFFF).to(tl.uint32)
        high = zero + (position >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(seed, group, rows, low, high)
        # join(x, y)[..., i] is x or y, so that the last two dimensions of this count 0, 1, 2, 3
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_R, BLOCK_C))
        keep = tl.where(words.to(tl.int64) >= call.threshold, call.keep_scale, 0.0)
        return tl.trans(keep) if TRANSPOSED else keep


@triton.jit
def drop(x, keep):
    """R∘x (3); x itself without dropout."""
    if keep is None:
        return x
    else:
        return x * keep
