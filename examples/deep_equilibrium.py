"""An implicit layer: a transformer block applied until nothing changes, and the derivative of where it ends.

    python examples/deep_equilibrium.py

First the derivative of the equilibrium is compared with backpropagation through 500 steps: the same numbers, a
fraction of the memory and of the time. Then the layer is trained: each sequence has one marked token, and its class is
that token, which the last position has to find by attention. The iterations say how deep the network made itself.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from theria.meta.implicit import Anderson
from theria.nn.equilibrium import DeepEquilibrium, EquilibriumBlock
from theria.testing.memory import PeakMemory

TOKENS, LENGTH, WIDTH = 8, 12, 32


def compare_with_unrolling(steps: int = 500) -> None:
    """One gradient both ways, float64."""
    torch.manual_seed(0)
    block = EquilibriumBlock(16, 4, d_ff=32).double()
    layer = DeepEquilibrium(block, tol=1e-12)
    x, weights = torch.randn(2, 2, 8, 16, dtype=torch.float64)

    def unrolled(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(steps):
            z = block(x, z)
        return z

    gradients = []
    layer(x).sum().backward()  # the first call of anything is slow
    block.zero_grad()
    for name, function in (("implicit", layer), (f"{steps} unrolled steps", unrolled)):
        started = time.perf_counter()
        (function(x) * weights).sum().backward()
        seconds = time.perf_counter() - started
        gradients.append(torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None]))
        block.zero_grad()
        with PeakMemory() as memory:
            (function(x) * weights).sum().backward()
        block.zero_grad()
        print(f"{name:20s} {seconds:6.3f} s  {memory.peak / 2**20:7.2f} MiB")
    difference = (gradients[0] - gradients[1]).abs().max() / gradients[1].abs().max()
    print(f"largest difference of the gradients, relative to the largest entry: {difference.item():.1e}")


class Finder(nn.Module):
    """Tokens (B, N) and marks (B, N) of 0 or 1 -> scores (B, TOKENS), read off the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.marks = nn.Embedding(2, WIDTH)
        self.layer = DeepEquilibrium(
            EquilibriumBlock(WIDTH, 4, d_ff=64), solver=Anderson(check_every=1), tol=1e-4, max_iter=60
        )
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: Tensor, marks: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(tokens, marks))[:, -1])

    def embed(self, tokens: Tensor, marks: Tensor) -> Tensor:
        return self.tokens(tokens) + self.marks(marks)


def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, marks and the token that is marked, which is never the last."""
    tokens, at = torch.randint(TOKENS, (batch, LENGTH)), torch.randint(LENGTH - 1, (batch, 1))
    marks = torch.zeros_like(tokens).scatter_(1, at, 1)
    return tokens, marks, tokens.gather(1, at)[:, 0]


def train(steps: int) -> None:
    torch.manual_seed(0)
    model = Finder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        tokens, marks, labels = draw(64)
        loss = nn.functional.cross_entropy(model(tokens, marks), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(steps // 6, 1) == 0 or step == steps - 1:
            with torch.no_grad():
                tokens, marks, labels = draw(256)
                solution = model.layer.solve(model.embed(tokens, marks))
                right = (model.head(solution.value[:, -1]).argmax(1) == labels).float().mean()
            print(
                f"step {step:4d}  loss {loss.item():.4f}  new sequences {right.item():6.1%} right, "
                f"equilibrium after {solution.iterations.item()} iterations"
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="training steps")
    options = parser.parse_args(arguments)
    compare_with_unrolling()
    train(options.steps)


if __name__ == "__main__":
    main()
