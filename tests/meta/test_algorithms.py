"""Every learner has the same interface: module and pure function, one task and many, adaptation and prediction."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.functional import cross_entropy, mse_loss

from theria.meta import ANIL, FOMAML, MAML, SGD, Adjoint, FirstOrder, MixedMode, Truncated, Unrolled
from theria.meta.cavia import CAVIA, ExtraInputs, FiLM
from theria.meta.imaml import IMAML
from theria.meta.implicit_adjoint import Identity, Implicit
from theria.meta.learner import Learner
from theria.meta.maml import MetaSGD
from theria.meta.maml_plus_plus import MAMLPlusPlus
from theria.meta.optimisers import Hyper, Params
from theria.meta.protonet import ProtoNet
from theria.meta.r2d2 import R2D2
from theria.meta.reptile import Reptile
from theria.nn import MLP

EXACT = 1e-10  # float64, the same derivative in another order of sums
DIFFERENCE = 1e-6  # central differences, step 1e-5, of a smooth function

Episode = tuple[Tensor, ...]


def network(inputs: int = 2, outputs: int = 3) -> MLP:
    return MLP([inputs, 6, outputs], activation=nn.Tanh).double()


# Each with more than one inner step where it has any, and what it learns beside the network.
LEARNERS: dict[str, Callable[[], Learner]] = {
    "maml": lambda: MAML(network(), cross_entropy, SGD(0.4), 3, MixedMode()),
    "fomaml": lambda: FOMAML(network(), cross_entropy, SGD(0.4), steps=3),
    "anil": lambda: ANIL(network(), cross_entropy, SGD(0.4), steps=3),
    "metasgd": lambda: MetaSGD(network(), cross_entropy, 0.4, steps=2),
    "maml++": lambda: MAMLPlusPlus(network(), cross_entropy, steps=3, first_order_epochs=0),
    "maml++ mixed": lambda: MAMLPlusPlus(network(), cross_entropy, steps=3, adjoint=MixedMode(), first_order_epochs=0),
    "reptile": lambda: Reptile(network(), cross_entropy, SGD(0.4), 3),
    "cavia": lambda: CAVIA(ExtraInputs(network(5)), cross_entropy, 3, SGD(0.4, learn_lr=True), 2),
    "cavia film": lambda: CAVIA(FiLM(network(), 4), cross_entropy, 4, SGD(0.4), 2, MixedMode()),
    "protonet": lambda: ProtoNet(network(), ways=3),
    "r2d2": lambda: R2D2(network(outputs=4), cross_entropy, ways=3),
}
CLOSED_FORM = {"protonet", "r2d2"}
# A shift of all embeddings changes no distance, and a shift of all logits no softmax.
INVARIANT = {"protonet": {"model.head.bias"}, "r2d2": {"beta"}}
# Those whose gradient is that of their value.
DIFFERENTIABLE = [name for name in LEARNERS if name not in ("fomaml", "reptile")]


@pytest.fixture(params=list(LEARNERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def learner(name: str) -> Learner:
    return LEARNERS[name]()


@pytest.fixture
def episode() -> Episode:
    """T = 4 tasks of 3 classes, each in the support; S = 6, Q = 5."""
    x, y = torch.randn(4, 11, 2, dtype=torch.float64), torch.arange(11).repeat(4, 1) % 3
    return x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]


def meta(learner: Learner) -> dict[str, Tensor]:
    return dict(learner.named_parameters())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tol: float = EXACT) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


def test_tasks_under_vmap_equal_the_loop_in_every_style(learner: Learner, name: str, episode: Episode) -> None:
    def loop(meta_params: dict[str, Tensor]) -> Tensor:
        return torch.stack([learner.outer_loss(meta_params, task) for task in zip(*episode, strict=True)]).mean()

    expected_loss = loop(meta(learner)).detach()
    expected = {name: g.detach() for name, g in grad(loop)(meta(learner)).items()}
    idle = {name for name, g in expected.items() if g.abs().max() < 1e-8}
    assert idle == INVARIANT.get(name, set())  # all else that is learned has a gradient
    for chunk_size in (None, 1, 3):
        learner.chunk_size = chunk_size
        learner.zero_grad()
        loss = learner(episode)
        torch.testing.assert_close(loss.detach(), expected_loss, rtol=EXACT, atol=EXACT)
        loss.backward()
        assert_same({name: p.grad for name, p in learner.named_parameters() if p.grad is not None}, expected)
        functional = grad(learner.outer_loss)(meta(learner), episode)
        assert_same({name: g.detach() for name, g in functional.items()}, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_is_that_of_the_value(learner: Learner, episode: Episode) -> None:
    start = {name: p.detach() for name, p in learner.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in start.items()}
    gradient = grad(learner.outer_loss)(start, episode)

    def along(step: float) -> Tensor:
        return learner.outer_loss({name: p + step * direction[name] for name, p in start.items()}, episode)

    product = torch.stack([(gradient[name] * d).sum() for name, d in direction.items()]).sum()
    torch.testing.assert_close(product, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=DIFFERENCE, atol=DIFFERENCE)


def test_predictions_are_those_of_each_task_and_of_a_copy(learner: Learner, episode: Episode) -> None:
    predictions = learner.predict(episode)
    assert predictions.shape == (4, 5, 3)
    each = torch.stack([learner.predict(task) for task in zip(*episode, strict=True)])
    torch.testing.assert_close(predictions, each, rtol=EXACT, atol=EXACT)
    twin = copy.deepcopy(learner)
    torch.testing.assert_close(twin.predict(episode), predictions, rtol=EXACT, atol=EXACT)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
        assert not torch.allclose(twin.predict(episode), predictions)
        torch.testing.assert_close(learner.predict(episode), predictions, rtol=EXACT, atol=EXACT)
        twin.load_state_dict(learner.state_dict())
        torch.testing.assert_close(twin.predict(episode), predictions, rtol=EXACT, atol=EXACT)


def test_a_prediction_does_not_see_the_labels_of_the_queries(learner: Learner, episode: Episode) -> None:
    *rest, y = episode
    torch.testing.assert_close(learner.predict((*rest, (y + 1) % 3)), learner.predict(episode), rtol=0, atol=0)


def test_adapt_is_differentiable_and_is_what_predict_uses(learner: Learner, episode: Episode) -> None:
    sx, sy, qx, qy = (part[0] for part in episode)
    adapted = learner.adapt(sx, sy)
    prediction = learner._predict(meta(learner), adapted, qx)
    torch.testing.assert_close(prediction, learner.predict((sx, sy, qx, qy)), rtol=EXACT, atol=EXACT)
    torch.stack([value.square().sum() for value in adapted.values()]).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 1e-8 for p in learner.parameters())


def test_inner_steps_are_chosen_where_there_are_any(learner: Learner, name: str, episode: Episode) -> None:
    if name in CLOSED_FORM:
        for call in (lambda: learner.predict(episode, steps=1), lambda: learner.adapt(*_support(episode), steps=0)):
            with pytest.raises(ValueError, match="closed form and takes no inner steps"):
                call()
        return
    before, after = learner.predict(episode, steps=0), learner.predict(episode)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(learner.predict(episode, steps=learner.steps), after, rtol=EXACT, atol=EXACT)
    with pytest.raises(ValueError, match="steps=-1"):
        learner.predict(episode, steps=-1)


def test_a_trajectory_is_a_prediction_after_each_number_of_steps(learner: Learner, name: str, episode: Episode) -> None:
    points = range(1 if name in CLOSED_FORM else learner.steps + 1)
    for tasks in (episode, tuple(field[0] for field in episode)):
        wanted = torch.stack([learner.predict(tasks, steps=None if name in CLOSED_FORM else t) for t in points])
        found = learner.predict_trajectory(tasks)
        assert torch.equal(found, wanted)
        assert found.shape == (len(points), *tasks[3].shape, 3)
        assert all(not torch.allclose(a, b) for a, b in pairwise(found))
        with torch.no_grad():
            assert torch.equal(learner.predict_trajectory(tasks), wanted)
        parameters = list(learner.parameters())
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), parameters) for x in (found, wanted)), strict=True):
            torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    with pytest.raises(ValueError, match="closed form" if name in CLOSED_FORM else "steps=-1"):
        learner.predict_trajectory(episode, steps=-1)


@pytest.mark.parametrize(
    "adjoint",
    [Unrolled(), Unrolled(2), MixedMode(), FirstOrder(), Truncated(2), Implicit(), Identity()],
    ids=lambda adjoint: repr(adjoint).lower(),
)
def test_an_evaluation_of_the_trajectory_adapts_once_and_keeps_no_graph(adjoint: Adjoint, episode: Episode) -> None:
    calls = []

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return cross_entropy(prediction, target)

    learner, task = IMAML(network(), loss, SGD(0.4), 5, adjoint), tuple(field[0] for field in episode)
    with torch.no_grad():
        wanted = torch.stack([learner.predict(task, steps=t) for t in range(6)])
        anew, calls[:] = len(calls), []
        found = learner.predict_trajectory(task)
    assert torch.equal(found, wanted)
    assert not found.requires_grad
    assert 5 <= len(calls) <= 10  # a gradient a step, and what an adjoint looks at before it
    assert len(calls) < anew


def _support(episode: Episode) -> Episode:
    return episode[0][0], episode[1][0]


@pytest.mark.parametrize("name", ["metasgd", "maml++", "reptile", "cavia film", "protonet", "r2d2"])
def test_training_lowers_the_loss_on_new_tasks(learner: Learner) -> None:
    """Tasks: which of three directions belongs to which label is drawn anew."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.eye(3, 2, dtype=torch.float64) * 2 - 0.5

    def sample(tasks: int) -> Episode:
        order = torch.stack([torch.randperm(3, generator=generator) for _ in range(tasks)])
        y = torch.arange(15).repeat(tasks, 1) % 3
        noise = 0.3 * torch.randn(tasks, 15, 2, generator=generator, dtype=torch.float64)
        x = directions[order.gather(1, y)] + noise
        return x[:, :6], y[:, :6], x[:, 6:], y[:, 6:]

    def error() -> Tensor:
        with torch.no_grad():
            return cross_entropy(learner.predict(test).flatten(0, 1), test[3].flatten())

    test = sample(50)
    before, optimiser = error(), torch.optim.Adam(learner.parameters(), 0.02)
    for _ in range(60):
        optimiser.zero_grad()
        learner(sample(8)).backward()
        optimiser.step()
    assert error() < 0.8 * before


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: MetaSGD(lambda p, x: x @ p["w"], mse_loss, steps=2, **o),
        lambda **o: MAMLPlusPlus(lambda p, x: x @ p["w"], mse_loss, steps=2, **o),
        lambda **o: Reptile(lambda p, x: x @ p["w"], mse_loss, steps=2, **o),
        lambda **o: CAVIA(lambda p, x, c: x @ p["w"] + c, mse_loss, 1, **o),
        lambda **o: R2D2(lambda p, x: x @ p["w"], mse_loss, **o),
    ],
    ids=["metasgd", "maml++", "reptile", "cavia", "r2d2"],
)
@pytest.mark.parametrize("columns", [None, 1])
def test_pure_functions_and_regression(make: Callable[..., Learner], columns: int | None) -> None:
    """Targets (S,) or (S, 1); predictions have their layout."""
    column = () if columns is None else (columns,)
    features = (4,) if make(params={"w": torch.ones(2, 4)}).__class__ is R2D2 else column
    x, y = torch.randn(3, 9, 2, dtype=torch.float64), torch.randn(3, 9, *column, dtype=torch.float64)
    learner = make(params={"w": torch.randn(2, *features, dtype=torch.float64)})
    episode = (x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])
    loss = learner(episode, batched=True)
    loss.backward()
    assert learner.predict(episode, batched=True).shape == episode[3].shape
    assert all(p.grad is not None for p in learner.parameters())


