"""What holds for every learner with a classifier for each task; their outer gradients against autograd by hand."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from tests.meta.task_heads import (
    ADAPT,
    ADJOINTS,
    EXACT,
    STEPS,
    WAYS,
    WIDTH,
    by_hand,
    close,
    embedding,
    gradients,
    moved,
    optimisers,
    tasks,
)
from theria.meta import SGD, Adam, Adjoint, FirstOrder, MixedMode, ProtoMAML, Truncated, UnicornMAML, Unrolled
from theria.meta.implicit_adjoint import Implicit
from theria.nn import MLP, residual_net

RATE = 0.2
INNER = optimisers(RATE)

pytestmark = pytest.mark.parametrize("kind", [ProtoMAML, UnicornMAML])


def prototypes(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Section 3 of the paper of ProtoMAML."""
    c = torch.stack([h[y == k].mean(0) for k in range(WAYS)])
    return 2 * c, -(c * c).sum(1)


def zeros(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    start = torch.zeros(WAYS, WIDTH + 1, dtype=torch.float64, requires_grad=True)
    return start[:, :WIDTH], start[:, WIDTH]


# Where the classifier starts, a rate at which its curvature is seen, and what the logits are multiplied by.
BY_HAND = {ProtoMAML: (prototypes, 0.2, 1.0), UnicornMAML: (zeros, 0.7, WAYS**0.5)}


def expected(kind: Any, adapt: Any, first_order: bool) -> dict[str, Tensor]:
    (start, rate, factor), model = BY_HAND[kind], embedding()
    return by_hand(model, tasks(), moved(model, adapt), start, rate, factor=factor, first_order=first_order)


@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
@pytest.mark.parametrize("adjoint", [*ADJOINTS, Truncated(STEPS)], ids=repr)
def test_exact_adjoints_give_the_gradient_by_hand(kind, adjoint, adapt):
    exact, first_order = (expected(kind, adapt, first) for first in (False, True))
    assert max((exact[n] - first_order[n]).abs().max() for n in exact) > 1e-3  # the curvature is no rounding
    rate = BY_HAND[kind][1]
    close(gradients(kind(embedding(), None, SGD(rate), STEPS, adjoint, adapt, ways=WAYS), tasks()), exact)


@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
def test_first_order_holds_the_inner_gradients_constant(kind, adapt):
    """But for them everything is differentiated, the path through the prototypes too."""
    learner = kind(embedding(), None, SGD(BY_HAND[kind][1]), STEPS, FirstOrder(), adapt, ways=WAYS)
    close(gradients(learner, tasks()), expected(kind, adapt, True))


@pytest.mark.parametrize("inner", INNER.values(), ids=list(INNER))
@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
def test_classes_may_be_numbered_in_any_order(kind, adapt, inner):
    sx, sy, qx, qy = episode = tasks()
    learner = kind(embedding(), None, inner, STEPS, MixedMode(), adapt, ways=WAYS)
    order = torch.tensor([2, 0, 1])  # class k is called order[k]
    renamed = (sx, order[sy], qx, order[qy])
    torch.testing.assert_close(learner.predict(renamed)[..., order], learner.predict(episode), rtol=EXACT, atol=EXACT)
    close(gradients(learner, renamed), gradients(learner, episode))


@pytest.mark.parametrize("inner", INNER.values(), ids=list(INNER))
def test_learned_rates_have_the_gradient_of_their_value(kind, inner):
    learner, episode = kind(embedding(), None, inner, STEPS, adapt=None, ways=WAYS), tasks()
    start = {name: p.detach() for name, p in learner.named_parameters()}
    gradient = grad(learner.outer_loss)(start, episode)
    direction = {name: torch.randn_like(p) for name, p in start.items()}

    def along(step: float) -> Tensor:
        return learner.outer_loss({name: p + step * direction[name] for name, p in start.items()}, episode)

    product = torch.stack([(gradient[name] * d).sum() for name, d in direction.items()]).sum()
    difference = (along(1e-5) - along(-1e-5)) / 2e-5
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-6)  # central differences of a smooth function


@pytest.mark.parametrize("inner", [SGD(RATE, momentum=0.9), Adam(0.05), SGD(RATE, learn_lr=True)], ids=repr)
@pytest.mark.parametrize("adapt", ADAPT.values(), ids=list(ADAPT))
@pytest.mark.parametrize("adjoint", [*ADJOINTS, FirstOrder()], ids=repr)
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode], ids=lambda f: f.__name__)
def test_values_do_not_depend_on_whether_gradients_are_recorded(kind, adjoint, adapt, inner, without):
    learner, episode = kind(embedding(), None, inner, STEPS, adjoint, adapt, ways=WAYS), tasks()
    plain = kind(embedding(), None, inner, STEPS, Unrolled(), adapt, ways=WAYS)
    expected = plain.predict_trajectory(episode), plain.adapt(episode[0][0], episode[1][0])
    with without():
        actual = learner.predict_trajectory(episode), learner.adapt(episode[0][0], episode[1][0])
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


