"""What once went wrong without an error in a meta-learner; each now is right or says what is wrong."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from theria.meta import IMAML, MAML, SGD, Higher, MAMLPlusPlus, MixedMode, Reptile, Unrolled

EXACT = 1e-12


@pytest.fixture
def episode() -> tuple[Tensor, ...]:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    y = torch.randint(0, 3, (2, 3, 5))
    return x[0], y[0], x[1], y[1]


def test_a_copy_of_a_learner_reads_its_own_module(episode):
    learner = MAML(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double(), cross_entropy, SGD(0.1))
    learner.randomness = "different"
    twin = copy.deepcopy(learner).eval()
    assert twin(episode) == twin(episode)  # no dropout in the copy
    assert learner(episode) != learner(episode)
    norm = MAML(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3)).double(), cross_entropy, batch_norm="running")
    twin = copy.deepcopy(norm)
    before = norm(episode)
    twin.model[0].running_mean.fill_(3.0)  # type: ignore[index, union-attr, operator]
    assert norm(episode) == before
    assert twin(episode) != before


def test_tasks_of_scalar_inputs_are_said_to_be_tasks():
    tensors = tuple(torch.randn(4, 4, dtype=torch.float64) for _ in range(4))
    learner = MAML(lambda p, x: p["w"] * x, mse_loss, SGD(0.1), params={"w": torch.ones((), dtype=torch.float64)})
    loop = torch.stack([learner(task, batched=False) for task in zip(*tensors, strict=True)]).mean()
    torch.testing.assert_close(learner(tensors, batched=True), loop, rtol=EXACT, atol=EXACT)


def test_a_tangent_that_would_be_lost_raises_without_recording_too(episode):
    model = nn.Linear(6, 3).double()
    task = tuple(part[0] for part in episode)

    def loss(w: Tensor) -> Tensor:
        return MAML(model, lambda p, y: cross_entropy(p * w, y), SGD(0.5), 2, MixedMode())(task)

    ones = torch.ones(3, dtype=torch.float64)
    with torch.no_grad(), pytest.raises((ValueError, NotImplementedError), match="Unrolled"):
        torch.func.jvp(loss, (ones,), (ones,))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.linear(x)


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode(), Higher()], ids=lambda a: type(a).__name__)
def test_a_buffer_put_in_anothers_place_raises(episode, adjoint):
    model = Counting().double()
    with pytest.raises(RuntimeError, match=r"writes to a buffer \(of: calls\)"):
        MAML(model, cross_entropy, SGD(0.1), 2, adjoint)(episode)
    assert model.calls == 0
    assert not model._forward_hooks


def test_frozen_parameters_are_not_adapted(episode):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model[0].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = MAML(model, cross_entropy, SGD(0.5, learn_lr=True), 2)
    adapted = learner.adapt(episode[0][0], episode[1][0])
    assert adapted["0.weight"].equal(before["0.weight"])
    assert not adapted["1.weight"].equal(before["1.weight"])
    assert not any(name.startswith("rates.lr.0/") for name, _ in learner.named_parameters())


@pytest.mark.parametrize("kind", [MAML, IMAML, MAMLPlusPlus, Reptile], ids=lambda k: k.__name__)
def test_frozen_parameters_of_a_pure_function_are_not_adapted(episode, kind):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model[0].requires_grad_(False)
    module = kind(model, cross_entropy, SGD(0.1))
    pure = kind(partial(functional_call, model), cross_entropy, SGD(0.1), params=dict(model.named_parameters()))
    assert pure.adapted == module.adapted == ["1.weight", "1.bias"]
    torch.testing.assert_close(pure.predict(episode), module.predict(episode), rtol=EXACT, atol=EXACT)
    pure(episode).backward()
    assert {name for name, p in pure.named_parameters() if p.grad is not None} == {"params.1/weight", "params.1/bias"}


def test_a_loss_with_parameters_is_refused():
    with pytest.raises(TypeError, match="loss_fn is a module with parameters"):
        MAML(nn.Linear(6, 3), nn.Linear(3, 1), SGD(0.1))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 1), nn.LayerNorm(8), nn.Linear(8, 3)),
        nn.Sequential(nn.LayerNorm(7, elementwise_affine=False), nn.Linear(6, 3)),
        nn.Sequential(nn.Linear(6, 1), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    ],
    ids=["width", "no_weights", "channels"],
)
def test_norms_keep_pytorchs_checks(episode, model):
    with pytest.raises((RuntimeError, ValueError)):
        MAML(model.double(), cross_entropy, SGD(0.1))(episode)
