"""A compiled step is the step: the same loss and gradients, from fewer pieces, or an error."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import cross_entropy

from theria.meta import ANIL, MAML, SGD, CapturedStep, FirstOrder, MixedMode, Unrolled, compiled
from theria.meta.cavia import CAVIA, FiLM
from theria.meta.cuts import cut
from theria.meta.fused import Fused
from theria.meta.imaml import IMAML
from theria.meta.implicit import Inexact
from theria.meta.implicit_adjoint import Implicit
from theria.meta.optimisers import Adam
from theria.meta.protonet import ProtoNet
from theria.meta.r2d2 import R2D2
from theria.meta.solvers import CG
from theria.meta.truncated import Truncated
from theria.meta.unicorn_maml import UnicornMAML
from theria.nn import MLP, TransformerClassifier
from theria.ops.precision import convolution_precision
from theria.testing import difference

# The same operations of float64, without those of autograd between them.
SAME = 1e-13
# float32, its operations fused by a compiler: roundings of 6e-8 in another order.
ROUNDING = 2e-6
WAYS = 3


def as_traced(piece: fx.GraphModule, inputs: Any) -> Any:
    """In the place of a compiler: the piece, operation for operation."""
    return piece


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces run as they were traced, which takes no minute of compiling."""
    monkeypatch.setattr(compiled, "Fused", partial(Fused, compiler=as_traced))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Fused]:
    """Every step that is compiled from here on; pieces run as they were traced."""
    steps: list[Fused] = []

    def remember(*args: Any) -> Fused:
        steps.append(Fused(*args, compiler=as_traced))
        return steps[-1]

    monkeypatch.setattr(compiled, "Fused", remember)
    return steps


def attention(backend: str) -> nn.Module:
    return TransformerClassifier(WAYS, image_size=8, patch=4, d_model=8, n_heads=2, n_layers=1, backend=backend)


def transformer() -> nn.Module:
    """With attention by the formulas, which are few operations to trace."""
    return attention("reference")


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(-3), MLP([64, 8, WAYS], activation=nn.Tanh))


def embedding() -> nn.Module:
    return nn.Sequential(nn.Flatten(-3), MLP([64, 8, 6], activation=nn.Tanh))


