"""Tasks and networks of a few numbers, in float64, for tests that compare with dense or hand-made values."""

import torch
from torch import nn

from theria.data import Episode
from theria.nn import TransformerClassifier

EXACT = 1e-10  # float64, a few hundred operations
F64 = torch.float64


def square(prediction, target):
    return (prediction - target).square().mean()


def regression(tasks=3, seed=0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tasks, 5, 2), (tasks, 5, 1), (tasks, 4, 2), (tasks, 4, 1)]
    return Episode(*(torch.randn(*shape, generator=generator, dtype=F64) for shape in shapes))


def classification(tasks=2, ways=3, shots=1, dtype=F64, seed=0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(tasks, ways * n, 1, 28, 28, generator=generator, dtype=dtype) for n in (shots, 2)]
    labels = [torch.arange(ways).repeat(n).expand(tasks, -1).contiguous() for n in (shots, 2)]
    return Episode(images[0], labels[0], images[1], labels[1])


def mlp(width_in=2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(width_in, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def transformer(pool="mean") -> TransformerClassifier:
    torch.manual_seed(2)
    return TransformerClassifier(3, d_model=8, n_heads=2, n_layers=2, patch=14, pool=pool, head_std=0.5).double()
