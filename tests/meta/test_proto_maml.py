"""Proto-MAML against autograd written out by hand, against ProtoNet without a step, and under every adjoint."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

from theria.meta import MAML, SGD, Adjoint, FirstOrder, Higher, MixedMode, Unrolled
from theria.meta.implicit_adjoint import Implicit
from theria.meta.optimisers import Adam, InnerOptimiser
from theria.meta.proto_maml import ProtoMAML
from theria.meta.protonet import ProtoNet
from theria.meta.truncated import Truncated
from theria.nn import MLP, residual_net

EXACT = 1e-10  # float64, the same derivative in another order of sums
WAYS, STEPS, RATE = 3, 3, 0.2
ADJOINTS = [Unrolled(), Unrolled(checkpoint_every=2), MixedMode(), Higher()]  # the exact ones
ADAPT = {"head": "head", "last": ["body.2", "head"], "all": None}

Episode = tuple[Tensor, ...]


def embedding() -> nn.Module:
    """Two hidden layers of 5, the second of which is the embedding (B, 5)."""
    model = MLP([2, 5, 5, 1], activation=nn.Tanh).double()
    model.head = nn.Identity()  # type: ignore[assignment]
    return model


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return embedding()


@pytest.fixture
def episode() -> Episode:
    """T = 4 tasks of 3 classes; classes with 1, 2 and 3 examples in a support of 6, 5 queries."""
    torch.manual_seed(1)
    x = torch.randn(4, 11, 2, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 2, 2, 2]).repeat(4, 1)
    return x[:, :6], y, x[:, 6:], torch.randint(WAYS, (4, 5))


def gradients(learner: nn.Module, episode: Episode) -> dict[str, Tensor]:
    learner.zero_grad()
    learner(episode).backward()
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


def close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=EXACT, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}")


def by_hand(model: nn.Module, episode: Episode, moves: list[str], first_order: bool = False) -> dict[str, Tensor]:
    """The outer gradient by one autograd graph for each task, no part of theria in it."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    losses = []
    for sx, sy, qx, qy in zip(*episode, strict=True):
        h = functional_call(model, theta, (sx,))
        c = torch.stack([h[sy == k].mean(0) for k in range(WAYS)])
        # Clones: a step takes the partial derivative in theta, W held, though W is made of theta.
        params = {**{name: p.clone() for name, p in theta.items()}, "W": 2 * c, "b": -(c * c).sum(1)}

        def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
            body = {name: p for name, p in params.items() if name not in "Wb"}
            return functional_call(model, body, (x,)) @ params["W"].T + params["b"]

        for _ in range(STEPS):
            loss = cross_entropy(logits(params, sx), sy)
            found = torch.autograd.grad(loss, [params[name] for name in moves], create_graph=True)
            found = [g.detach() if first_order else g for g in found]
            params |= {name: params[name] - RATE * g for name, g in zip(moves, found, strict=True)}
        losses.append(cross_entropy(logits(params, qx), qy))
    outer = torch.autograd.grad(torch.stack(losses).mean(), list(theta.values()))
    return {f"model.{name}": g for name, g in zip(theta, outer, strict=True)}


def moved(model: nn.Module, adapt: Any) -> list[str]:
    names = [name for name, _ in model.named_parameters()]
    return ["W", "b", *(name for name in names if adapt is None or (name.startswith("body.2") and adapt != "head"))]


@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_exact_adjoints_give_the_gradient_by_hand(adjoint, adapt, model, episode):
    expected = by_hand(model, episode, moved(model, adapt))
    first_order = by_hand(model, episode, moved(model, adapt), first_order=True)
    assert max((expected[n] - first_order[n]).abs().max() for n in expected) > 1e-3  # the curvature is no rounding
    close(gradients(ProtoMAML(model, None, SGD(RATE), STEPS, adjoint, adapt, ways=WAYS), episode), expected)


@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
def test_first_order_keeps_the_path_through_the_prototypes(adapt, model, episode):
    expected = by_hand(model, episode, moved(model, adapt), first_order=True)
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, FirstOrder(), adapt, ways=WAYS)
    close(gradients(learner, episode), expected)
    learner.adjoint = Truncated(STEPS)
    close(gradients(learner, episode), by_hand(model, episode, moved(model, adapt)))


def test_without_a_step_it_is_a_prototypical_network(model, episode):
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, ways=WAYS)
    expected = ProtoNet(model, ways=WAYS).predict(episode).log_softmax(-1)
    torch.testing.assert_close(learner.predict(episode, steps=0).log_softmax(-1), expected, rtol=EXACT, atol=EXACT)
    assert (learner.predict(episode).log_softmax(-1) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_from_prototypes_the_steps_are_those_of_maml(adjoint, model, episode):
    """The adapted classifier is what MAML makes of a network that begins with this head."""
    sx, sy, _, _ = (part[0] for part in episode)
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, adjoint, adapt=None, ways=WAYS)
    start = learner.adapt(sx, sy, steps=0)
    whole = MLP([2, 5, 5, WAYS], activation=nn.Tanh).double()
    whole.load_state_dict(start)
    expected = MAML(whole, cross_entropy, SGD(RATE), STEPS).adapt(sx, sy)
    close(dict(learner.adapt(sx, sy)), dict(expected))


