"""What learners of classes take: a number of them, integer labels of any kind, and embeddings that are vectors."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from theria.meta import MAML, R2D2, ProtoMAML, ProtoNet, UnicornMAML
from theria.meta.learner import Learner

WAYS, WIDTH = 3, 5
KINDS = [ProtoNet, ProtoMAML, UnicornMAML, R2D2]


def network(*after: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, WIDTH + 1), nn.Tanh(), *(after or (nn.Linear(WIDTH + 1, WIDTH),))).double()


def make(kind: Any, *after: nn.Module) -> Any:
    return kind(network(*after), cross_entropy, ways=WAYS)


def tasks(batched: bool = True) -> tuple[Tensor, ...]:
    x, y = torch.randn(2, 12, 4, dtype=torch.float64), torch.arange(WAYS).repeat(2, 4)
    episode = (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    return episode if batched else tuple(part[0] for part in episode)


@pytest.mark.parametrize("ways", [0, -1, "3", 2.0, True, torch.tensor(3)], ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_ways_is_checked_whenever_it_is_set(kind, ways):
    with pytest.raises(ValueError, match="ways="):
        kind(network(), cross_entropy, ways=ways)
    learner = make(kind)
    with pytest.raises(ValueError, match=r"ways=.*: give an integer of at least 1"):
        learner.ways = ways
    assert learner.ways == WAYS
    if kind is not R2D2:  # for which it is a regression
        with pytest.raises(ValueError, match="ways=None"):
            learner.ways = None


@pytest.mark.parametrize("kind", KINDS)
def test_copies_have_ways_of_their_own(kind):
    learner = make(kind)
    twins = copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))
    learner.ways = 2
    assert [twin.ways for twin in twins] == [WAYS, WAYS]
    assert learner.ways == 2


@pytest.mark.parametrize("batched", [True, False], ids=["tasks", "task"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, MAML])
def test_labels_of_any_integer_type_are_those_of_int64(kind, dtype, batched):
    learner: Learner = MAML(network(), cross_entropy) if kind is MAML else make(kind)
    sx, sy, qx, qy = tasks(batched)
    results = []
    for episode in ((sx, sy, qx, qy), (sx, sy.to(dtype), qx, qy.to(dtype))):
        learner.zero_grad()
        loss = learner(episode)
        loss.backward()
        gradient = [p.grad.clone() for p in learner.parameters() if p.grad is not None]
        results.append([loss.detach(), *gradient, learner.predict(episode)])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_booleans_are_no_labels(kind):
    sx, sy, qx, qy = tasks()
    with pytest.raises(ValueError, match=r"support_y has shape \(6,\), torch\.bool: class labels are integers"):
        make(kind)((sx, sy > 0, qx, qy > 0))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x


NO_EMBEDDINGS = [
    ([nn.Linear(WIDTH + 1, 1), nn.Flatten(0)], ValueError, r"shape \(6,\), torch\.float64, for inputs \(6, 4\)"),
    ([nn.Unflatten(1, (2, 3))], ValueError, r"shape \(6, 2, 3\).*end the model with nn\.Flatten\(\)"),
    (
        [nn.Unflatten(1, (1, WIDTH + 1)), nn.Flatten(0, 1), nn.Unflatten(0, (3, 2)), nn.Flatten(1)],
        ValueError,
        r"\(3, 12",
    ),
    ([Pair()], TypeError, "the model returned a tuple: an embedding is a tensor"),
]


@pytest.mark.parametrize("batched", [True, False], ids=["tasks", "task"])
@pytest.mark.parametrize(("after", "error", "message"), NO_EMBEDDINGS, ids=["scalars", "maps", "rows", "pair"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_embedding_is_named(kind, after, error, message, batched):
    learner = make(kind, *after)
    for call in (learner, learner.predict):
        with pytest.raises(error, match=message):
            call(tasks(batched))


@pytest.mark.parametrize("kind", [*KINDS, MAML])
def test_a_loss_is_a_function(kind):
    wrong: Any = "cross_entropy"
    with pytest.raises(TypeError, match="loss_fn='cross_entropy': give a function"):
        kind(network(), wrong, **({} if kind is MAML else {"ways": WAYS}))
