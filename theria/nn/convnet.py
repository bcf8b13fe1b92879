"""The four-layer convolutional network of few-shot learning."""

from torch import Tensor, nn

from theria.nn.norm import BatchNorm2d


class ConvNet4(nn.Module):
    """Four blocks of 3x3 convolution, BatchNorm, ReLU, halving (Finn et al. 2017, arXiv 1703.03400, section 5.2).

    Args:
        n_classes: outputs of the classifier, which is the attribute `head`.
        downsample: "stride" halves by strided convolutions and averages the last map over positions, as the paper
            does for Omniglot (`width` features); "max_pool" pools and flattens, as it does for MiniImagenet.

    As in the paper, BatchNorm always normalises by the batch it is given and keeps no running statistics.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        image_size: int = 28,
        channels: int = 1,
        width: int = 64,
        downsample: str = "stride",
    ) -> None:
        super().__init__()
        if downsample not in ("stride", "max_pool"):
            raise ValueError(f"downsample={downsample!r} is not known: give 'stride' or 'max_pool'")
        if downsample == "max_pool" and image_size < 16:
            raise ValueError(f"image_size={image_size} vanishes in four poolings: give at least 16")
        self.downsample = downsample
        inputs = [channels, width, width, width]
        self.body = nn.Sequential(*(self._block(n, width) for n in inputs))
        features = width if downsample == "stride" else width * (image_size // 16) ** 2
        self.head = nn.Linear(features, n_classes)

    def _block(self, n: int, width: int) -> nn.Sequential:
        stride = 2 if self.downsample == "stride" else 1
        layers: list[nn.Module] = [
            nn.Conv2d(n, width, 3, stride=stride, padding=1),
            BatchNorm2d(width),
            nn.ReLU(),
        ]
        return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if stride == 1 else []))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, n_classes)."""
        x = self.body(x)
        return self.head(x.mean((-2, -1)) if self.downsample == "stride" else x.flatten(1))