INNER: dict[str, InnerOptimiser] = {
    "nesterov": SGD(RATE, momentum=0.9, nesterov=True),
    "each entry": SGD(RATE, learn_lr=True),
    "each tensor and step": SGD([RATE] * STEPS, learn_lr="tensor"),
    "adam": Adam(0.05, learn_lr=True),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=list(INNER))
@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
def test_classes_may_be_numbered_in_any_order(adapt, inner, model, episode):
    sx, sy, qx, qy = episode
    learner = ProtoMAML(model, None, inner, STEPS, MixedMode(), adapt, ways=WAYS)
    order = torch.tensor([2, 0, 1])  # class k is called order[k]
    renamed = (sx, order[sy], qx, order[qy])
    torch.testing.assert_close(learner.predict(renamed)[..., order], learner.predict(episode), rtol=EXACT, atol=EXACT)
    close(gradients(learner, renamed), gradients(learner, episode))


@pytest.mark.parametrize("inner", INNER.values(), ids=list(INNER))
def test_learned_rates_have_the_gradient_of_their_value(inner, model, episode):
    learner = ProtoMAML(model, None, inner, STEPS, adapt=None, ways=WAYS)
    start = {name: p.detach() for name, p in learner.named_parameters()}
    gradient = grad(learner.outer_loss)(start, episode)
    direction = {name: torch.randn_like(p) for name, p in start.items()}

    def along(step: float) -> Tensor:
        return learner.outer_loss({name: p + step * direction[name] for name, p in start.items()}, episode)

    product = torch.stack([(gradient[name] * d).sum() for name, d in direction.items()]).sum()
    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-6)  # central differences of a smooth function


def test_learned_rates_fit_another_number_of_classes(model, episode):
    learner = ProtoMAML(model, None, SGD(RATE, learn_lr=True), STEPS, adapt=None, ways=WAYS)
    assert learner.rates["lr"]["head/weight"].shape == (1, 1)  # type: ignore[index]
    learner.ways = 2
    two = [part[:, :3] for part in episode[:2]] + [episode[2], episode[3].clamp(max=1)]
    assert learner.predict(tuple(two)).shape == (4, 5, 2)


def test_tasks_under_vmap_equal_the_loop_on_a_residual_network():
    torch.manual_seed(0)
    x = torch.rand(2, 10, 1, 12, 12, dtype=torch.float64)
    y = torch.arange(10).repeat(2, 1) % WAYS
    episode = (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    net = residual_net(width=4).double()
    learner = ProtoMAML(net, None, SGD(RATE), 2, MixedMode(), ["body.3", "head"], ways=WAYS)
    loop = [gradients(learner, tuple(part[t] for part in episode)) for t in range(2)]
    mean = {name: (loop[0][name] + loop[1][name]) / 2 for name in loop[0]}
    close(gradients(learner, episode), mean)
    learner.adjoint = Unrolled()
    close(gradients(learner, episode), mean)


def test_frozen_parameters_stay(model, episode):
    first = model.body[0]  # type: ignore[index]
    first.requires_grad_(False)
    learner = ProtoMAML(model, None, SGD(RATE), STEPS, adapt=None, ways=WAYS)
    adapted = learner.adapt(episode[0][0], episode[1][0])
    assert torch.equal(adapted["body.0.weight"], first.weight)
    assert not torch.equal(adapted["body.2.weight"], model.body[2].weight)  # type: ignore[index]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProtoMAML(MLP([2, 3]), ways=3), r"parameters \['head.weight', 'head.bias'\].*nn\.Identity"),
        (lambda: ProtoMAML(embedding(), ways=0), "ways=0"),
        (lambda: ProtoMAML(nn.Tanh(), ways=2), "no embedding to learn"),
        (lambda: ProtoMAML(embedding(), adapt="bodi", ways=2), "adapt='bodi'"),
        (lambda: ProtoMAML(embedding(), adjoint=Implicit(), adapt=None, ways=2), "Use IMAML"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_without_an_example_is_named(model, episode):
    sx, sy, qx, qy = episode
    with pytest.raises(ValueError, match="a class has no example"):
        ProtoMAML(model, ways=WAYS)((sx, sy.clamp(max=1), qx, qy))


def test_the_adjoint_is_a_value(model):
    wrong: Any = Adjoint
    with pytest.raises(TypeError, match="adjoint"):
        ProtoMAML(model, adjoint=wrong, ways=WAYS)
