"""Proto-MAML against ProtoNet without a step, and against MAML from its start."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tests.meta.task_heads import (
    ADJOINTS,
    EXACT,
    STEPS,
    WAYS,
    WIDTH,
    close,
    embedding,
    tasks,
)
from theria.meta import MAML, SGD, ProtoMAML, ProtoNet
from theria.nn import MLP

RATE = 0.2


def test_without_a_step_it_is_a_prototypical_network():
    model, episode = embedding(), tasks()
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, ways=WAYS)
    wanted = ProtoNet(model, ways=WAYS).predict(episode).log_softmax(-1)
    torch.testing.assert_close(learner.predict(episode, steps=0).log_softmax(-1), wanted, rtol=EXACT, atol=EXACT)
    assert (learner.predict(episode).log_softmax(-1) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_from_prototypes_the_steps_are_those_of_maml(adjoint):
    """The adapted classifier is what MAML makes of a network that begins with this head."""
    model, episode = embedding(), tasks()
    sx, sy, _, _ = (part[0] for part in episode)
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, adjoint, adapt=None, ways=WAYS)
    whole = MLP([2, WIDTH, WIDTH, WAYS], activation=nn.Tanh).double()
    whole.load_state_dict(learner.adapt(sx, sy, steps=0))
    wanted = MAML(whole, cross_entropy, SGD(RATE), STEPS).adapt(sx, sy)
    close(dict(learner.adapt(sx, sy)), dict(wanted))


def test_the_head_alone_adapts_where_nothing_is_said():
    model, episode = embedding(), tasks()
    adapted = ProtoMAML(model, None, SGD(RATE), STEPS, ways=WAYS).adapt(episode[0][0], episode[1][0])
    assert all(torch.equal(adapted[name], p) for name, p in model.named_parameters())
