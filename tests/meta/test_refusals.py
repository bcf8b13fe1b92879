"""What would be a wrong number, or an error from inside PyTorch, is refused in words that say what to do."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theria.meta import (
    AID,
    ANIL,
    FOMAML,
    IMAML,
    ITD,
    MAML,
    SGD,
    Adam,
    AdamW,
    BilevelProblem,
    FirstOrder,
    Higher,
    Identity,
    Implicit,
    Lion,
    MAMLPlusPlus,
    MetaSGD,
    MixedMode,
    RMSprop,
    Truncated,
    Unrolled,
)
from theria.meta.adjoint import Adjoint
from theria.nn import MLP, DeepEquilibrium

# --- a minimum of another function than the loss ------------------------------------------------------------------

SAME = 1e-10  # float64, the same derivative in another order of sums
DECAYED = [f(0.1, weight_decay=0.1) for f in (SGD, Adam, AdamW, RMSprop, Lion)]
X = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.3]], dtype=torch.float64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def inner(z: Tensor, x: Any) -> Tensor:
    return 0.5 * (X @ z - B * (x["b"] if isinstance(x, dict) else x)).square().mean()


RIDGE = BilevelProblem(inner, lambda z, x: z.sum())
START = torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize("optimiser", DECAYED, ids=lambda o: type(o).__name__)
def test_an_implicit_derivative_of_decayed_steps_is_refused_before_any_step(optimiser: Any):
    def never(*_: Any) -> Tensor:
        raise AssertionError("a step was taken")

    for adjoint in (Implicit(), Identity()):
        with pytest.raises(ValueError, match=r"weight decay.*loss \+ 0\.5 \* weight_decay \* \|theta\|\^2"):
            adjoint.solve(never, {"z": START}, None, optimiser, {}, 3)
        with pytest.raises(ValueError, match=f"weight decay.*{type(adjoint).__name__}"):
            ITD(optimiser, 3, adjoint)
        for make in (MAML, MAMLPlusPlus, IMAML):
            with pytest.raises(ValueError, match="weight decay"):
                make(MLP((1, 4, 1)), F.mse_loss, optimiser, 3, adjoint, "head")
    with pytest.raises(ValueError, match=r"weight decay.*AID"):
        AID(optimiser, 3)


def test_a_decay_that_is_given_beside_the_optimiser_is_refused():
    method = ITD(SGD(0.3), 3, Implicit(), hyper=lambda x: {"weight_decay": torch.tensor(0.5)})
    with pytest.raises(ValueError, match="hyper gives a weight decay"):
        RIDGE.hypergradient(torch.tensor(1.3), START, method)


def test_the_decay_in_the_loss_has_the_derivative_that_the_message_promises():
    x, decay = torch.tensor(1.3, dtype=torch.float64), 0.5
    problem = BilevelProblem(lambda z, x: inner(z, x) + 0.5 * decay * z.square().sum(), lambda z, x: z.sum())
    exact = torch.linalg.solve(X.T @ X / 3 + decay * torch.eye(2, dtype=torch.float64), X.T @ B / 3).sum()
    for method in (AID(SGD(0.3), 400), ITD(SGD(0.3), 400, Implicit())):
        gradient = problem.hypergradient(x, START, method).gradient
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=0)  # CG's tolerance
    steps = RIDGE.hypergradient(x, START, ITD(SGD(0.3, weight_decay=decay), 400)).gradient
    torch.testing.assert_close(steps, exact, rtol=SAME, atol=0)  # the steps are the same; they keep their decay


@pytest.mark.parametrize("adjoint", [Implicit(), Identity()], ids=repr)
def test_itd_refuses_a_derivative_of_the_path_to_a_minimum(adjoint: Adjoint):
    x = {"b": torch.tensor(1.3, dtype=torch.float64), "lr": torch.tensor(0.2, dtype=torch.float64)}
    learned = ITD(SGD(0.1), 10, adjoint, hyper=lambda x: {"lr": x["lr"]})
    with pytest.raises(ValueError, match=r"what hyper gives the optimiser is being differentiated.*detach"):
        RIDGE.hypergradient(x, START, learned)
    plain = ITD(SGD(0.1), 10, adjoint)
    with pytest.raises(ValueError, match="the start of the inner steps is being differentiated"):
        torch.func.grad(lambda z: RIDGE.evaluate(x, z, plain).value)(START)
    with pytest.raises(ValueError, match="the start of the inner steps"):
        RIDGE.evaluate(x, START.clone().requires_grad_(), plain)
    # Where no derivative of them is asked for
    given = ITD(SGD(0.1), 10, adjoint, hyper=lambda x: {"lr": x["lr"].detach()})
    expected = RIDGE.hypergradient(x, START, ITD(SGD(0.2), 10, adjoint)).gradient["b"]
    torch.testing.assert_close(RIDGE.hypergradient(x, START, given).gradient["b"], expected, rtol=SAME, atol=0)
    with torch.no_grad():
        assert RIDGE.evaluate(x, START.clone().requires_grad_(), learned).value.isfinite()


# --- arguments ----------------------------------------------------------------------------------------------------

ADJOINTS = [Unrolled(), Unrolled(1), MixedMode(), FirstOrder(), Truncated(1), Implicit(), Identity(), Higher()]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_every_adjoint_checks_its_loss_and_its_steps(adjoint: Adjoint):
    def solve(loss: Any, steps: Any) -> Any:
        return adjoint.solve(loss, {"w": START}, 1.0, SGD(0.1), {}, steps)

    def scalar(p: Any, c: float) -> Tensor:
        return (p["w"] - c).square().sum()

    with pytest.raises(ValueError, match=r"inner_loss returned shape \(2,\), torch.float64: .* mean over the samples"):
        solve(lambda p, c: (p["w"] - c).square(), 2)
    with pytest.raises(TypeError, match="inner_loss returned a float: return a scalar tensor"):
        solve(lambda p, c: 1.0, 2)
    with pytest.raises(ValueError, match="steps=-2: give at least 0 inner steps"):
        solve(scalar, -2)
    for steps in (2.0, True):
        with pytest.raises(TypeError, match=f"steps={steps!r} is a {type(steps).__name__}"):
            solve(scalar, steps)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (SGD, torch.optim.SGD),
        (Adam, torch.optim.Adam),
        (AdamW, torch.optim.AdamW),
        (RMSprop, torch.optim.RMSprop),
        (Lion, None),
    ],
)
def test_positional_arguments_are_those_of_torch(ours: Any, torchs: Any):
    def positional(function: Any) -> list[str]:
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    expected = ["lr", "betas", "weight_decay"] if torchs is None else positional(torchs)[1:]  # the first has parameters
    names = positional(ours)
    assert names == expected[: len(names)]
    with pytest.raises(TypeError, match="positional"):
        ours(*[0.1] * len(names), True)


def test_relatives_of_maml_take_its_positional_arguments():
    model, inner = MLP((1, 4, 1)), SGD(0.1)
    assert (FOMAML(model, F.mse_loss, inner, 5).steps, FOMAML(model, F.mse_loss).steps) == (5, 1)
    assert FOMAML(model, F.mse_loss, inner, 5).adjoint == FirstOrder()
    anil = ANIL(model, F.mse_loss, inner, 5, MixedMode())
    assert (anil.steps, anil.adjoint, anil.adapted) == (5, MixedMode(), ["head.weight", "head.bias"])
    learner = MetaSGD(model, F.mse_loss, 0.2, 5, MixedMode(), "head")
    assert (learner.steps, learner.adjoint, learner.adapted) == (5, MixedMode(), ["head.weight", "head.bias"])
    assert learner.inner == SGD(0.2, learn_lr=True) == MetaSGD(model, F.mse_loss, lr=0.2).inner
    with pytest.raises(TypeError, match="lr=SGD"):
        MetaSGD(model, F.mse_loss, inner, 5)  # type: ignore[arg-type]


# --- episodes -----------------------------------------------------------------------------------------------------


def images(s: int, q: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 1, 4, 4, generator=generator) for n in (s, s, q, q))


def test_images_for_targets_are_one_task_or_several_by_word():
    learner = MAML(nn.Conv2d(1, 1, 3, padding=1), F.mse_loss, SGD(0.5), steps=2)
    for call in (learner, learner.predict, learner.predict_trajectory):
        with pytest.raises(ValueError, match=r"are those of 5 tasks with 1 samples each, and of one task with 5 sam"):
            call(images(5, 5))
    one = learner(images(5, 5), batched=False)
    assert not torch.equal(one, learner(images(5, 5), batched=True))
    assert learner(images(5, 4)).isfinite()  # one reading alone
    tasks = tuple(x[None] for x in images(5, 5))
    torch.testing.assert_close(learner(tasks, batched=True), one)


# --- what PyTorch cannot do ---------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.head = getattr(nn, kind)(3, 4, batch_first=True), nn.Linear(4, 1)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1]) * self.scale


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=repr)
def test_a_fused_recurrent_layer_says_what_to_do_with_several_tasks(kind: str, dtype: torch.dtype, adjoint: Adjoint):
    torch.manual_seed(0)
    learner = MAML(Recurrent(kind).to(dtype), F.mse_loss, SGD(0.1), 2, adjoint)
    tasks = tuple(torch.randn(2, 5, *shape, dtype=dtype) for shape in ((6, 3), (1,), (6, 3), (1,)))
    with pytest.raises(RuntimeError, match=f"nn.{kind}.*batched=False.*nn.Linear"):
        learner(tasks, batched=True)
    one_by_one = zip(*(x.double() for x in tasks), strict=True)
    torch.stack([learner.double()(task, batched=False) for task in one_by_one]).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        nn.init.eye_(self.a.weight).data.mul_(0.3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.a(z) + self.b(x))


def test_an_implicit_model_is_not_recomputed_for_several_tasks():
    torch.manual_seed(0)
    model = nn.Sequential(DeepEquilibrium(Block()), nn.Linear(3, 1))
    tasks = tuple(torch.randn(2, 5, n) for n in (3, 1, 3, 1))
    loss = MAML(model, F.mse_loss, SGD(0.3), 2, Unrolled(checkpoint_every=1))(tasks)
    with pytest.raises(NotImplementedError, match=r"implicit derivative.*MixedMode\(\)"):
        loss.backward()
