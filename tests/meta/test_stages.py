"""A stem that no inner step changes is evaluated once a task: the same loss and gradients as in each step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from theria.meta import (
    IMAML,
    MAML,
    SGD,
    CapturedStep,
    FirstOrder,
    Higher,
    MAMLPlusPlus,
    MixedMode,
    ProtoMAML,
    Truncated,
    UnicornMAML,
    Unrolled,
    compiled,
)
from theria.meta.fused import Fused
from theria.nn import ResidualNet, TransformerClassifier
from theria.testing import difference

WAYS, TASKS, STEPS = 3, 2, 3
SAME = 1e-10  # float64, the same sums in another order
PARTS = ["transformer", "head"]


class Whole(nn.Module):
    """The same network, which does not say that it has two stages; its parameters have the same names."""

    def __init__(self, network: TransformerClassifier) -> None:
        super().__init__()
        for name, part in network.named_children():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transformer(self.stem(x)).mean(-2))  # pyright: ignore[reportCallIssue]


def network(classes: int | None = WAYS, stem: str = "residual") -> TransformerClassifier:
    torch.manual_seed(0)
    made = TransformerClassifier(classes or 1, image_size=8, stem=stem, patch=4, d_model=8, n_heads=2, n_layers=1)
    nn.init.normal_(made.head.weight)  # from the start something depends on the stem
    if classes is None:
        made.head = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return made.double()


def episode() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x, q = (torch.rand(TASKS, n, 1, 8, 8, generator=generator, dtype=torch.float64) for n in (WAYS, 2 * WAYS))
    classes = torch.arange(WAYS)
    return x, classes.repeat(TASKS, 1), q, classes.repeat(TASKS, 2)


def maml(model: nn.Module, **options: Any) -> Any:
    return MAML(model, cross_entropy, SGD(0.3, learn_lr=True), STEPS, adapt=PARTS, **options)


LEARNERS: dict[str, Callable[[nn.Module], Any]] = {
    "unrolled": maml,
    "checkpoints": lambda model: maml(model, adjoint=Unrolled(checkpoint_every=2)),
    "mixed_mode": lambda model: maml(model, adjoint=MixedMode()),
    "truncated": lambda model: maml(model, adjoint=Truncated(2)),
    "higher": lambda model: maml(model, adjoint=Higher()),
    "first_order": lambda model: maml(model, adjoint=FirstOrder()),
    "maml_plus_plus": lambda model: MAMLPlusPlus(
        model, cross_entropy, None, STEPS, adapt=PARTS, first_order_epochs=0, multi_step_epochs=3
    ),
    "imaml": lambda model: IMAML(model, cross_entropy, SGD(0.1), 40, adapt="head", strength=5.0, tol=None),
    "proto_maml": lambda model: ProtoMAML(model, ways=WAYS, steps=STEPS, adapt=PARTS),
    "proto_maml of the head": lambda model: ProtoMAML(model, ways=WAYS, steps=STEPS),
    "unicorn_maml": lambda model: UnicornMAML(model, ways=WAYS, steps=STEPS, adapt=PARTS),
}


def gradients(learner: Any) -> list[Tensor]:
    loss = learner(episode())
    names = dict(learner.named_parameters())
    return [loss, *torch.autograd.grad(loss, [names[name] for name in sorted(names)], allow_unused=False)]


@pytest.mark.parametrize("name", LEARNERS)
def test_it_is_the_step_of_the_whole_network(name: str) -> None:
    if name == "higher":
        pytest.importorskip("higher")
    classes = None if name.startswith(("proto", "unicorn")) else WAYS
    staged, whole = LEARNERS[name](network(classes)), LEARNERS[name](Whole(network(classes)))
    assert sorted(n for n, _ in staged.named_parameters()) == sorted(n for n, _ in whole.named_parameters())
    found, wanted = gradients(staged), gradients(whole)
    assert difference(found, wanted) <= SAME
    assert difference([staged.predict(episode())], [whole.predict(episode())]) <= SAME
    stem = [i for i, n in enumerate(sorted(n for n, _ in staged.named_parameters())) if n.startswith("model.stem")]
    assert all(found[1 + i].abs().max() > 0 for i in stem)  # it is learned


@pytest.mark.parametrize(("adapt", "calls"), [(PARTS, 2), (["stem", "head"], STEPS + 1), (None, STEPS + 1)])
def test_how_often_the_stem_runs(adapt: Any, calls: int) -> None:
    """Once for the support and once for the queries; in each step where a step may change it."""
    model, seen = network(), []
    model.stem.register_forward_hook(lambda *_: seen.append(1))
    learner = MAML(model, cross_entropy, SGD(0.3), STEPS, adapt=adapt)
    learner(tuple(field[0] for field in episode()), batched=False)
    assert len(seen) == calls


@pytest.mark.parametrize("name", LEARNERS)
def test_the_trajectory_of_a_staged_network(name: str) -> None:
    """The figures of an adaptation for each number of steps; a fixed stem runs once for each set."""
    if name == "higher":
        pytest.importorskip("higher")
    model, seen = network(None if name.startswith(("proto", "unicorn")) else WAYS), []
    learner = LEARNERS[name](model)
    with torch.no_grad():
        wanted = torch.stack([learner.predict(episode(), steps=t) for t in range(learner.steps + 1)])
        model.stem.register_forward_hook(lambda *_: seen.append(1))
        found = learner.predict_trajectory(episode())
    assert torch.equal(found, wanted)
    assert not torch.allclose(found[0], found[-1])
    assert len(seen) == 2 * (1 if learner._vmappable else TASKS)


class Darker(TransformerClassifier):
    """More than its stages."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 2)


@pytest.mark.parametrize("how", ["subclass", "instance", "hook"])
def test_a_network_that_is_more_than_its_stages_is_called_whole(how: str) -> None:
    model, x = network(), episode()
    if how == "subclass":
        model.__class__ = Darker
    elif how == "instance":
        whole = model.forward
        model.forward = lambda x: whole(x / 2)
    else:
        model.register_forward_pre_hook(lambda _, given: (given[0] / 2,))
    found = gradients(maml(model))
    halved = maml(network())
    loss = halved((x[0] / 2, x[1], x[2] / 2, x[3]))
    names = dict(halved.named_parameters())
    wanted = [loss, *torch.autograd.grad(loss, [names[name] for name in sorted(names)])]
    assert difference(found, wanted) <= SAME


def test_a_stem_that_normalises_by_the_batch_does_so_once() -> None:
    def learner(wrap: Callable[[Any], nn.Module]) -> Any:
        made = network()
        made.stem.convolutions = ResidualNet(widths=[4, 4, 8], norm="batch").double()  # pyright: ignore
        return maml(wrap(made))

    torch.manual_seed(0)
    found = gradients(learner(lambda x: x))
    torch.manual_seed(0)
    assert difference(found, gradients(learner(Whole))) <= SAME


def test_in_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stem lies before the first cut; the pieces are not compiled here, but run as they were traced."""
    monkeypatch.setattr(compiled, "Fused", partial(Fused, compiler=lambda piece, _: piece))
    learner = maml(network(stem="patch"))
    wanted = gradients(learner)
    step = CapturedStep(learner, compile=True)
    loss = step(episode())
    names = dict(learner.named_parameters())
    assert difference([loss, *(names[n].grad for n in sorted(names))], wanted) <= SAME  # pyright: ignore
