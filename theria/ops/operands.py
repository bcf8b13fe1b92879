"""The canonical form in which every rule receives a call.

All operands have one rank. Their leading (batch) dimensions broadcast against each other; grouped-query attention,
an operand that ``vmap`` leaves unbatched and PyTorch's own broadcasting are all that one mechanism:

===========  ==============  ==========================================================================
``q``        (*L, N, D)      each ``L`` may hold ones: ``broadcast_shapes`` of all operands is the batch
``k``        (*L, M, D)
``v``        (*L, M, E)
``mask``     (*L, N|1, M|1)  bool (True attends), or added to the scores; or None
``seed``     (*L, 1, 1)      int64, the key of the dropout mask; None without dropout
``o``        (*L, N, E)      output, leading dimensions fully broadcast
``lse``      (*L, N)         log-sum-exp of each row of scores
===========  ==============  ==========================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = tuple[torch.Size | None, torch.Size | None, torch.Size | None, torch.Size | None]


@dataclass(frozen=True)
class AttentionSpec:
    """What is static in a call.

    Attributes:
        backend: name of the rules that compute it.
        scale: factor of QKᵀ.
        is_causal: row n sees the keys m ≤ n (top-left alignment, as in PyTorch).
        dropout_p: probability that an entry of P is dropped.
        heads: logical leading shape. The dropout mask depends on the position in it and not on dimensions that
            ``vmap`` puts in front, so that ``vmap(f)(x)[i]`` equals ``f(x[i])``.
    """

    backend: str
    scale: float
    is_causal: bool = False
    dropout_p: float = 0.0
    heads: tuple[int, ...] = ()


class Operands(NamedTuple):
    """Primal operands of a call in canonical form (see the module)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    seed: Tensor | None

    @property
    def additive(self) -> bool:
        """Whether the mask is added to the scores."""
        return self.mask is not None and self.mask.is_floating_point()


class Tangents(NamedTuple):
    """One tangent per differentiable operand; None stands for zero and costs nothing."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """How to bring tensors of the caller's shapes into canonical form and results back."""

    rank: int
    groups: int  # query heads per key head; 0 without grouped-query attention

    def enter(self, x: Tensor | None, *, grouped: bool) -> Tensor | None:
        """Canonical view of an operand, a tangent or a cotangent. ``grouped``: it has one entry per query head."""
        if x is None:
            return None
        if x.ndim < 2:  # a mask (M,) or ()
            x = x.expand(1, *(x.shape or (1,)))
        if self.groups:
            x = x if x.ndim > 2 else x.expand(1, *x.shape[-2:])
            split = grouped and x.shape[-3] != 1
            x = x.unflatten(-3, (x.shape[-3] // self.groups, self.groups)) if split else x.unsqueeze(-3)
        return x if x.ndim == self.rank else x[(None,) * (self.rank - x.ndim)]

    def leave(self, x: Tensor) -> Tensor:
        """The caller's view of an output (*L, N, E)."""
        return x.flatten(-4, -3) if self.groups else x

    def leave_row(self, x: Tensor) -> Tensor:
        """The caller's view of a row statistic (*L, N)."""
        return x.flatten(-3, -2) if self.groups else x

    def enter_row(self, x: Tensor | None) -> Tensor | None:
        """Canonical view of a row statistic such as ``lse``."""
        if x is None:
            return None
        y = self.enter(x[..., None], grouped=True)
        assert y is not None
        return y[..., 0]


def canonical(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Layout, Operands]:
    """Views of checked inputs in canonical form (``seed`` is filled in by :func:`with_dropout`)."""
    rank = max(query.ndim, key.ndim, value.ndim, attn_mask.ndim if attn_mask is not None else 0)
    groups = 0
    if enable_gqa:
        heads, key_heads, value_heads = query.shape[-3], key.shape[-3], value.shape[-3]
        if key_heads != value_heads:  # as PyTorch: each is repeated on its own
            key = key.repeat_interleave(heads // key_heads, -3)
            value = value.repeat_interleave(heads // value_heads, -3)
        groups = max(query.shape[-3] // max(key.shape[-3], 1), 1)
        rank += 1
    layout = Layout(rank, groups)
    q = layout.enter(query, grouped=True)
    k, v = layout.enter(key, grouped=False), layout.enter(value, grouped=False)
    assert q is not None
    assert k is not None
    assert v is not None
    return layout, Operands(q, k, v, layout.enter(attn_mask, grouped=True), None)


def batch_shape(*tensors: Tensor | None) -> torch.Size:
    """Broadcast leading shape of canonical operands."""
    shapes = [x.shape[:-2] for x in tensors if x is not None]
    # they are almost always the same, and broadcast_shapes takes 10 µs to say so
    return shapes[0] if all(shape == shapes[0] for shape in shapes) else torch.broadcast_shapes(*shapes)


def with_dropout(ops: Operands, spec: AttentionSpec, seed: int | Tensor | None) -> tuple[Operands, AttentionSpec]:
    """Add the dropout key. Without ``seed``, one is drawn from torch's global generator (the only use of it)."""
    if seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64)
    if isinstance(seed, Tensor):
        seed = seed.to(ops.q.device)
    else:  # not as_tensor, which makes a constant of a traced int
        seed = torch.full((), seed, dtype=torch.int64, device=ops.q.device)
    heads = tuple(batch_shape(ops.q, ops.k, ops.v, ops.mask))
    return ops._replace(seed=seed.reshape((1,) * ops.q.ndim)), replace(spec, heads=heads)


def default_scale(width: int) -> float:
    """1/√D; for D = 0 the scores are empty sums and any finite factor will do."""
    return 1.0 / math.sqrt(width) if width else 1.0


def sum_to(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Adjoint of broadcasting: sum ``x`` over the dimensions in which an operand of ``shape`` was broadcast."""
    return x if x.shape == torch.Size(shape) else _expand_to_at_least(x, shape).sum_to_size(shape)


def _expand_to_at_least(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """A gradient may be smaller than its operand where every operand it was computed from has a one."""
    return x.expand(torch.broadcast_shapes(x.shape, shape))