def test_what_it_learned_fits_another_number_of_classes(kind):
    """Two classes: the learner of three, told so, is the one that is made for two with the same parameters."""
    model, episode = embedding(), tasks()
    learner = kind(model, None, SGD(RATE, learn_lr=True), STEPS, adapt=None, ways=WAYS)
    assert learner.rates["lr"]["head/weight"].shape == (1, 1)
    assert learner.rates["lr"]["head/bias"].shape == (1,)
    learner.ways = 2
    two = tuple([part[:, :3] for part in episode[:2]] + [episode[2], episode[3].clamp(max=1)])
    fresh = kind(model, None, SGD(RATE, learn_lr=True), STEPS, adapt=None, ways=2)
    fresh.load_state_dict(learner.state_dict())
    assert learner.predict(two).shape == (4, 5, 2)
    torch.testing.assert_close(learner.predict(two), fresh.predict(two), rtol=EXACT, atol=EXACT)


def test_tasks_under_vmap_equal_the_loop_on_a_residual_network(kind):
    torch.manual_seed(0)
    x = torch.rand(2, 10, 1, 12, 12, dtype=torch.float64)
    y = torch.arange(10).repeat(2, 1) % WAYS
    episode = (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    net = residual_net(width=4).double()
    learner = kind(net, None, SGD(RATE), 2, MixedMode(), ["body.3", "head"], ways=WAYS)
    loop = [gradients(learner, tuple(part[t] for part in episode)) for t in range(2)]
    mean = {name: (loop[0][name] + loop[1][name]) / 2 for name in loop[0]}
    close(gradients(learner, episode), mean)
    learner.adjoint = Unrolled()
    close(gradients(learner, episode), mean)


def test_frozen_parameters_stay(kind):
    model, episode = embedding(), tasks()
    first: Any = model.body[0]  # type: ignore[index]
    first.requires_grad_(False)
    learner = kind(model, None, SGD(RATE), STEPS, adapt=None, ways=WAYS)
    adapted = learner.adapt(episode[0][0], episode[1][0])
    assert torch.equal(adapted["body.0.weight"], first.weight)
    assert not torch.equal(adapted["body.2.weight"], model.body[2].weight)  # type: ignore[index]


def test_frozen_parameters_of_a_pure_function_stay(kind):
    """As those of a module, to which the learner of the function is equal."""
    model, episode = embedding(), tasks()
    first: Any = model.body[0]  # type: ignore[index]
    first.requires_grad_(False)
    inner = SGD(RATE, learn_lr=True)
    module = kind(model, None, inner, STEPS, adapt=None, ways=WAYS)
    params = dict(model.named_parameters())
    pure = kind(partial(functional_call, model), None, inner, STEPS, adapt=None, ways=WAYS, params=params)
    assert pure.adapted == module.adapted
    assert "body.0.weight" not in pure.adapted
    assert not pure.params["body/0/weight"].requires_grad
    torch.testing.assert_close(pure.predict(episode), module.predict(episode), rtol=EXACT, atol=EXACT)


class OwnHead(nn.Module):
    """An embedding whose last layers are its `head`."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = embedding(), nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, WIDTH).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("adapt", ["head", ["body", "head"]], ids=str)
def test_a_head_of_the_models_own_is_not_taken_for_the_classifier(kind, adapt):
    with pytest.raises(
        ValueError, match=r"the model has 'head.1.weight' of its own: give \['head.weight', 'head.bias'\]"
    ):
        kind(OwnHead(), adapt=adapt, ways=WAYS)
    classifier = ["head.weight", "head.bias"]
    assert kind(OwnHead(), adapt=classifier, ways=WAYS).adapted == classifier  # what the message proposes
    both = ["head.1", *classifier]
    assert kind(OwnHead(), adapt=both, ways=WAYS).adapted == ["head.1.weight", "head.1.bias", *classifier]
    assert kind(OwnHead(), adapt=None, ways=WAYS)(tasks()).isfinite()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda kind: kind(MLP([2, 3]), ways=3), r"parameters \['head.weight', 'head.bias'\].*nn\.Identity"),
        (lambda kind: kind(embedding(), ways=0), "ways=0"),
        (lambda kind: kind(nn.Tanh(), ways=2), "no embedding to learn"),
        (lambda kind: kind(embedding(), adapt="bodi", ways=2), "adapt='bodi'"),
        (lambda kind: kind(embedding(), adjoint=Implicit(), adapt=None, ways=2), "Use IMAML"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(kind, make, message):
    with pytest.raises(ValueError, match=message):
        make(kind)


def test_a_class_without_an_example_is_named(kind):
    sx, sy, qx, qy = tasks()
    with pytest.raises(ValueError, match="a class has no example"):
        kind(embedding(), ways=WAYS)((sx, sy.clamp(max=1), qx, qy))


def test_the_adjoint_is_a_value(kind):
    wrong: Any = Adjoint
    with pytest.raises(TypeError, match="adjoint"):
        kind(embedding(), adjoint=wrong, ways=WAYS)
