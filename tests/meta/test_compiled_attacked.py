"""What a compiled step could pass over between two episodes, or leave behind: followed, or refused with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from theria.meta import MAML, SGD, CapturedStep, Unrolled, compiled
from theria.meta.fused import Fused
from theria.testing import difference

# The same operations of float64, without those of autograd between them.
SAME = 1e-13


class Scaled(nn.Module):
    """loss = sum(weight^2 x) times what is read from the episode."""

    def __init__(self, read: Callable[[Any], Any] = lambda _: 1.0) -> None:
        super().__init__()
        self.weight, self.read = nn.Parameter(torch.ones(3, dtype=torch.float64)), read

    def forward(self, episode: Any) -> Tensor:
        return (self.weight.square() * episode[0]).sum() * self.read(episode)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


def as_traced(piece: fx.GraphModule, inputs: Any) -> Any:
    return piece


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces run as they were traced, which takes no minute of compiling."""
    monkeypatch.setattr(compiled, "Fused", partial(Fused, compiler=as_traced))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def error(step: CapturedStep, episode: Any) -> float:
    """Of loss and gradients, beside those of the learner itself."""
    loss = step.learner(episode)
    expected = torch.autograd.grad(loss, step.parameters)
    found = [step(episode), *(p.grad for p in step.parameters if p.grad is not None)]
    return float(difference(found, [loss.detach(), *expected]))


def test_a_tensor_that_occurs_twice_may_be_two_in_the_next_episode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    step = CapturedStep(MAML(model, F.cross_entropy, SGD(0.1), 2, Unrolled()), compile=True)
    x, more = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    y, other = torch.arange(3).repeat(2, 2), torch.arange(3).flip(0).repeat(2, 2)
    assert error(step, (x, y, x, y)) <= SAME
    assert error(step, (x, y, more, other)) <= SAME


def test_true_and_one_and_one_point_nought_are_different() -> None:
    factor = {bool: 2.0, int: 3.0, float: 5.0, type(None): 7.0}
    step = CapturedStep(Scaled(lambda episode: factor[type(episode[1])]), compile=True)
    for value in (True, 1, 1.0, None, True):
        assert error(step, (numbers(1, 2, 3), value)) <= SAME


def test_a_value_that_cannot_be_compared_is_refused() -> None:
    x = numbers(1, 2, 3)
    for value, kind in ((x.numpy(), "ndarray"), (Own(x), "Own")):
        with pytest.raises(TypeError, match=rf"the episode has a {kind}.*give tensors"):
            CapturedStep(Scaled(), compile=True)((x, value))


@dataclass(eq=False)
class Own:
    """Equal to itself, whatever it holds by now."""

    x: Tensor


READERS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist()[0],
    "numpy": lambda x: float(x.numpy()[0]),
    "mask": lambda x: x[x > 0].mean(),
    "nonzero": lambda x: x.nonzero().shape[0],
}


@pytest.mark.parametrize("read", READERS)
def test_a_step_that_looks_at_values_is_refused(read: str) -> None:
    step = CapturedStep(Scaled(lambda episode: READERS[read](episode[0])), compile=True)
    with pytest.raises(RuntimeError, match=r"looks at the value of a tensor.*compile=False"):
        step((numbers(1, -2, -3),))


def test_what_looks_like_it_and_is_not_is_compiled() -> None:
    """Constants may be read, integers and constants may index."""
    sizes, mask, order = numbers(2, 3), torch.tensor([True, False, True]), torch.tensor([2, 0])

    def read(episode: Any) -> Tensor:
        x, places = episode
        return sizes.tolist()[0] * x[places].sum() + x[mask].sum() * x[order].prod()

    step = CapturedStep(Scaled(read), compile=True)
    for places in ([0, 1], [2, 2]):
        assert error(step, (numbers(1, 2, 3), torch.tensor(places))) <= SAME


