"""An image transformer small enough to be adapted in a few gradient steps."""

import torch
from torch import Tensor, nn

from theria.nn.embedding import make_stem
from theria.nn.transformer import Transformer


class TransformerClassifier(nn.Module):
    """Stem, pre-norm transformer, pooled token, linear classifier (the attribute `head`).

    Args:
        n_classes: number of outputs.
        stem: "patch" (square patches of side `patch`), "conv" (two strided convolutions) or "residual" (three
            residual blocks).
        pool: "mean" of the tokens, or "cls", a learned token that reads the others.
        head_std: spread of the classifier's initial weights. Small, so that an episode starts from almost equal
            probabilities: classes are numbered at random in each task, a confident start is wrong in most of them.
        backend: which implementation of attention runs, see `theria.ops.sdpa`.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        image_size: int = 28,
        channels: int = 1,
        stem: str = "patch",
        patch: int = 7,
        d_model: int = 64,
        n_heads: int = 4,
        n_layers: int = 2,
        d_ff: int | None = None,
        pool: str = "mean",
        head_std: float = 0.01,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if pool not in ("mean", "cls"):
            raise ValueError(f"pool={pool!r} is not known: give 'mean' or 'cls'")
        self.stem = make_stem(stem, d_model, image_size=image_size, channels=channels, patch=patch)
        self.cls = nn.Parameter(0.02 * torch.randn(d_model)) if pool == "cls" else None
        self.transformer = Transformer(d_model, n_heads, n_layers, d_ff=d_ff, backend=backend)
        self.head = nn.Linear(d_model, n_classes)
        nn.init.normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., n_classes)."""
        return self.after_stem(self.stem(x))

    def after_stem(self, tokens: Tensor) -> Tensor:
        """The tokens of the stem (..., N, d_model) -> (..., n_classes); see `theria.meta.functional.stages`."""
        if self.cls is None:
            return self.head(self.transformer(tokens).mean(-2))
        cls = self.cls.expand(*tokens.shape[:-2], 1, -1)
        return self.head(self.transformer(torch.cat([cls, tokens], -2))[..., 0, :])