# Nothing in a step waits for what a solver has reached.
FIVE_ITERATIONS = Implicit(Inexact(CG(max_iterations=5, check_every=None)), throw=False)
LEARNERS = {
    "unrolled": lambda: MAML(transformer(), cross_entropy, SGD(0.1), 2, Unrolled()),
    "custom": lambda: MAML(attention("custom"), cross_entropy, SGD(0.1), 1, Unrolled()),
    "mixed mode": lambda: MAML(transformer(), cross_entropy, SGD(0.1), 1, MixedMode()),
    "momentum": lambda: MAML(perceptron(), cross_entropy, SGD(0.1, momentum=0.9), 3, MixedMode()),
    "checkpoints": lambda: MAML(perceptron(), cross_entropy, SGD(0.1), 4, Unrolled(checkpoint_every=2)),
    "adam": lambda: MAML(perceptron(), cross_entropy, Adam(0.01), 3, Unrolled()),
    "learned rates": lambda: MAML(perceptron(), cross_entropy, SGD(0.1, learn_lr=True), 2, Unrolled()),
    "first order": lambda: MAML(perceptron(), cross_entropy, SGD(0.1), 2, FirstOrder()),
    "truncated": lambda: MAML(perceptron(), cross_entropy, SGD(0.1), 3, Truncated(1)),
    "chunks of tasks": lambda: MAML(perceptron(), cross_entropy, SGD(0.1), 2, Unrolled(), chunk_size=2),
    "anil": lambda: ANIL(transformer(), cross_entropy, SGD(0.1), steps=2, adjoint=Unrolled()),
    "cavia": lambda: CAVIA(FiLM(transformer(), 4), cross_entropy, 4, SGD(0.1), steps=2, adjoint=Unrolled()),
    "implicit": lambda: IMAML(perceptron(), cross_entropy, SGD(0.1), 3, FIVE_ITERATIONS, tol=1.0),
    "protonet": lambda: ProtoNet(embedding(), cross_entropy, ways=WAYS),
    "r2d2": lambda: R2D2(embedding(), cross_entropy, ways=WAYS),
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return LEARNERS[name]().double()


def episode(seed: int, tasks: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, tasks, 2 * WAYS, 1, 8, 8, generator=generator, dtype=dtype)
    y = torch.arange(WAYS).repeat(tasks, 2)
    return x[0], y, x[1], y


def eager(learner: Any, given: tuple[Tensor, ...]) -> list[Tensor]:
    """Loss and gradients of the learner itself, without touching `.grad`."""
    loss = learner(given)
    wanted = [p for p in learner.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [loss.detach(), *(g for g in grads if g is not None)]


def by(step: CapturedStep, given: tuple[Tensor, ...]) -> list[Tensor]:
    loss = step(given)
    return [loss, *(p.grad for p in step.parameters if p.grad is not None)]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", LEARNERS)
def test_loss_and_gradients_are_those_of_the_learner(name: str) -> None:
    learner = make(name)
    step = CapturedStep(learner, compile=True)
    for seed in range(2):
        assert difference(by(step, episode(seed)), eager(learner, episode(seed))) <= SAME
        with torch.no_grad():  # what an optimiser does between two steps
            for p in learner.parameters():
                p.sub_(0.1 * p.sign())


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=lambda x: type(x).__name__)
def test_inner_steps_share_their_pieces(adjoint: Any, made: list[Fused]) -> None:
    for steps in (3, 5):
        learner = MAML(perceptron().double(), cross_entropy, SGD(0.1), steps, adjoint)
        CapturedStep(learner, compile=True)(episode(0))
    few, many = made
    assert len(few.pieces) == len(many.pieces) == 5  # first step, others, outer loss and last one back, others, first
    assert len(many.program) - len(few.program) == 2 * 2
    assert max(sum(step.piece == piece for step in many.program) for piece in range(5)) == 4


@pytest.mark.usefixtures("uncompiled")
def test_what_has_no_gradient_stays_without() -> None:
    learner = make("anil")
    learner.model.stem.position.requires_grad_(False)
    learner.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    step = CapturedStep(learner, compile=True)
    assert difference(by(step, episode(0)), eager(learner, episode(0))) <= SAME
    assert learner.idle.grad is learner.model.stem.position.grad is None
    learner.model.stem.position.requires_grad_(True)
    assert difference(by(step, episode(0)), eager(learner, episode(0))) <= SAME
    assert learner.model.stem.position.grad is not None


@pytest.mark.usefixtures("uncompiled")
def test_numbers_of_the_learner_that_change_are_followed() -> None:
    learner = UnicornMAML(embedding().double(), None, SGD(0.1), 2, MixedMode(), ways=WAYS)
    step = CapturedStep(learner, compile=True)
    for ways, steps in ((WAYS, 2), (WAYS + 1, 2), (WAYS, 3), (WAYS, 2)):
        learner.ways, learner.steps = ways, steps
        sx, sy, qx, qy = episode(0)
        given = (sx, torch.arange(sy.shape[1]).remainder(ways).expand_as(sy).contiguous(), qx, qy)
        assert difference(by(step, given), eager(learner, given)) <= SAME


class Smooth(nn.Module):
    """An activation with a number, and an object with one."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = 1.0, SimpleNamespace(by=0.0, also=[0.0])

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.slope * x + self.shift.by + self.shift.also[0])


@pytest.mark.usefixtures("uncompiled")
def test_whatever_is_replaced_in_a_learner_is_followed() -> None:
    smooth = Smooth()
    model = nn.Sequential(nn.Flatten(-3), nn.Linear(64, 8), smooth, nn.Linear(8, WAYS)).double()
    learner = MAML(model, cross_entropy, SGD(0.1), 2, Unrolled())
    step = CapturedStep(learner, compile=True)

    def change(what: str) -> None:
        match what:
            case "optimiser":
                learner.inner = SGD(0.3)
            case "adjoint":
                learner.adjoint = FirstOrder()
            case "loss":
                learner.loss_fn = partial(cross_entropy, label_smoothing=0.2)
            case "number of a module":
                smooth.slope = 2.0
            case "number of an object":
                smooth.shift.by = 0.5
            case "object":
                smooth.shift = SimpleNamespace(by=0.5, also=[0.25])
            case "module":
                model[2] = nn.Sigmoid()

    last = None
    kinds = ("", "optimiser", "adjoint", "loss", "number of a module", "number of an object", "object", "module")
    for what in kinds:
        change(what)
        found = by(step, episode(0))
        assert difference(found, eager(learner, episode(0))) <= SAME, what
        assert last is None or difference(found, last) > 1e-4, what  # the change is one
        last = [x.clone() for x in found]


@pytest.mark.parametrize("name", LEARNERS)
def test_nothing_new_is_compiled_once(name: str, made: list[Fused]) -> None:
    """An evaluation between two steps, and an optimiser of the same values in the place of another, are nothing new."""
    learner = make(name)
    step = CapturedStep(learner, compile=True)
    for seed in range(3):
        step(episode(seed))
        learner.eval()
        learner.predict(episode(seed))
        learner.train()
        if hasattr(learner, "inner"):
            learner.inner = replace(learner.inner)
    assert len(made) == 1


def test_a_learner_that_counts_its_runs_is_compiled_once(made: list[Fused]) -> None:
    class Counting(ProtoNet):
        runs = 0

        def forward(self, *given: Any, **options: Any) -> Tensor:
            self.runs += 1
            return super().forward(*given, **options)

    step = CapturedStep(Counting(embedding().double(), ways=WAYS), compile=True)
    for seed in range(3):
        step(episode(seed))
    assert len(made) == 1


@pytest.mark.usefixtures("uncompiled")
def test_other_shapes_and_what_lies_outside_of_the_learner_are_followed() -> None:
    weight = torch.ones(WAYS, dtype=torch.float64)
    learner = MAML(perceptron().double(), partial(cross_entropy, weight=weight), SGD(0.1), 2, Unrolled())
    step = CapturedStep(learner, compile=True)
    for tasks, scale in ((2, 1.0), (3, 2.0), (2, 3.0)):
        weight[0] = scale
        assert difference(by(step, episode(0, tasks)), eager(learner, episode(0, tasks))) <= SAME


@pytest.mark.usefixtures("uncompiled")
def test_mixed_precision_of_the_step_and_of_its_caller() -> None:
    learner = make("protonet").float()
    given = episode(0, dtype=torch.float32)

    def in_bfloat16(function: Any) -> Any:
        # with its cache, gradients of support and query set would meet in bfloat16
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return function(given)

    loss = in_bfloat16(learner)
    wanted = [loss.detach(), *torch.autograd.grad(loss, list(learner.parameters()))]
    assert difference(wanted, eager(learner, given)) > 1e-4  # it is another precision
    mixed, plain = CapturedStep(learner, compile=True, autocast=torch.bfloat16), CapturedStep(learner, compile=True)
    assert difference(by(mixed, given), wanted) <= ROUNDING
    assert difference(by(plain, given), eager(learner, given)) <= ROUNDING
    assert difference(in_bfloat16(partial(by, plain)), wanted) <= ROUNDING
    assert difference(by(CapturedStep(learner, autocast=torch.bfloat16), given), wanted) <= ROUNDING
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in learner.parameters())


@pytest.mark.usefixtures("uncompiled")
def test_a_step_that_draws_random_numbers_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(-3), nn.Dropout(0.5), nn.Linear(64, WAYS)).double()
    learner = MAML(model, cross_entropy, SGD(0.1), 2, Unrolled(), randomness="different")
    with pytest.raises(ValueError, match="draws random numbers"):
        CapturedStep(learner, compile=True)(episode(0))


def test_a_branch_on_a_value_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"looks at the value of a tensor.*compile=False"):
        Fused(lambda tensors: [tensors[0] if tensors[0].sum() > 0 else -tensors[0]], [torch.ones(2)])


@pytest.mark.usefixtures("uncompiled")
def test_a_parameter_of_something_else_is_refused() -> None:
    other = nn.Parameter(torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="not the learner's"):
        CapturedStep(make("protonet"), [other], compile=True)(episode(0))


def test_a_compiler_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(piece: fx.GraphModule, inputs: Any) -> Any:
        return lambda *xs: [1.01 * x if x.is_floating_point() else x for x in piece(*xs)]

    monkeypatch.setattr(compiled, "Fused", partial(Fused, compiler=wrong))
    with pytest.raises(ArithmeticError, match="differs from the step itself"):
        CapturedStep(make("adam"), compile=True)(episode(0))


@pytest.mark.parametrize(
    ("dtype", "device", "precision", "convolves", "like"),
    [
        (torch.float32, "cuda", "highest", False, torch.float32),
        (torch.float32, "cuda", "high", False, torch.float16),
        (torch.float32, "cuda", "highest", True, torch.float16),  # convolutions have a setting of their own
        (torch.float32, "cpu", "high", True, torch.float32),
        (torch.float64, "cuda", "high", True, torch.float64),
        (torch.bfloat16, "cuda", "high", True, torch.bfloat16),
    ],
)
def test_what_counts_as_rounding_where_float32_is_computed_in_tf32(
    dtype: torch.dtype, device: str, precision: str, convolves: bool, like: torch.dtype
) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert compiled.same({dtype}, torch.device(device), convolves) == compiled.SAME[like]
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_precision_of_convolutions_by_either_of_its_names() -> None:
    settings = torch.backends.cudnn
    assert convolution_precision() == "high"  # PyTorch's default, whatever products are computed in
    try:
        settings.allow_tf32 = False
        assert convolution_precision() == "highest"
        settings.allow_tf32 = True
        settings.conv.fp32_precision = "ieee"  # pyright: ignore[reportAttributeAccessIssue]
        assert convolution_precision() == "highest"  # where the older name refuses to tell
    finally:
        settings.conv.fp32_precision = "tf32"  # pyright: ignore[reportAttributeAccessIssue]
        settings.allow_tf32 = True


def test_a_step_knows_whether_it_convolves() -> None:
    image, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    assert Fused(lambda xs: [torch.nn.functional.conv2d(xs[0], xs[1])], [image, weight], compiler=as_traced).convolves
    assert not Fused(lambda xs: [xs[0] * xs[1].sum()], [image, weight], compiler=as_traced).convolves


def test_a_loss_that_is_not_finite_is_passed_on_and_the_next_one_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(piece: fx.GraphModule, inputs: Any) -> Any:
        return lambda *xs: [1.01 * x if x.is_floating_point() else x for x in piece(*xs)]

    monkeypatch.setattr(compiled, "Fused", partial(Fused, compiler=wrong))
    step = CapturedStep(make("protonet"), compile=True)
    sx, *rest = episode(0)
    assert step((sx * float("nan"), *rest)).isnan()
    with pytest.raises(ArithmeticError):
        step((sx, *rest))


def test_operations_in_place_may_lie_on_both_sides_of_a_cut() -> None:
    def function(tensors: list[Tensor]) -> list[Tensor]:
        x = tensors[0] * 2
        view = x[0]
        cut()
        view.add_(1)
        cut()
        x.mul_(3)
        return [x, view.clone()]

    given = torch.arange(6.0).view(2, 3)
    fused = Fused(function, [given], compiler=as_traced)
    assert len(fused.program) == 3
    for x in (given, given + 5):
        expected = torch.stack([3 * (2 * x[0] + 1), 6 * x[1]])
        whole, part = fused([x])
        assert torch.equal(whole, expected)
        assert torch.equal(part, expected[0])


def test_by_pytorchs_compiler() -> None:
    """float32, and the episode after the one that it was compiled for."""
    torch.manual_seed(0)
    learner = MAML(nn.Sequential(nn.Flatten(-3), nn.Linear(64, WAYS)), cross_entropy, SGD(0.1), 3, Unrolled())
    step = CapturedStep(learner, compile=True)
    for seed in range(2):
        given = episode(seed, dtype=torch.float32)
        assert difference(by(step, given), eager(learner, given)) <= ROUNDING


def test_learned_rates_of_each_step_by_pytorchs_compiler() -> None:
    """A rate that is taken by its number has a derivative that scatters, which the compiler adds twice on a CPU."""
    torch.manual_seed(0)
    inner = SGD([0.3, 0.2], learn_lr="tensor")
    learner = MAML(nn.Sequential(nn.Flatten(-3), nn.Linear(64, WAYS)), cross_entropy, inner, 2, MixedMode()).double()
    given = episode(0)
    assert difference(by(CapturedStep(learner, compile=True), given), eager(learner, given)) <= SAME
