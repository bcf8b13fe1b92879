"""A residual convolutional network for small images: the embedding of metric learners, and a stem of transformers."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theria.curvature.precision import at_least_float32
from theria.nn.norm import BatchNorm2d


class GroupNorm(nn.Module):
    """`nn.GroupNorm`, same parameters: each image's groups of channels standardised, one scale and shift a channel
    (Wu and He 2018, arXiv 1803.08494). (B, C, H, W) -> (B, C, H, W).

    At most 8 groups, of at least 4 channels where there are so many: a group of one channel on a 1x1 map would be
    constant. In plain operations, because forward over reverse that of `F.group_norm` raises where no graph is kept
    (PyTorch 2.13), and in few of them: one for the statistics, two for what an image's channels are multiplied by and
    shifted.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = math.gcd(8, max(channels // 4, 1), channels), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = at_least_float32(x)
        variance, mean = torch.var_mean(h.unflatten(-3, (self.groups, -1)).flatten(-3), -1, correction=0)  # (B, G)
        # (x - mean) / deviation * weight + bias = x * scale + shift, scale and shift (B, C)
        scale = (variance + self.eps).rsqrt().unsqueeze(-1) * self.weight.unflatten(0, (self.groups, -1))
        shift = self.bias - (mean.unsqueeze(-1) * scale).flatten(-2)
        return (h * scale.flatten(-2)[..., None, None] + shift[..., None, None]).to(x.dtype)


_NORMS: dict[str, Callable[[int], nn.Module]] = {"group": GroupNorm, "batch": BatchNorm2d}


class ResidualBlock(nn.Module):
    """act(norm(conv(act(norm(conv x)))) + conv1x1 x), half as high and wide: (B, n, H, W) -> (B, m, H/2, W/2).

    Odd sides are rounded up. GELU and not ReLU, whose second derivative is zero wherever it exists.
    """

    def __init__(self, n: int, m: int, *, norm: str, downsample: str) -> None:
        super().__init__()
        stride = 2 if downsample == "stride" else 1
        self.pooled = stride == 1
        self.conv1 = nn.Conv2d(n, m, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _NORMS[norm](m)
        self.conv2 = nn.Conv2d(m, m, 3, padding=1, bias=False)
        self.norm2 = _NORMS[norm](m)
        self.shortcut = nn.Conv2d(n, m, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))
        y = F.gelu(y + self.shortcut(x))
        return F.max_pool2d(y, 2, ceil_mode=True) if self.pooled else y


class ResidualNet(nn.Module):
    """Residual blocks (He et al. 2016, arXiv 1512.03385) of the given widths, the mean over positions, a linear head.

    Normalisation is by groups of channels, because an episode is no batch of independent images. With batch
    statistics a prediction would depend on the other queries (which are balanced over the classes, so that this helps
    and is not one-shot learning of a single drawing), support and query would be embedded by different functions,
    and a task of 5 images would be normalised by 5. Running averages would mix tasks, and under `vmap` there is
    nowhere to keep them. `norm="batch"` is there for comparisons with networks that do so.

    Args:
        n_classes: outputs of the classifier, the attribute `head`; None: no classifier, the output is the embedding.
        widths: channels of each block; the last is the width of the embedding. 3.5 M parameters by default.
        norm: "group" or "batch".
        downsample: "max_pool" halves after the convolutions, as the ResNet-12 of the few-shot literature does, so that
            the first ones see strokes at their full resolution; "stride" by the first convolution of each block, with
            a quarter of the operations.

    Raises:
        ValueError: an unknown `norm` or `downsample`, or widths that are not positive.
    """

    def __init__(
        self,
        n_classes: int | None = None,
        *,
        channels: int = 1,
        widths: Sequence[int] = (64, 128, 256, 384),
        norm: str = "group",
        downsample: str = "max_pool",
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"norm={norm!r} is not known: give 'group' or 'batch'")
        if downsample not in ("stride", "max_pool"):
            raise ValueError(f"downsample={downsample!r} is not known: give 'stride' or 'max_pool'")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths={list(widths)}: give the channels of each block, at least 1, such as [64, 128]")
        self.width = widths[-1]
        inputs = [channels, *widths[:-1]]
        self.body = nn.Sequential(
            *(ResidualBlock(n, m, norm=norm, downsample=downsample) for n, m in zip(inputs, widths, strict=True))
        )
        self.head = nn.Identity() if n_classes is None else nn.Linear(self.width, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """(..., C, H, W) -> the last map (..., width, H / 2^L, W / 2^L), sides rounded up at each of L blocks."""
        y = self.body(x.reshape(-1, *x.shape[-3:]))
        return y.reshape(*x.shape[:-3], *y.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., width), or (..., n_classes) with a classifier."""
        return self.head(self.features(x).mean((-2, -1)))


def residual_net(n_classes: int | None = None, width: int = 64, **options: object) -> ResidualNet:
    """`ResidualNet` of four blocks, of 1, 2, 4 and 6 times `width` channels: 3.5 M parameters at 64, 0.2 M at 16."""
    return ResidualNet(n_classes, widths=[width * m for m in (1, 2, 4, 6)], **options)  # pyright: ignore


class ResidualStem(nn.Module):
    """One token for each cell of the last map of three residual blocks, with learned positions.

    16 tokens of an image of 28 pixels, 64 of one of 64. The map is d_model channels wide.
    """

    def __init__(self, d_model: int, *, image_size: int = 28, channels: int = 1) -> None:
        super().__init__()
        if d_model % 4:
            raise ValueError(f"d_model={d_model}: the residual stem is d_model / 4 wide at first, give a multiple of 4")
        self.n_tokens = (-(-image_size // 8)) ** 2
        self.convolutions = ResidualNet(channels=channels, widths=[d_model // 4, d_model // 2, d_model])
        self.position = nn.Parameter(0.02 * torch.randn(self.n_tokens, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C, H, W) -> (..., n_tokens, d_model)."""
        return self.convolutions.features(x).flatten(-2).mT + self.position
