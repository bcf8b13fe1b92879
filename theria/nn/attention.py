"""Multi-head attention on the operator of `theria.ops`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theria.nn.plain import is_plain
from theria.ops import sdpa


class MultiheadAttention(nn.Module):
    """Multi-head attention of `x` to `context` (to itself when none is given).

    Args:
        d_model: width of the tokens; a multiple of `n_heads`.
        n_heads: number of heads.
        backend: which implementation of the operator runs, see `theria.ops.sdpa`.
        is_causal: row i of `x` sees rows 0 to i of the context.

    Raises:
        ValueError: when `n_heads` does not divide `d_model`.
    """

    def __init__(self, d_model: int, n_heads: int, *, backend: str = "auto", is_causal: bool = False) -> None:
        super().__init__()
        if d_model < 1 or n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"d_model={d_model}, n_heads={n_heads}: each head is d_model / n_heads wide, "
                f"so d_model has to be a positive multiple of n_heads"
            )
        self.d_model, self.n_heads = d_model, n_heads
        self.backend, self.is_causal = backend, is_causal
        self.query = nn.Linear(d_model, d_model)
        self.key = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, context: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x (..., N, d_model), context (..., M, d_model), mask broadcastable to (..., H, N, M) -> (..., N, d_model)."""
        layers = (self.query, self.key, self.value)
        if context is None and all(map(_is_linear, layers)):
            widths = [layer.weight.shape[0] for layer in layers]  # layers of others may be in their place
            q, k, v = map(self._heads, _side_by_side(layers, x).split(widths, -1))
        else:
            sources = (x, x, x) if context is None else (x, context, context)
            q, k, v = (self._heads(layer(source)) for layer, source in zip(layers, sources, strict=True))
        o = sdpa(q, k, v, attn_mask=attn_mask, is_causal=self.is_causal, backend=self.backend)
        return self.out(o.transpose(-3, -2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        """(..., N, H * D) -> (..., H, N, D)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-3, -2)

    def extra_repr(self) -> str:
        return f"{self.d_model}, {self.n_heads}, backend={self.backend!r}, is_causal={self.is_causal}"


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer is its weight and its bias and nothing else."""
    return type(layer) is nn.Linear and layer.bias is not None and is_plain(layer)


def _side_by_side(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    """What three layers make of the same tokens, side by side in the last dimension, by one product instead of three.

    Each product of an inner loop has some ten relatives in its second derivative, and for the weights of one task a
    third of their width leaves most of a GPU idle. The operator reads the three parts in place.
    """
    return F.linear(x, torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))
