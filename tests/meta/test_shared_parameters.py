"""Parameters that modules share are adapted, or not, as the one tensor that they are: against loops by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theria.meta import ANIL, IMAML, MAML, SGD, MixedMode, ProtoMAML, Unrolled
from theria.meta.adjoint import Adjoint

SAME = 1e-10  # float64, the same derivative in another order of sums


class Tied(nn.Module):
    """Embedding and classifier share a weight, which is given as that of the one that is registered `first`."""

    def __init__(self, first: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        parts = {"stem": nn.Embedding(6, 4).double(), "head": nn.Linear(4, 6).double()}
        for name in sorted(parts, key=lambda name: name != first):
            self.add_module(name, parts[name])
        self.stem.weight = self.head.weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.after_stem(self.stem(x))  # type: ignore[operator]

    def after_stem(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(tokens.mean(-2)))  # type: ignore[operator]


def f(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(w[x].mean(-2)) @ w.T + b


def by_hand(start: tuple[Tensor, Tensor], moves: tuple[bool, bool], x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    """Loss and gradients in weight and bias after three steps of rate 1 in those that move."""
    leaves = [p.detach().clone().requires_grad_() for p in start]
    current: list[Tensor] = list(leaves)
    for _ in range(3):
        which = [i for i in (0, 1) if moves[i]]
        loss = F.cross_entropy(f(*current, x), y)  # type: ignore[misc]
        gradients = torch.autograd.grad(loss, [current[i] for i in which], create_graph=True)
        for i, g in zip(which, gradients, strict=True):
            current[i] = current[i] - g
    loss = F.cross_entropy(f(*current, x), y)  # type: ignore[misc]
    return loss.detach(), torch.autograd.grad(loss, leaves)


ADAPT: dict[str, tuple[Any, tuple[bool, bool]]] = {
    "all": (None, (True, True)),
    "head": ("head", (True, True)),
    "stem": ("stem", (True, False)),
    "second name": (["head.weight"], (True, False)),
    "bias": ("head.bias", (False, True)),
    "predicate": (lambda name: name.endswith("weight"), (True, False)),
}


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=repr)
@pytest.mark.parametrize("adapt", ADAPT)
@pytest.mark.parametrize("first", ["stem", "head"])
def test_maml_of_tied_weights_is_the_loop_by_hand(first: str, adapt: str, adjoint: Adjoint):
    model, (which, moves) = Tied(first), ADAPT[adapt]
    x, y = torch.randint(6, (8, 3)), torch.randint(6, (8,))
    learner = MAML(model, F.cross_entropy, SGD(1.0), 3, adjoint, which)
    weight, bias = f"{first}.weight", "head.bias"
    assert set(learner.adapted) == {name for name, move in zip((weight, bias), moves, strict=True) if move}
    start = model.get_parameter(weight), model.get_parameter(bias)
    loss, gradients = by_hand(start, moves, x, y)

    found = learner((x, y, x, y), batched=False)
    found.backward()
    torch.testing.assert_close(found.detach(), loss, rtol=SAME, atol=SAME)
    torch.testing.assert_close([p.grad for p in start], list(gradients), rtol=SAME, atol=SAME)
    # of parameters that are not the module's own tensors
    away = {name: p.detach() + 0.1 for name, p in learner.named_parameters()}
    loss, gradients = by_hand((away[f"model.{weight}"], away[f"model.{bias}"]), moves, x, y)
    pure = torch.func.grad(learner.outer_loss)(away, (x, y, x, y), batched=False)
    expected = {f"model.{weight}": gradients[0], f"model.{bias}": gradients[1]}
    torch.testing.assert_close(pure, expected, rtol=SAME, atol=SAME)
    assert learner.predict_trajectory((x, y, x, y), batched=False)[3].shape == (8, 6)


def test_imaml_of_tied_weights_pulls_the_shared_one():
    """One step from theta, where the pull is zero, of rate r: phi = theta - r grad of the support loss."""
    model, x, y = Tied("head"), torch.randint(6, (8, 3)), torch.randint(6, (8,))
    learner = IMAML(model, F.cross_entropy, SGD(1.0), 1, Unrolled(), tol=None)
    adapted = learner.adapt(x, y)
    w, b = model.head.weight, model.head.bias  # type: ignore[union-attr]
    g, _ = torch.autograd.grad(F.cross_entropy(f(w, b, x), y), (w, b))  # type: ignore[arg-type]
    torch.testing.assert_close(adapted["head.weight"], w - g, rtol=SAME, atol=SAME)


def test_a_predicate_answers_alike_for_all_names_of_a_parameter():
    with pytest.raises(ValueError, match=r"adapt is false for 'stem.weight' and true for another name"):
        MAML(Tied("head"), F.cross_entropy, adapt=lambda name: name.startswith("head"))
    with pytest.raises(ValueError, match=r"adapt is false for 'head.weight'.*first is 'stem.weight'"):
        MAML(Tied("stem"), F.cross_entropy, adapt=lambda name: name.startswith("stem"))


def test_a_frozen_shared_parameter_is_not_adapted():
    model = Tied("stem")
    model.get_parameter("stem.weight").requires_grad_(False)
    assert MAML(model, F.cross_entropy).adapted == ["head.bias"]
    assert ANIL(model, F.cross_entropy).adapted == ["stem.weight", "head.bias"]  # by name, as without sharing


@pytest.mark.parametrize("adapt", ["head", None])
def test_a_tied_head_of_an_embedding_is_none_that_is_made_anew(adapt: Any):
    make: Callable[[], Any] = lambda: ProtoMAML(Tied("stem"), ways=2, adapt=adapt)  # noqa: E731
    with pytest.raises(ValueError, match="names that the classifier made for each task needs"):
        make()
