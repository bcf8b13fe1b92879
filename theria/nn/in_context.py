"""Transformers that read a support set instead of being adapted to it: learning in the forward pass."""

import torch
from torch import Tensor, nn

from theria.nn.embedding import make_stem
from theria.nn.norm import LayerNorm
from theria.nn.transformer import TransformerBlock


class ContextTransformer(nn.Module):
    """Context tokens attend to each other, query tokens to the context only; one attention call in each block.

    Queries never see one another, so each prediction is that of its query alone; without a mask nothing depends on
    the order of the context.
    """

    def __init__(self, d_model: int, n_heads: int, n_layers: int, *, d_ff: int | None = None, backend: str = "auto"):
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, n_heads, d_ff=d_ff, backend=backend) for _ in range(n_layers)
        )
        self.norm = LayerNorm(d_model)

    def forward(self, context: Tensor, query: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """context (..., M, d), query (..., N, d), mask over (M + N, M) or None -> the query tokens (..., N, d)."""
        return self.norm(self._tokens(context, query, attn_mask)[..., context.shape[-2] :, :])

    def both(self, context: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """context (..., M, d), query (..., N, d) -> the tokens of both, as they came in."""
        tokens = self.norm(self._tokens(context, query, None))
        return tokens[..., : context.shape[-2], :], tokens[..., context.shape[-2] :, :]

    def _tokens(self, context: Tensor, query: Tensor, attn_mask: Tensor | None) -> Tensor:
        """(..., M + N, d): the context's tokens first."""
        m = context.shape[-2]
        tokens = torch.cat([context, query], -2)
        for block in self.blocks:
            tokens = block(tokens, tokens[..., :m, :], attn_mask)
        return tokens


class InContextClassifier(nn.Module):
    """Few-shot classification in one forward pass: support (image, label) tokens, query (image, ?) tokens.

    Args:
        ways: number of classes of a task; labels are integers in [0, ways).
        stem: "conv", "patch" or "residual": how an image becomes tokens, which are averaged to the one token of that
            image.
        readout: "head", a linear map of a query's token, or "prototypes", its product with the mean token of each
            class's support. With the first, training has to find out how to look up labels before any gradient says
            which images are alike, and with many ways it stays at chance for long; the second compares from the start.

    The logits are invariant to the order of the support and equivariant to the order of the queries. The numbering of
    the classes is learned to be without meaning (a label is a learned vector, a linear head names it), and `ways` is
    fixed: `PrototypeTransformer` has both by construction.
    """

    def __init__(
        self,
        ways: int,
        *,
        image_size: int = 28,
        channels: int = 1,
        stem: str = "conv",
        patch: int = 7,
        d_model: int = 64,
        n_heads: int = 4,
        n_layers: int = 3,
        d_ff: int | None = None,
        readout: str = "head",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if readout not in ("head", "prototypes"):
            raise ValueError(f"readout={readout!r} is not known: give 'head' or 'prototypes'")
        self.ways = ways
        self.stem = make_stem(stem, d_model, image_size=image_size, channels=channels, patch=patch)
        self.image = nn.Sequential(nn.Linear(d_model, d_model), nn.GELU(), nn.Linear(d_model, d_model))
        self.label = nn.Parameter(torch.randn(ways, d_model) / d_model**0.5)
        self.unknown = nn.Parameter(torch.randn(d_model) / d_model**0.5)
        self.transformer = ContextTransformer(d_model, n_heads, n_layers, d_ff=d_ff, backend=backend)
        self.head = nn.Linear(d_model, ways) if readout == "head" else None

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """support_x ([T,] S, C, H, W), support_y ([T,] S), query_x ([T,] Q, C, H, W) -> logits ([T,] Q, ways)."""
        # A comparison, not F.one_hot: that one looks at the values, which vmap cannot.
        one_hot = support_y.unsqueeze(-1) == torch.arange(self.ways, device=support_y.device)
        support = self._image(support_x) + one_hot.to(self.label.dtype) @ self.label
        query = self._image(query_x) + self.unknown
        if self.head is not None:
            return self.head(self.transformer(support, query))
        context, query = self.transformer.both(support, query)
        return query @ class_means(context, support_y, self.ways).mT / query.shape[-1] ** 0.5

    def _image(self, x: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., d_model)."""
        return self.image(nn.functional.gelu(self.stem(x)).mean(-2))


def class_means(h: Tensor, y: Tensor, ways: int) -> Tensor:
    """h (..., S, d), labels (..., S) -> the mean of each class (..., ways, d), NaN for a class without a sample."""
    # A comparison, not F.one_hot: that one looks at the values, which vmap cannot.
    member = (y.unsqueeze(-1) == torch.arange(ways, device=y.device)).to(h.dtype)
    return (member / member.sum(-2, keepdim=True)).mT @ h


class InContextRegressor(nn.Module):
    """Regression in one forward pass (Garg et al. 2022, arXiv 2208.01066, with one token for each (x, y) pair).

    Args:
        x_dim: width of the inputs.
        y_dim: width of the targets.
        causal: False reads the support as a set; True lets pair i see pairs 0 to i only, so that `prefixes` can
            train on every length of context in one pass.
    """

    def __init__(
        self,
        x_dim: int,
        *,
        y_dim: int = 1,
        d_model: int = 64,
        n_heads: int = 4,
        n_layers: int = 3,
        d_ff: int | None = None,
        causal: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.causal, self.y_dim = causal, y_dim
        self.pair = nn.Linear(x_dim + y_dim, d_model)
        self.question = nn.Linear(x_dim, d_model)
        self.start = nn.Parameter(0.02 * torch.randn(d_model))  # what a query sees when there is no pair yet
        self.transformer = ContextTransformer(d_model, n_heads, n_layers, d_ff=d_ff, backend=backend)
        self.head = nn.Linear(d_model, y_dim)

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """support_x ([T,] S, x_dim), support_y ([T,] S[, y_dim]), query_x ([T,] Q, x_dim) -> ([T,] Q[, y_dim]).

        The predictions have the layout of the targets: without a last dimension when `support_y` has none.
        """
        mask = None
        if self.causal:
            s, q = support_x.shape[-2], query_x.shape[-2]
            everything = torch.ones(q, s + 1, dtype=torch.bool, device=support_x.device)
            mask = torch.cat([everything.new_ones(s + 1, s + 1).tril(), everything])
        return self._predict(support_x, support_y, query_x, mask)

    def prefixes(self, x: Tensor, y: Tensor) -> Tensor:
        """Prediction of each y_i from x_i and the pairs before it: ([T,] S, x_dim), ([T,] S[, y_dim]) -> as y.

        Raises:
            ValueError: when the module was not built with `causal=True`.
        """
        if not self.causal:
            raise ValueError("prefixes() needs a causal context: build InContextRegressor(..., causal=True)")
        n = x.shape[-2]
        context = torch.ones(n + 1, n + 1, dtype=torch.bool, device=x.device).tril()
        # Key 0 is the start token and key j the pair j - 1: question i may see keys 0 to i.
        return self._predict(x, y, x, torch.cat([context, context[:-1]]))

    def _predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, mask: Tensor | None) -> Tensor:
        flat = support_y.ndim == support_x.ndim - 1
        if flat and self.y_dim != 1:
            raise ValueError(f"support_y has shape {tuple(support_y.shape)}: give a last dimension of {self.y_dim}")
        pairs = self.pair(torch.cat([support_x, support_y.unsqueeze(-1) if flat else support_y], -1))
        start = self.start.expand(*pairs.shape[:-2], 1, -1)
        y = self.head(self.transformer(torch.cat([start, pairs], -2), self.question(query_x), mask))
        return y.squeeze(-1) if flat else y
