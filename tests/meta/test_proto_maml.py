"""Proto-MAML against autograd written out by hand, against ProtoNet without a step, and against MAML from its start."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tests.meta.task_heads import (
    ADAPT,
    ADJOINTS,
    EXACT,
    STEPS,
    WAYS,
    WIDTH,
    Episode,
    by_hand,
    close,
    embedding,
    gradients,
    moved,
    tasks,
)
from theria.meta import MAML, SGD, FirstOrder, ProtoMAML, ProtoNet, Truncated
from theria.nn import MLP

RATE = 0.2


@pytest.fixture
def model() -> nn.Module:
    return embedding()


@pytest.fixture
def episode() -> Episode:
    return tasks()


def prototypes(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3 of the paper."""
    c = torch.stack([h[y == k].mean(0) for k in range(WAYS)])
    return 2 * c, -(c * c).sum(1)


def expected(model: nn.Module, episode: Episode, adapt: object, first_order: bool = False) -> dict[str, Tensor]:
    return by_hand(model, episode, moved(model, adapt), prototypes, RATE, first_order=first_order)


@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_exact_adjoints_give_the_gradient_by_hand(adjoint, adapt, model, episode):
    exact, first_order = (expected(model, episode, adapt, first) for first in (False, True))
    assert max((exact[n] - first_order[n]).abs().max() for n in exact) > 1e-3  # the curvature is no rounding
    close(gradients(ProtoMAML(model, None, SGD(RATE), STEPS, adjoint, adapt, ways=WAYS), episode), exact)


@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
def test_first_order_keeps_the_path_through_the_prototypes(adapt, model, episode):
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, FirstOrder(), adapt, ways=WAYS)
    close(gradients(learner, episode), expected(model, episode, adapt, first_order=True))
    learner.adjoint = Truncated(STEPS)
    close(gradients(learner, episode), expected(model, episode, adapt))


def test_without_a_step_it_is_a_prototypical_network(model, episode):
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, ways=WAYS)
    wanted = ProtoNet(model, ways=WAYS).predict(episode).log_softmax(-1)
    torch.testing.assert_close(learner.predict(episode, steps=0).log_softmax(-1), wanted, rtol=EXACT, atol=EXACT)
    assert (learner.predict(episode).log_softmax(-1) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_from_prototypes_the_steps_are_those_of_maml(adjoint, model, episode):
    """The adapted classifier is what MAML makes of a network that begins with this head."""
    sx, sy, _, _ = (part[0] for part in episode)
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, adjoint, adapt=None, ways=WAYS)
    whole = MLP([2, WIDTH, WIDTH, WAYS], activation=nn.Tanh).double()
    whole.load_state_dict(learner.adapt(sx, sy, steps=0))
    wanted = MAML(whole, cross_entropy, SGD(RATE), STEPS).adapt(sx, sy)
    close(dict(learner.adapt(sx, sy)), dict(wanted))


def test_the_head_alone_adapts_where_nothing_is_said(model, episode):
    adapted = ProtoMAML(model, None, SGD(RATE), STEPS, ways=WAYS).adapt(episode[0][0], episode[1][0])
    assert all(torch.equal(adapted[name], p) for name, p in model.named_parameters())
