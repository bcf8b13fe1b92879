"""UNICORN-MAML against MAML from equal rows, autograd written out by hand, and the closed form of its first step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from theria.meta import MAML, SGD, Adam, FirstOrder, Higher, MixedMode, ProtoMAML, Unrolled
from theria.meta.implicit_adjoint import Implicit
from theria.meta.unicorn_maml import UnicornMAML
from theria.nn import MLP

EXACT = 1e-10  # float64, the same derivative in another order of sums
WAYS, STEPS, RATE = 3, 3, 0.7
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
        zeros = torch.zeros(WAYS, 6, dtype=torch.float64, requires_grad=True)
        params = {**theta, "W": zeros[:, :5], "b": zeros[:, 5]}

        def logits(params: dict[str, Tensor], x: Tensor) -> Tensor:
            body = {name: p for name, p in params.items() if name not in "Wb"}
            return WAYS**0.5 * (functional_call(model, body, (x,)) @ params["W"].T + params["b"])

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
@pytest.mark.parametrize("adjoint", [*ADJOINTS, FirstOrder()], ids=repr)
def test_its_gradient_is_that_by_hand(adjoint, adapt, model, episode):
    first = isinstance(adjoint, FirstOrder)
    expected = by_hand(model, episode, moved(model, adapt), first)
    other = by_hand(model, episode, moved(model, adapt), not first)
    assert max((expected[n] - other[n]).abs().max() for n in expected) > 1e-3  # the curvature is no rounding
    close(gradients(UnicornMAML(model, None, SGD(RATE), STEPS, adjoint, adapt, ways=WAYS), episode), expected)


@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
def test_any_row_that_all_classes_share_gives_the_same(adapt, model, episode):
    """MAML on the whole network from rows that are equal, with `ways` times their rate: the same probabilities, and the
    same gradient but for the rows' own, whose sum over the classes is nil: the gradient of a row that is shared."""
    whole = MLP([2, 5, 5, WAYS], activation=nn.Tanh).double()
    whole.load_state_dict(model.state_dict(), strict=False)
    expected = MAML(whole, cross_entropy, SGD(RATE, learn_lr="tensor"), STEPS, adapt=adapt)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, rate in expected.rates["lr"].items():  # type: ignore[operator]
            rate.mul_(WAYS if name.startswith("head") else 1)
        head = whole.head
        assert isinstance(head, nn.Linear)
        head.weight.copy_(torch.randn(1, 5).expand(WAYS, 5))
        head.bias.fill_(0.3)
    learner = UnicornMAML(model, None, SGD(RATE), STEPS, adapt=adapt, ways=WAYS)
    for steps in range(STEPS + 1):
        probabilities = [each.predict(episode, steps=steps).softmax(-1) for each in (learner, expected)]
        torch.testing.assert_close(*probabilities, rtol=EXACT, atol=EXACT)
    wanted = {name: g for name, g in gradients(expected, episode).items() if not name.startswith("rates")}
    for name in ("weight", "bias"):
        rows = wanted.pop(f"model.head.{name}")
        assert rows.abs().max() > 1e-3
        torch.testing.assert_close(rows.sum(0), torch.zeros_like(rows[0]), rtol=0, atol=EXACT)
    close(gradients(learner, episode), wanted)


def test_the_first_step_makes_a_classifier_of_centred_class_means(model, episode):
    """Two examples of each class: sqrt(ways) w_k = r (c_k - mean of c), b = 0, and nothing else moves."""
    x, y = episode[0][0], torch.tensor([0, 1, 2, 0, 1, 2])
    adapted = UnicornMAML(model, None, SGD(RATE), 2, ways=WAYS).adapt(x, y, steps=1)
    h = model(x)
    means = torch.stack([h[y == k].mean(0) for k in range(WAYS)])
    expected = {"head.weight": RATE / WAYS**0.5 * (means - means.mean(0)), "head.bias": torch.zeros(WAYS).double()}
    close(dict(adapted), {**dict(model.named_parameters()), **expected})


