"""Walking a call in blocks of query rows: the machinery under :mod:`theria.ops.blockwise`.

Numbers in parentheses are those of ``theria/ops/README.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from theria.ops.dropout import keep_mask, keep_scale
from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents, batch_shape, sum_to

NEG_INF = float("-inf")

# Elements of one (batch, rows, M) tile of scores. Larger tiles make better products and cost memory: on 2 cores the
# double backward at (1, 4, 4096, 64) took 3.0, 2.5, 2.1, 1.6 and 1.5 s with 2^18 to 2^22. A GPU wants enough of them.
TILE_ELEMENTS = {"cpu": 2**21}
TILE_ELEMENTS_DEFAULT = 2**25
# Below this many rows a tile of scores is no larger than the operands themselves.
MIN_ROWS = 32


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is accumulated in float32, everything else in its own dtype."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def matmul(a: Tensor, b: Tensor, *, alpha: float = 1.0, into: Tensor | None = None) -> Tensor:
    """alpha a @ b, or that added to ``into``, in its memory where it fits.

    The factor and the sum cost nothing where they are part of the product (BLAS's alpha and beta).
    """
    batch = a.shape[:-2]
    if batch != b.shape[:-2]:
        product = torch.matmul(a, b)
        product = product if alpha == 1.0 else product.mul_(alpha)
        return product if into is None else add(into, product)
    x, y = _flat(a), _flat(b)
    if into is not None and (target := _flat_view(into, batch)) is not None:
        target.baddbmm_(x, y, alpha=alpha)
        return into
    product = torch.bmm(x, y) if alpha == 1.0 else torch.baddbmm(x.new_zeros(()), x, y, beta=0, alpha=alpha)
    product = product.view(*batch, *product.shape[1:])
    return product if into is None else add(into, product)


def _flat(x: Tensor) -> Tensor:
    """One batch dimension: a view of every block of a contiguous tensor."""
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def _flat_view(x: Tensor, batch: torch.Size) -> Tensor | None:
    """One batch dimension in the memory of x; None where its layout, or another batch, does not allow that."""
    if x.shape[:-2] != batch:
        return None
    try:
        return x.view(batch.numel(), *x.shape[-2:])
    except RuntimeError:
        return None


def _holds(x: Tensor, y: Tensor) -> bool:
    """Whether x has the shape of an elementwise result of x and y, so that it may take it."""
    return torch.broadcast_shapes(x.shape, y.shape) == x.shape


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in x's memory where it fits."""
    return x.add_(y) if _holds(x, y) else x + y


def sub(x: Tensor, y: Tensor) -> Tensor:
    """x − y, in x's memory where it fits."""
    return x.sub_(y) if _holds(x, y) else x - y


def mul(x: Tensor, y: Tensor) -> Tensor:
    """x∘y, in x's memory where it fits."""
    return x.mul_(y) if _holds(x, y) else x * y


def cut(x: Tensor, part: slice, dim: int = -2) -> Tensor:
    """x[..., part, :] as a view, also of a whole dimension (indexing would alias, which ``is_grads_batched`` lacks)."""
    return x.narrow(dim, part.start, part.stop - part.start)


def add_product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x + y∘z, in x's memory where it fits."""
    return x.addcmul_(y, z) if _holds(x, y) and _holds(x, z) else torch.addcmul(x, y, z)


def mask_block(mask: Tensor, rows: slice, cols: slice) -> Tensor:
    """The block of a mask whose last dimensions may be broadcast."""
    mask = mask if mask.shape[-2] == 1 else cut(mask, rows)
    return mask if mask.shape[-1] == 1 else cut(mask, cols, -1)


@dataclass(frozen=True)
class Block:
    """One block of query rows and what every order recomputes for it."""

    rows: slice
    cols: slice
    P: Tensor  # (*L, rows, cols)
    R: Tensor | None  # keep mask times 1/(1 − p), like P; None without dropout

    def centred(self, x: Tensor) -> Tensor:
        """x − P∘rowsum(x), in x's memory where it fits: P∘(y − rowsum(P∘y)) of x = P∘y, as (6), (12), (16) and (21)."""
        return add_product(x, self.P, -x.sum(-1, keepdim=True))

    def dropped(self, x: Tensor) -> Tensor:
        """R∘x (3); x itself without dropout."""
        return x if self.R is None else x * self.R


class Sweep:
    """Walks the row blocks of one call; operands are read in the dtype that the call computes in.

    Args:
        ops: canonical operands.
        spec: the call.
        lse: (*L, N) of the forward, from which :meth:`blocks` recomputes P.
        others: tangents and cotangents, whose leading dimensions belong to the batch too.
    """

    def __init__(
        self, ops: Operands, spec: AttentionSpec, lse: Tensor | None = None, others: tuple[Tensor | None, ...] = ()
    ) -> None:
        self.spec = spec
        self.out_dtype = ops.q.dtype
        self.dtype = compute_dtype(ops.q.dtype)
        self.q, self.k, self.v = self.read(ops.q), self.read(ops.k), self.read(ops.v)
        self.mask, self.seed = ops.mask, ops.seed
        self.batch = batch_shape(*ops, *others)
        self.N, self.M = self.q.shape[-2], self.k.shape[-2]
        self.lse = None if lse is None else lse.masked_fill(lse == NEG_INF, 0.0)[..., None]

    def read(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def zeros(self, *tail: int, like: Tensor | None = None) -> Tensor:
        """Zeros (*L, *tail). ``like``: a tensor that is computed from every cotangent and tangent of the call.

        ``is_grads_batched`` maps cotangents by a mechanism of its own, in which what is accumulated into must descend
        from a mapped tensor.
        """
        return (self.q if like is None else like).new_zeros(*self.batch, *tail, dtype=self.dtype)

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """(rows, columns) of each block."""
        budget = TILE_ELEMENTS.get(self.q.device.type, TILE_ELEMENTS_DEFAULT)
        step = max(budget // max(self.batch.numel() * self.M, 1), MIN_ROWS)
        for start in range(0, self.N, step):
            stop = min(start + step, self.N)
            yield slice(start, stop), slice(0, min(stop, self.M) if self.spec.is_causal else self.M)

    def scores(self, rows: slice, cols: slice) -> Tensor:
        """S (1) of a block."""
        S = matmul(cut(self.q, rows), cut(self.k, cols).mT, alpha=self.spec.scale)
        if self.mask is not None:
            mask = mask_block(self.mask, rows, cols)
            S = S.masked_fill(~mask, NEG_INF) if mask.dtype == torch.bool else S + mask.to(S.dtype)
        if self.spec.is_causal:
            row = torch.arange(rows.start, rows.stop, device=S.device)[:, None]
            S.masked_fill_(torch.arange(cols.stop, device=S.device) > row, NEG_INF)
        return S

    def keep(self, rows: slice, cols: slice) -> Tensor | None:
        """R (3) of a block."""
        if self.seed is None:
            return None
        keep = keep_mask(self.seed, self.spec, range(rows.start, rows.stop), cols.stop)
        return keep.to(self.dtype).mul_(keep_scale(self.spec.dropout_p))

    def blocks(self) -> Iterator[Block]:
        """P = exp(S − lse) of each block, the same to the last bit at every order.

        Where all scores of a row are large numbers (a mask of -1e9, the dtype's lowest), so is lse, beside which the
        logarithm of how many keys there are is lost. So each row of P is divided by its sum.
        """
        assert self.lse is not None
        for rows, cols in self.slices():
            P = sub(self.scores(rows, cols), cut(self.lse, rows)).exp_()
            total = P.sum(-1, keepdim=True)
            P = P.div_(total.masked_fill_(total == 0, 1.0))
            yield Block(rows, cols, P, self.keep(rows, cols))

    def carrier(self, t: Tangents, *others: Tensor | None) -> Tensor:
        """A zero that is computed from every tangent, and from others (see :meth:`zeros`)."""
        return reduce(torch.add, [x.new_zeros(()) for x in (*t, *others) if x is not None], self.q.new_zeros(()))

    def score_tangent(self, t: Tangents, b: Block) -> Tensor | None:
        """tS (10) of a block; None when the direction does not move the scores."""
        tS, scale = None, self.spec.scale
        if t.q is not None:
            tS = matmul(self.read(cut(t.q, b.rows)), cut(self.k, b.cols).mT, alpha=scale)
        if t.k is not None:
            tS = matmul(cut(self.q, b.rows), self.read(cut(t.k, b.cols)).mT, alpha=scale, into=tS)
        if t.mask is not None:
            tZ = self.read(mask_block(t.mask, b.rows, b.cols))
            tS = tZ.expand(torch.broadcast_shapes(tZ.shape, b.P.shape)).clone() if tS is None else add(tS, tZ)
        return tS

    def cross_tangent(self, t1: Tangents, t2: Tangents, b: Block) -> Tensor | None:
        """c·tQ₁tK₂ᵀ of a block, the term of (19) in which two directions meet."""
        if t1.q is None or t2.k is None:
            return None
        return matmul(self.read(cut(t1.q, b.rows)), self.read(cut(t2.k, b.cols)).mT, alpha=self.spec.scale)


class Cotangents:
    """Accumulates dq, dk, dv and dmask over row blocks, each reduced to its wanted shape (None: not wanted)."""

    def __init__(self, sweep: Sweep, shapes: Shapes, like: Tensor) -> None:
        self.sweep = sweep
        make = partial(like.new_zeros, dtype=sweep.dtype)
        self.q, self.k, self.v, self.mask = (None if shape is None else make(shape) for shape in shapes)

    @property
    def wants_scores(self) -> bool:
        """Whether anything that dS leads to is wanted."""
        return not (self.q is None and self.k is None and self.mask is None)

    def add_v(self, b: Block, weight: Tensor, do: Tensor) -> None:
        """dV += (R∘weight)ᵀ dO."""
        if self.v is not None:
            _add_product_to(cut(self.v, b.cols), b.dropped(weight).mT, do)

    def add_qk(self, b: Block, dS: Tensor, q: Tensor | None, k: Tensor | None) -> None:
        """dQ += c dS K and dK += c dSᵀ Q; q and k may be tangents."""
        if self.q is not None and k is not None:
            _add_product_to(cut(self.q, b.rows), dS, self.sweep.read(cut(k, b.cols)), self.sweep.spec.scale)
        if self.k is not None and q is not None:
            _add_product_to(cut(self.k, b.cols), dS.mT, self.sweep.read(cut(q, b.rows)), self.sweep.spec.scale)

    def add_mask(self, b: Block, dS: Tensor) -> None:
        """dZ += dS."""
        if self.mask is not None:
            target = mask_block(self.mask, b.rows, b.cols)
            target += sum_to(dS.expand(*self.sweep.batch, *dS.shape[-2:]), target.shape)

    def results(self) -> tuple[Tensor | None, ...]:
        """(dq, dk, dv, dmask) in the dtype of the operands."""
        dtype = self.sweep.out_dtype
        dq, dk, dv = (None if x is None else x.to(dtype) for x in (self.q, self.k, self.v))
        mask = self.sweep.mask
        return dq, dk, dv, None if self.mask is None or mask is None else self.mask.to(mask.dtype)


def _add_product_to(target: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """target += alpha a @ b, summed to the shape of target."""
    if a.shape[:-2] == b.shape[:-2] == target.shape[:-2]:
        matmul(a, b, alpha=alpha, into=target)
    else:
        target += sum_to(matmul(a, b, alpha=alpha), target.shape)