def _a_class() -> Any:
    return SGD


BAD: list[tuple[Callable[[], Any], str]] = [
    (lambda: Reptile(network(), cross_entropy, SGD(0.1, learn_lr=True)), "learns rates, which Reptile gives no"),
    (lambda: Reptile(network(), cross_entropy, SGD([0.1, 0.2])), "no single rate give alpha="),
    (lambda: Reptile(network(), cross_entropy, alpha=0.0), r"alpha=0\.0"),
    (lambda: CAVIA(network(), cross_entropy, 0), "n_context=0"),
    (lambda: CAVIA(nn.Tanh(), cross_entropy, 2), "no parameters: CAVIA learns them"),
    (lambda: ProtoNet(network(), ways=0), "ways=0"),
    (lambda: R2D2(network(), cross_entropy, ridge=-1.0), r"ridge=-1\.0"),
    (lambda: MAMLPlusPlus(network(), cross_entropy, weights=[1.0]), "give 5 finite numbers"),
    (lambda: MAMLPlusPlus(network(), cross_entropy, steps=2, weights=[0, 0]), "not all 0"),
    (lambda: MAMLPlusPlus(network(), cross_entropy, steps=0), "steps=0: give at least 1"),
    (lambda: MAMLPlusPlus(network(), cross_entropy, multi_step_epochs=-1), "multi_step_epochs=-1"),
    (lambda: MAML(network(), cross_entropy, adjoint=Implicit()), "Use IMAML, whose proximal term"),
    (lambda: MAMLPlusPlus(network(), cross_entropy, SGD(0.1), adjoint=Identity(0.1)), "would have no gradient"),
    (lambda: IMAML(network(), cross_entropy, SGD(0.1, learn_lr=True)), "learns rates and adjoint=Implicit"),
    (lambda: MAML(network(), cross_entropy, _a_class()), r"inner=SGD is a class, .*: write SGD\(\.\.\.\)"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:24] for _, message in BAD])
