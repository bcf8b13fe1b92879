"""Normalisation in plain operations.

NOTE [PyTorch's fused norms are wrong one order up]. `F.layer_norm` and `F.batch_norm` differentiate with the saved mean
and reciprocal deviation, which carry no derivative once they come out of forward mode or `vmap`: `grad(jvp)`,
`jvp(jvp)` and the gradient of `vmap(grad)` through them are wrong without an error (PyTorch 2.13: 40 %, 114 % and 39 %
on random input, pytorch/pytorch#196700); `jvp(grad)` and `grad(grad)` are right. The composition below is right in
every mode and order, and as fast for small tokens.
"""

import torch
from torch import Tensor, nn

from theria.curvature.norms import standardise


class LayerNorm(nn.Module):
    """`nn.LayerNorm` over the last dimension, with the same parameters: (..., d) -> (..., d)."""

    def __init__(self, d: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return (standardise(x, (-1,), self.eps) * self.weight + self.bias).to(x.dtype)


class BatchNorm2d(nn.Module):
    """`nn.BatchNorm2d(track_running_stats=False)`, same parameters: (B, C, H, W) -> (B, C, H, W).

    The statistics are always those of the batch, in training and in evaluation. There is no buffer to mutate, so it
    runs under `vmap` and `functional_call`.
    """

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = standardise(x, (-4, -2, -1), self.eps)
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)