def test_attention_without_dropout_draws_nothing() -> None:
    x = torch.randn(2, 1, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class Attends(Scaled):
        dropout = 0.0

        def forward(self, episode: Any) -> Tensor:
            x = episode[0] * self.weight.sum()
            return F.scaled_dot_product_attention(x, x, x, dropout_p=self.dropout).square().mean()

    learner = Attends()
    for given in x:
        assert error(CapturedStep(learner, compile=True), (given,)) <= SAME
    learner.dropout = 0.5
    with pytest.raises(ValueError, match="draws random numbers"):
        CapturedStep(learner, compile=True)((x[0],))


def test_parameters_that_are_tied_in_another_way_are_noticed() -> None:
    torch.manual_seed(0)
    layers = [module for _ in range(3) for module in (nn.Linear(3, 3), nn.Tanh())]
    learner: Any = nn.Sequential(*layers, Sum()).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    first, second, third = (learner[i] for i in (0, 2, 4))
    step = CapturedStep(learner, compile=True)
    third.weight = first.weight  # the parameters by name are then those of the first and the second
    assert error(step, x) <= SAME
    third.weight = second.weight
    assert error(step, x) <= SAME


def test_gradients_have_memory_of_their_own() -> None:
    """That of a sum is one number for all entries, and that of two terms the same tensor twice."""

    class Terms(Scaled):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, episode: Any) -> Tensor:
            return (self.weight + self.other).sum() * episode[0].sum()

    learner = Terms()
    loss = CapturedStep(learner, compile=True)((numbers(1, 2, 3),))
    nn.utils.clip_grad_value_([learner.weight], 1.0)
    assert learner.weight.grad is not None
    assert learner.other.grad is not None
    assert learner.weight.grad.tolist() == [1.0] * 3
    assert learner.other.grad.tolist() == [6.0] * 3
    assert float(loss) == 36.0


@pytest.mark.parametrize("compile", [False, True])
def test_what_gets_no_gradient_keeps_its_own(compile: bool) -> None:
    learner: Any = nn.Sequential(nn.Linear(3, 2, dtype=torch.float64), Sum())
    before = torch.full_like(learner[0].weight, 7.0)
    learner[0].weight.grad = before
    step = CapturedStep(learner, [learner[0].bias], compile=compile)
    for _ in range(2):
        step(numbers(1, 2, 3).expand(4, 3))
        assert learner[0].weight.grad is before
        assert torch.equal(before, torch.full_like(before, 7.0))
        assert learner[0].bias.grad.tolist() == [4.0, 4.0]


def test_running_averages_take_in_each_episode_once() -> None:
    torch.manual_seed(0)
    learner: Any = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), Sum()).double()
    by_itself = copy.deepcopy(learner)
    step, plain = CapturedStep(learner, compile=True), CapturedStep(by_itself)
    for x in torch.randn(3, 5, 4, dtype=torch.float64):
        assert difference([step(x)], [plain(x)]) <= SAME
        assert difference(list(learner.buffers()), list(by_itself.buffers())) <= SAME
    assert int(learner[1].num_batches_tracked) == 3


def test_a_parameter_that_is_read_past_the_learner_is_named() -> None:
    learner: Any = Scaled()
    learner.register_parameter("hidden", nn.Parameter(numbers(1, 2)))
    hidden = learner.hidden
    learner.read = lambda _: hidden.sum()
    with pytest.raises(ArithmeticError, match=r"read from somewhere else than the learner.*compile=False"):
        CapturedStep(learner, compile=True)((numbers(1, 2, 3),))


class OffsetLoss(Scaled):
    def forward(self, episode: Any) -> Tensor:
        return super().forward(episode) + 1e12


def test_a_gradient_is_compared_though_the_loss_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_gradient(piece: fx.GraphModule, inputs: Any) -> Any:
        def run(*xs: Tensor) -> list[Tensor]:
            loss, *grads = piece(*xs)
            return [loss, *map(torch.zeros_like, grads)]

        return run

    step = CapturedStep(OffsetLoss(), compile=True)
    assert error(step, (numbers(1, 2, 3),)) <= SAME
    monkeypatch.setattr(compiled, "Fused", partial(Fused, compiler=without_gradient))
    with pytest.raises(ArithmeticError, match="differs from the step itself"):
        CapturedStep(OffsetLoss(), compile=True)((numbers(1, 2, 3),))


def test_a_loss_of_nought_without_slope_is_right() -> None:
    step = CapturedStep(Scaled(), compile=True)
    assert error(step, (numbers(0, 0, 0),)) == 0.0
