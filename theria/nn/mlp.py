"""A plain multi-layer perceptron."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers of the given sizes with an activation between them, none after the last.

    `MLP([1, 40, 40, 1])` is the regressor of the MAML paper. The last layer is `head`, the others are `body`.
    """

    def __init__(self, sizes: Sequence[int], *, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes={list(sizes)}: give at least the input and the output size, such as [1, 40, 1]")
        layers = [(nn.Linear(n, m), activation()) for n, m in pairwise(sizes[:-1])]
        self.body = nn.Sequential(*(module for pair in layers for module in pair))
        self.head = nn.Linear(sizes[-2], sizes[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(..., sizes[0]) -> (..., sizes[-1])."""
        return self.head(self.body(x))
