"""A recorded step is the step: the same loss and gradients, whatever changes between two of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from theria.meta import MAML, R2D2, SGD, MixedMode, Unrolled
from theria.meta.capture import CapturedStep
from theria.nn import TransformerClassifier
from theria.testing import difference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
F32 = 2e-6  # the same kernels; cuBLAS may choose others while it records


def make(adjoint: Any = None, steps: int = 2) -> Any:
    torch.manual_seed(0)
    model = TransformerClassifier(3, image_size=8, patch=4, d_model=8, n_heads=2, n_layers=1)
    return MAML(model, cross_entropy, SGD(0.1), steps, adjoint or Unrolled()).to(DEVICE)


def episode(seed: int, tasks: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, tasks, 6, 1, 8, 8, generator=generator)
    y = torch.randint(3, (2, tasks, 6), generator=generator)
    return tuple(part.to(DEVICE) for part in (x[0], y[0], x[1], y[1]))


def eager(learner: Any, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss and gradients, without touching `.grad`."""
    loss = learner(given)
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in learner.parameters() if p.requires_grad])]


def recorded(step: CapturedStep, given: tuple[Tensor, ...]) -> list[Tensor]:
    loss = step(given)
    return [loss, *(p.grad.clone() for p in step.parameters if p.grad is not None)]


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=lambda x: type(x).__name__)
def test_loss_and_gradients_are_those_of_the_step(adjoint: Any) -> None:
    learner = make(adjoint)
    step = CapturedStep(learner)
    for seed in range(3):
        assert difference(recorded(step, episode(seed)), eager(learner, episode(seed))) <= F32


def test_a_ridge_regressor_is_recorded() -> None:
    """Its systems are solved inside the graph, where some of PyTorch's solvers abort the process, on a GPU alone."""
    torch.manual_seed(0)
    embedding = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
    learner = R2D2(embedding, cross_entropy, ways=3).to(DEVICE)
    step = CapturedStep(learner)
    for seed in range(2):
        assert difference(recorded(step, episode(seed)), eager(learner, episode(seed))) <= F32


def test_training_follows_the_same_trajectory() -> None:
    one, two = make(), make()
    first, second = (torch.optim.Adam(learner.parameters(), lr=1e-3) for learner in (one, two))
    step = CapturedStep(one)
    for seed in range(5):
        step(episode(seed))
        first.step()
        first.zero_grad()  # harmless: the next step sets the gradients again
        second.zero_grad()
        two(episode(seed)).backward()
        second.step()
    assert difference(list(one.parameters()), list(two.parameters())) <= 10 * F32


def test_gradients_do_not_accumulate() -> None:
    step = CapturedStep(make())
    once = recorded(step, episode(0))
    assert difference(recorded(step, episode(0)), once) == 0


def test_other_shapes_frozen_and_replaced_parameters_are_noticed() -> None:
    learner = make()
    step = CapturedStep(learner)
    recorded(step, episode(0))
    assert difference(recorded(step, episode(1, tasks=3)), eager(learner, episode(1, tasks=3))) <= F32
    learner.model.head.weight.requires_grad_(False)
    learner.model.head.weight.grad = None
    assert difference(recorded(step, episode(2)), eager(learner, episode(2))) <= F32
    with torch.no_grad():
        learner.model.head.bias.data = learner.model.head.bias + 1.0  # elsewhere in memory
    assert difference(recorded(step, episode(3)), eager(learner, episode(3))) <= F32


def test_numbers_of_the_learner_that_change_are_noticed() -> None:
    learner = make()
    step = CapturedStep(learner)
    for steps in (2, 3, 2):
        learner.steps = steps
        assert difference(recorded(step, episode(0)), eager(learner, episode(0))) <= F32


def test_only_the_parameters_asked_for_get_a_gradient() -> None:
    learner = make()
    head = [learner.model.head.weight, learner.model.head.bias]
    step = CapturedStep(learner, head)
    step(episode(0))
    assert all(p.grad is not None for p in head)
    expected = torch.autograd.grad(learner(episode(0)), head)
    assert difference([p.grad for p in head], list(expected)) <= F32


def test_a_learner_without_parameters_or_with_no_scalar_raises() -> None:
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        CapturedStep(nn.Identity())(torch.ones(2))
    with pytest.raises(ValueError, match=r"returned \(4, 2\); a scalar"):
        CapturedStep(nn.Linear(3, 2).to(DEVICE))(torch.ones(4, 3, device=DEVICE))


@on_gpu
def test_it_is_one_graph() -> None:
    learner = make()
    step = CapturedStep(learner)
    step(episode(0))
    calls: list[int] = []
    learner.register_forward_hook(lambda *_: calls.append(1))
    step(episode(1))
    assert not calls


@on_gpu
def test_what_waits_for_the_device_cannot_be_recorded() -> None:
    class Waits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones((), device="cuda"))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * float(x.sum())

    torch.manual_seed(5)
    drawn = torch.rand(2, device="cuda")
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        CapturedStep(Waits())(torch.ones(2, device="cuda"))
    assert torch.ones(2, device="cuda").sum().item() == 2.0  # the device goes on, and its random numbers
    assert torch.equal(torch.rand(2, device="cuda"), drawn)
