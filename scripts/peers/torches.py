"""What the peers on PyTorch share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from given import Given
from torch import Tensor, nn

torch.set_num_threads(1)


class Inner(nn.Module):
    """z as a parameter; the forward is the inner loss at (z, x)."""

    def __init__(self, z: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.z, self.loss = nn.Parameter(z.clone()), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.z, x)


def losses(given: Given) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    return given.losses(torch, torch.from_numpy)


def leaf(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array)).requires_grad_()


def start(given: Given, x: Tensor) -> Tensor:
    """z_0, differentiable in x where the problem says so."""
    inner0 = torch.from_numpy(given.inner0)
    return x.expand(inner0.shape) if given.starts_at_outer else inner0


def gradient(value: Tensor, x: Tensor) -> np.ndarray:
    return torch.autograd.grad(value, x)[0].numpy()
