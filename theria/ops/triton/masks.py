"""Which keys a row sees: causality, the end of the keys, boolean and additive masks."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from theria.ops.triton.tensors import at, constexpr, device


@device
def _positions(row, col, TRANSPOSED: constexpr, S: constexpr) -> Any:
    """Rows and columns of the tile at (row, col), along its dimensions."""
    rows = row + tl.arange(0, S.BLOCK_M)
    cols = col + tl.arange(0, S.BLOCK_N)
    if TRANSPOSED:
        return rows[None, :], cols[:, None]
    else:
        return rows[:, None], cols[None, :]


@triton.jit
def mask_scores(
    x,
    mask,
    strides,
    lead,
    row,
    col,
    call,
    edge,
    UNIT: constexpr,
    TRANSPOSED: constexpr,
    S: constexpr,
):
    """Scores of the tile at (row, col), −inf where a row does not see a key.

    Args:
        x: scores times UNIT, (S.BLOCK_M, S.BLOCK_N), with TRANSPOSED (S.BLOCK_N, S.BLOCK_M).
        mask: bool (as bytes) or additive, or None; row and column strides of 0 broadcast it.
        edge: whether the diagonal or the end of the keys may cross the tile. Decided as the kernel runs: a second loop
            for such tiles costs more than the branch (its pipeline starts anew, and its registers count too).
    """
    if mask is not None:
        rows, cols = _positions(row, col, TRANSPOSED, S)
        entries = at(mask, strides.mask, lead, 1)
        entries += rows.to(tl.int64) * strides.mask[4] + cols.to(tl.int64) * strides.mask[5]
        exists = (rows < call.N) & (cols < call.M)
        if mask.dtype.element_ty.is_floating():
            x += tl.load(entries, mask=exists, other=float("-inf")).to(tl.float32) * UNIT
        else:
            x = tl.where(tl.load(entries, mask=exists, other=0) != 0, x, float("-inf"))
    if S.CAUSAL or not S.EVEN_M:  # noqa: SIM102 - decided as it is compiled, the next as it runs
        if edge:
            if not S.EVEN_M:
                _, cols = _positions(row, col, TRANSPOSED, S)
                x = tl.where(cols < call.M, x, float("-inf"))
            if S.CAUSAL:
                # Only differences count. A thread has a few positions along the first dimension and many along the
                # second: as constants of the loop (anchored) they are kept or made again, as the assembler likes.
                shift = -row if S.ANCHORED else (row if TRANSPOSED else 0)
                rows, cols = _positions(row + shift, col + shift, TRANSPOSED, S)
                x = tl.where(rows >= cols, x, float("-inf"))
    return x


TOGETHER = tl.constexpr(16)  # heads whose causal programs come by turns: what one sees of them fits the cache


@device
def own_block(blocks, S: constexpr) -> Any:
    """(head, block) of this program, of ``blocks`` a head; with causality the first block is that with the most work.

    Head by head, so that the programs that run at a time share a head's keys in the cache. With causality by several
    heads, of each the first block, of each the second: head by head, the long programs of the last head would start
    when there is nothing left to do beside them.
    """
    program = tl.program_id(0)
    if S.CAUSAL:
        first = program // (TOGETHER * blocks) * TOGETHER
        within = program - first * blocks
        heads = tl.minimum(TOGETHER, tl.num_programs(0) // blocks - first)
        return first + within % heads, within // heads
    else:
        return program // blocks, program % blocks


@device
def own_rows(call, S: constexpr):
    """(head, first row) of this program; the blocks of a head that see the most keys come first."""
    blocks = tl.cdiv(call.N, S.BLOCK_M)
    head, block = own_block(blocks, S)
    if S.CAUSAL:
        block = blocks - 1 - block
    return head, block * S.BLOCK_M


@device
def own_keys(call, S: constexpr):
    """(head, first key) of this program; the blocks of a head that the most rows see come first."""
    head, block = own_block(tl.cdiv(call.M, S.BLOCK_N), S)
    return head, block * S.BLOCK_N


@triton.jit
def key_range(row, call, S: constexpr):
    """(plain, end) for the rows from ``row``: they see no key from ``end`` on; no diagonal and no end of the keys
    crosses the tiles before ``plain``."""
    end = call.M
    plain = call.M // S.BLOCK_N * S.BLOCK_N
    if S.CAUSAL:
        end = tl.minimum(end, row + S.BLOCK_M)
        plain = tl.minimum(plain, (row + 1) // S.BLOCK_N * S.BLOCK_N)
    return plain, end


@device
def row_range(col, call, S: constexpr):
    """(start, plain) for the keys from ``col``: no row before ``start`` sees them; the diagonal crosses no tile of rows
    from ``plain`` on. Both are multiples of BLOCK_M."""
    start = 0
    plain = 0
    if S.CAUSAL:
        start = tl.minimum(col // S.BLOCK_M * S.BLOCK_M, call.N)
        plain = tl.minimum(tl.cdiv(col + S.BLOCK_N - 1, S.BLOCK_M) * S.BLOCK_M, tl.cdiv(call.N, S.BLOCK_M) * S.BLOCK_M)
    return start, plain
