"""From images to tokens. Leading dimensions are free: (C, H, W), (B, C, H, W), (T, B, C, H, W)."""

import torch
from torch import Tensor, nn

from theria.nn.residual import ResidualStem


class PatchEmbedding(nn.Module):
    """Square patches, a linear map of each, learned positions (Dosovitskiy et al. 2021, arXiv 2010.11929).

    The patches are cut by a reshape and mapped by a matrix product: under `vmap` over parameters that stays one
    batched product, where a convolution would become a grouped one.
    """

    def __init__(self, d_model: int, *, image_size: int = 28, channels: int = 1, patch: int = 7) -> None:
        super().__init__()
        if patch < 1 or image_size % patch:
            raise ValueError(f"patch={patch} does not divide image_size={image_size}: give a patch that does")
        self.patch = patch
        self.n_tokens = (image_size // patch) ** 2
        self.projection = nn.Linear(channels * patch * patch, d_model)
        self.position = nn.Parameter(0.02 * torch.randn(self.n_tokens, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., n_tokens, d_model)."""
        p = self.patch
        x = x.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))  # (..., C, H/p, p, W/p, p)
        x = x.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)  # (..., H/p * W/p, C * p * p)
        return self.projection(x) + self.position


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2, one token for each of their outputs (Xiao et al. 2021, arXiv 2106.14881)."""

    def __init__(self, d_model: int, *, image_size: int = 28, channels: int = 1) -> None:
        super().__init__()
        self.n_tokens = (-(-image_size // 4)) ** 2
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, d_model // 2, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(d_model // 2, d_model, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(0.02 * torch.randn(self.n_tokens, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., n_tokens, d_model)."""
        y = self.convolutions(x.reshape(-1, *x.shape[-3:])).flatten(-2).mT
        return y.reshape(*x.shape[:-3], *y.shape[1:]) + self.position


Stem = PatchEmbedding | ConvStem | ResidualStem


def make_stem(stem: str, d_model: int, *, image_size: int, channels: int, patch: int) -> Stem:
    """The stem of that name: "patch", "conv" or "residual"."""
    if stem == "patch":
        return PatchEmbedding(d_model, image_size=image_size, channels=channels, patch=patch)
    if stem == "conv":
        return ConvStem(d_model, image_size=image_size, channels=channels)
    if stem == "residual":
        return ResidualStem(d_model, image_size=image_size, channels=channels)
    raise ValueError(f"stem={stem!r} is not known: give 'patch', 'conv' or 'residual'")
