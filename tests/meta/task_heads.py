"""What tests of learners with a classifier for each task share: an embedding, tasks, and the outer gradient by hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from theria.meta import SGD, Adam, Higher, MixedMode, Unrolled
from theria.meta.optimisers import InnerOptimiser
from theria.nn import MLP

EXACT = 1e-10  # float64, the same derivative in another order of sums
WAYS, STEPS, WIDTH = 3, 3, 5
ADJOINTS = [Unrolled(), Unrolled(checkpoint_every=2), MixedMode(), Higher()]  # the exact ones
ADAPT = {"head": "head", "last": ["body.2", "head"], "all": None}

Episode = tuple[Tensor, ...]
Start = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # embeddings (S, d), labels -> W (ways, d), b (ways,)


def optimisers(rate: float) -> dict[str, InnerOptimiser]:
    """Inner optimisers that keep a state, or learn a rate for each entry."""
    return {
        "nesterov": SGD(rate, momentum=0.9, nesterov=True),
        "each entry": SGD(rate, learn_lr=True),
        "each tensor and step": SGD([rate] * STEPS, learn_lr="tensor"),
        "adam": Adam(0.05, learn_lr=True),
    }


def embedding() -> nn.Module:
    """Two hidden layers of 5, the second of which is the embedding (B, 5); drawn from the seed 0."""
    torch.manual_seed(0)
    model = MLP([2, WIDTH, WIDTH, 1], activation=nn.Tanh).double()
    model.head = nn.Identity()  # type: ignore[assignment]
    return model


def tasks() -> Episode:
    """T = 4 tasks of 3 classes; classes with 1, 2 and 3 examples in a support of 6, 5 queries."""
    torch.manual_seed(1)
    x = torch.randn(4, 11, 2, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 2, 2, 2]).repeat(4, 1)
    return x[:, :6], y, x[:, 6:], torch.randint(WAYS, (4, 5))


def gradients(learner: nn.Module, episode: Episode) -> dict[str, Tensor]:
    """Of the outer loss in every parameter that it depends on."""
    learner.zero_grad()
    learner(episode).backward()
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and values to rounding."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=EXACT, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}")


def moved(model: nn.Module, adapt: Any) -> list[str]:
    """What the inner steps change, in the names of `by_hand`, for a value of `ADAPT`."""
    names = [name for name, _ in model.named_parameters()]
    return ["W", "b", *(name for name in names if adapt is None or (name.startswith("body.2") and adapt != "head"))]


def by_hand(
    model: nn.Module, episode: Episode, moves: list[str], start: Start, rate: float, *, factor: float = 1.0,
    first_order: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """The outer gradient by one autograd graph for each task, no part of theria in it.

    `start` makes the classifier of the embeddings of the support set, and the logits are `factor` (W h + b).
    """
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = []
    for sx, sy, qx, qy in zip(*episode, strict=True):
        weight, bias = start(functional_call(model, theta, (sx,)), sy)
        # Clones: a step takes the partial derivative in theta, W held, though W may be made of theta.
        params = {**{name: p.clone() for name, p in theta.items()}, "W": weight, "b": bias}

        def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
            body = {name: p for name, p in params.items() if name not in "Wb"}
            return factor * (functional_call(model, body, (x,)) @ params["W"].T + params["b"])

        for _ in range(STEPS):
            loss = cross_entropy(logits(params, sx), sy)
            found = torch.autograd.grad(loss, [params[name] for name in moves], create_graph=True)
            found = [g.detach() if first_order else g for g in found]
            params |= {name: params[name] - rate * g for name, g in zip(moves, found, strict=True)}
        losses.append(cross_entropy(logits(params, qx), qy))
    outer = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()))
    return {f"model.{name}": g for name, g in zip(theta, outer, strict=True)}