def test_what_cannot_work_is_refused_at_construction(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_film_needs_a_linear_head() -> None:
    with pytest.raises(TypeError, match=r"FiLM needs an nn\.Linear"):
        FiLM(nn.Linear(2, 3), 4)


def test_what_a_context_does() -> None:
    x, context = torch.randn(5, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    model = network()
    plain, features, head = model(x), model.body(x), copy.deepcopy(model.head)
    film = FiLM(model, 4)
    torch.testing.assert_close(film(x, torch.zeros_like(context)), plain, rtol=EXACT, atol=EXACT)
    scale, shift = film.scale.weight @ context, film.shift.weight @ context
    torch.testing.assert_close(film(x, context), head((1 + scale) * features + shift), rtol=EXACT, atol=EXACT)
    wide = network(6)
    both = torch.cat([x, context.expand(5, 4)], 1)
    torch.testing.assert_close(ExtraInputs(wide)(x, context), wide(both), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", ["protonet", "r2d2"])
def test_labels_outside_the_ways_are_named(learner: Learner, episode: Episode) -> None:
    sx, sy, qx, qy = episode
    with pytest.raises(ValueError, match="labels 1 to 3: with ways=3 they are integers from 0 to 2"):
        learner((sx, sy + 1, qx, qy))
    with pytest.raises(ValueError, match="class labels are integers"):
        learner((sx, sy.double(), qx, qy.double()))


def test_a_prototype_needs_an_example(episode: Episode) -> None:
    sx, sy, qx, qy = episode
    missing = sy.clone()
    missing[2] = missing[2].clamp(max=1)
    with pytest.raises(ValueError, match="a class has no example"):
        LEARNERS["protonet"]()((sx, missing, qx, qy))
    LEARNERS["r2d2"]()((sx, missing, qx, qy))  # a ridge regressor needs none


def test_rates_of_one_tensor_for_all_are_refused() -> None:
    class OneRate(SGD):
        def hyper(self, params: Params) -> Hyper:
            return {"lr": torch.tensor(0.1)}

    with pytest.raises(TypeError, match="one tensor for 'lr'"):
        MAML(network(), cross_entropy, OneRate(0.1))
    assert MAML(network(), cross_entropy, SGD(0.1)).adjoint == Unrolled()


@pytest.mark.parametrize("name", sorted(CLOSED_FORM))
def test_autocast_leaves_the_loss_of_a_closed_form_in_float32(learner: Learner, episode: Episode) -> None:
    """`vmap` takes cross-entropy apart below autocast, so that logits of half precision would make a loss of 8 bits."""
    learner = learner.float()
    sx, sy, qx, qy = episode
    single = (sx.float(), sy, qx.float(), qy)
    exact = learner(single)
    with torch.autocast("cpu", torch.bfloat16):
        prediction, loss = learner.predict(single), learner(single)
    assert prediction.dtype is loss.dtype is torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)  # of the embedding's 8 bits