@pytest.mark.parametrize("steps", [0, STEPS])
def test_before_a_step_it_knows_nothing_and_after_some_it_does(steps, model, episode):
    probabilities = UnicornMAML(model, None, SGD(RATE), STEPS, ways=WAYS).predict(episode, steps=steps).softmax(-1)
    guess = torch.full_like(probabilities, 1 / WAYS)
    if steps:
        assert (probabilities - guess).abs().max() > 0.05
    else:
        torch.testing.assert_close(probabilities, guess, rtol=EXACT, atol=EXACT)


INNER = {
    "nesterov": SGD(RATE, momentum=0.9, nesterov=True),
    "each entry": SGD(RATE, learn_lr=True),
    "each tensor and step": SGD([RATE] * STEPS, learn_lr="tensor"),
    "adam": Adam(0.05, learn_lr=True),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=list(INNER))
@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
def test_classes_may_be_numbered_in_any_order(adapt, inner, model, episode):
    sx, sy, qx, qy = episode
    learner = UnicornMAML(model, None, inner, STEPS, MixedMode(), adapt, ways=WAYS)
    order = torch.tensor([2, 0, 1])  # class k is called order[k]
    renamed = (sx, order[sy], qx, order[qy])
    torch.testing.assert_close(learner.predict(renamed)[..., order], learner.predict(episode), rtol=EXACT, atol=EXACT)
    close(gradients(learner, renamed), gradients(learner, episode))


def test_what_it_learned_fits_another_number_of_classes(model, episode):
    learner = UnicornMAML(model, None, SGD(RATE, learn_lr=True), STEPS, ways=WAYS)
    assert {name: p.shape for name, p in learner.rates["lr"].items() if name.startswith("head")} == {  # type: ignore[union-attr]
        "head/weight": (1, 1),
        "head/bias": (1,),
    }
    learner.ways = 2
    two = [part[:, :3] for part in episode[:2]] + [episode[2], episode[3].clamp(max=1)]
    fresh = UnicornMAML(model, None, SGD(RATE), STEPS, ways=2)
    assert learner.predict(tuple(two)).shape == (4, 5, 2)
    torch.testing.assert_close(learner.predict(tuple(two)), fresh.predict(tuple(two)), rtol=EXACT, atol=EXACT)


def test_the_step_of_the_classifier_does_not_depend_on_the_number_of_classes(model):
    """Two classes of the same three examples each, called two or six: their logits differ by the same after a step."""
    torch.manual_seed(3)
    x = torch.randn(3, 2, dtype=torch.float64)
    apart = torch.cat([x, -x])
    two, six = (UnicornMAML(model, None, SGD(RATE), 2, adapt="head", ways=ways) for ways in (2, 6))
    y = torch.arange(2).repeat_interleave(3)
    logits = two.predict((apart, y, apart, y), steps=1)
    many = torch.cat([apart] * 3), torch.cat([y, y + 2, y + 4])
    others = six.predict((*many, apart, y), steps=1)
    torch.testing.assert_close(others[:, 0] - others[:, 1], logits[:, 0] - logits[:, 1], rtol=EXACT, atol=EXACT)


def test_it_adapts_everything_where_nothing_is_said(model, episode):
    adapted = UnicornMAML(model, None, SGD(RATE), 2, ways=WAYS).adapt(episode[0][0], episode[1][0])
    theta = dict(model.named_parameters())
    assert all(not torch.equal(adapted[name], p) for name, p in theta.items())
    head = ProtoMAML(model, None, SGD(RATE), 2, ways=WAYS).adapt(episode[0][0], episode[1][0])
    assert all(torch.equal(head[name], p) for name, p in theta.items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UnicornMAML(MLP([2, 3]), ways=3), r"parameters \['head.weight', 'head.bias'\].*nn\.Identity"),
        (lambda: UnicornMAML(embedding(), ways=0), "ways=0"),
        (lambda: UnicornMAML(nn.Tanh(), ways=2), "no embedding to learn"),
        (lambda: UnicornMAML(embedding(), adapt="bodi", ways=2), "adapt='bodi'"),
        (lambda: UnicornMAML(embedding(), adjoint=Implicit(), ways=2), "Use IMAML"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_without_an_example_is_named(model, episode):
    sx, sy, qx, qy = episode
    with pytest.raises(ValueError, match="a class has no example"):
        UnicornMAML(model, ways=WAYS)((sx, sy.clamp(max=1), qx, qy))
