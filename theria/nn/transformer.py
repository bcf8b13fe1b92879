"""Pre-norm transformer (Xiong et al. 2020, arXiv 2002.04745)."""

from torch import Tensor, nn

from theria.nn.attention import MultiheadAttention
from theria.nn.norm import LayerNorm


class TransformerBlock(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x).

    With a `context` the keys and values come from it, normalised by the same layer as the queries.
    """

    def __init__(
        self, d_model: int, n_heads: int, *, d_ff: int | None = None, backend: str = "auto", is_causal: bool = False
    ) -> None:
        super().__init__()
        d_ff = 4 * d_model if d_ff is None else d_ff
        self.norm1 = LayerNorm(d_model)
        self.attention = MultiheadAttention(d_model, n_heads, backend=backend, is_causal=is_causal)
        self.norm2 = LayerNorm(d_model)
        self.feed_forward = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))

    def forward(self, x: Tensor, context: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x (..., N, d_model), context (..., M, d_model) or None -> (..., N, d_model)."""
        context = None if context is None else self.norm1(context)
        x = x + self.attention(self.norm1(x), context, attn_mask)
        return x + self.feed_forward(self.norm2(x))


class Transformer(nn.Module):
    """`n_layers` pre-norm blocks and a final norm: an encoder, or a decoder-only stack with `is_causal=True`."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_layers: int,
        *,
        d_ff: int | None = None,
        backend: str = "auto",
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, d_ff=d_ff, backend=backend, is_causal=is_causal) for _ in range(n_layers)
        )
        self.norm = LayerNorm(d_model)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """(..., N, d_model) -> (..., N, d_model)."""
        for block in self.blocks:
            x = block(x, attn_mask=attn_mask)
        return self.norm(x)
