"""Classifiers of 8x8 digits that differ in their core alone, and the data."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.bilevel_data import load
from experiments.deq_config import NetworkConfig
from theria.meta.implicit import Anderson
from theria.meta.solvers import GMRES
from theria.nn import Transformer
from theria.nn.equilibrium import DeepEquilibrium, EquilibriumBlock

ROWS, PIXELS, CLASSES = 8, 8, 10


class Classifier(nn.Module):
    """Images (B, 64) -> scores (B, 10): the 8 rows of pixels as tokens, a core on them, the mean, a linear map.

    Args:
        core: (B, 8, D) -> (B, 8, D).
    """

    def __init__(self, core: nn.Module, d_model: int) -> None:
        super().__init__()
        self.pixels = nn.Linear(PIXELS, d_model)
        self.positions = nn.Parameter(torch.randn(ROWS, d_model))
        self.core = core
        self.head = nn.Linear(d_model, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.core(self.embed(x)))

    def embed(self, x: Tensor) -> Tensor:
        """(B, 64) -> (B, 8, D)."""
        return self.pixels(x.unflatten(1, (ROWS, PIXELS))) + self.positions

    def read(self, z: Tensor) -> Tensor:
        """(B, 8, D) -> (B, 10)."""
        return self.head(z.mean(1))


def build(config: NetworkConfig, seed: int) -> dict[str, Classifier]:
    """By name: the equilibrium of one block, and transformers of so many blocks."""
    torch.manual_seed(seed)
    networks = {"equilibrium": Classifier(_equilibrium(config), config.d_model)}
    for layers in config.layers:
        torch.manual_seed(seed)
        core = Transformer(config.d_model, config.n_heads, layers, d_ff=config.d_ff)
        networks[f"transformer_{layers}"] = Classifier(core, config.d_model)
    return networks


def _equilibrium(config: NetworkConfig) -> DeepEquilibrium:
    block = EquilibriumBlock(config.d_model, config.n_heads, d_ff=config.d_ff)
    derivative = GMRES(rtol=config.tol, max_iterations=config.max_iter)
    return DeepEquilibrium(
        block,
        solver=Anderson(check_every=1),
        linear_solver=derivative,
        tol=config.tol,
        max_iter=config.max_iter,
    )


def expansion(block: nn.Module, x: Tensor, z: Tensor, noise: Tensor) -> Tensor:
    """mean |J'e|^2 for noise e of variance 1, an unbiased estimate of |J|_F^2 / n with J = d block(x, z) / dz, ().

    Small, it keeps the block a contraction in training (Bai, Koltun and Kolter 2021, arXiv 2106.14342, section 4.1).
    Its own gradient is a second derivative of attention.

    Args:
        x: the injected tokens (B, N, D).
        z: where, (B, N, D); a constant.
        noise: e, (B, N, D).
    """
    z = z.detach().requires_grad_()
    (product,) = torch.autograd.grad(block(x, z), z, noise, create_graph=True)
    return product.square().mean()


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, pixels in [-2, 2], split by a seed. x (n, 64) float32, y (n,)."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def draw(samples: int, seed: int) -> Digits:
    """`samples` of them to train on, the others to test on."""
    x, y = load("digits")
    x = (x / 4 - 2).float()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:samples], order[samples:]
    return Digits(x[train], y[train], x[test], y[test])
