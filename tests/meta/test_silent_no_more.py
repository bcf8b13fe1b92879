"""What would be the derivative of another function is refused, or is the right one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import theria
from theria.meta import ANIL, IMAML, MAML, SGD, BilevelProblem, Implicit, MixedMode, Unrolled
from theria.meta.bilevel import AID, ITD

DECAYED = SGD(0.1, weight_decay=0.1)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def regression(seed: int = 0) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    return tuple(torch.randn(5, n, dtype=torch.float64) for n in (3, 1, 3, 1))


def test_an_implicit_derivative_refuses_weight_decay() -> None:
    model = nn.Linear(3, 1)
    for make in (IMAML, lambda *args, **options: MAML(*args, adjoint=Implicit(), **options)):
        with pytest.raises(ValueError, match="weight decay"):
            make(model, mean_square, DECAYED, steps=3)
    problem = BilevelProblem(lambda z, x: mean_square(z, x), lambda z, x: z.sum())
    x, z = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for method in (lambda: AID(DECAYED, 5), lambda: ITD(DECAYED, 5, Implicit())):
        with pytest.raises(ValueError, match="weight decay"):
            problem.hypergradient(x, z, method())


class Tied(nn.Module):
    """A stem whose weight is the head's, registered after it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False, dtype=torch.float64)
        self.stem = nn.Embedding(6, 4, dtype=torch.float64)
        self.stem.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.after_stem(self.stem(x))

    def after_stem(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(tokens.mean(-2)))


def test_a_stem_that_shares_its_weight_moves_with_it() -> None:
    torch.manual_seed(0)
    model, x, y = Tied(), torch.randint(0, 6, (6, 3)), torch.randint(0, 6, (6,))
    learner = MAML(model, F.cross_entropy, SGD(1.0), steps=3)
    (loss := learner((x, y, x, y), batched=False)).backward()

    start = model.head.weight.detach().clone().requires_grad_()
    w = start
    for _ in range(3):
        (g,) = torch.autograd.grad(F.cross_entropy(torch.tanh(w[x].mean(-2)) @ w.T, y), w, create_graph=True)
        w = w - g
    by_hand = F.cross_entropy(torch.tanh(w[x].mean(-2)) @ w.T, y)
    (truth,) = torch.autograd.grad(by_hand, start)
    grad = next(p.grad for p in learner.parameters() if p.grad is not None)
    assert torch.allclose(loss, by_hand, rtol=1e-12)
    assert torch.allclose(grad, truth, rtol=1e-9, atol=1e-12)


def test_the_head_is_all_of_the_head_where_it_is_tied() -> None:
    model = nn.Sequential()
    model.add_module("embed", nn.Linear(4, 6, bias=False))
    model.add_module("head", nn.Linear(4, 6))
    model.head.weight = model.embed.weight  # type: ignore[union-attr]
    assert set(ANIL(model, F.cross_entropy).adapted) == {"embed.weight", "head.bias"}


@pytest.mark.parametrize("adjoint", [MixedMode(), Unrolled(checkpoint_every=2)], ids=repr)
def test_a_mode_that_changes_before_the_backward_changes_no_gradient(adjoint: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double()
    episode, gradients = regression(), []
    for other in (Unrolled(), adjoint):
        learner = MAML(model, mean_square, SGD(0.5), 3, other)
        learner.eval()
        learner.zero_grad()
        loss = learner(episode, batched=False)
        learner.train()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("adjoint", [MixedMode(), Implicit()], ids=repr)
def test_a_tensor_written_before_the_backward_raises(adjoint: Any) -> None:
    A, c = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64, requires_grad=True)
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    w = adjoint.solve(lambda p, c: (A @ p["w"] - c).square().mean(), params, c, SGD(0.5), {}, 40)["w"]
    A.mul_(2)
    with pytest.raises(RuntimeError, match="written"):
        torch.autograd.grad(w.sum(), c)


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode(), Implicit()], ids=repr)
def test_a_loss_that_is_no_number_and_steps_that_are_no_count_are_refused(adjoint: Any) -> None:
    params, c = {"w": torch.zeros(3, dtype=torch.float64)}, torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="mean over the samples"):
        adjoint.solve(lambda p, c: (p["w"] - c).square(), params, c, SGD(0.1), {}, 2)
    with pytest.raises(ValueError, match="steps=-2"):
        adjoint.solve(lambda p, c: (p["w"] - c).square().sum(), params, c, SGD(0.1), {}, -2)


def test_positional_arguments_of_sgd_are_those_of_torch() -> None:
    ours = SGD(0.1, 0.9, 0.1, 0.01)
    assert (ours.momentum, ours.dampening, ours.weight_decay, ours.nesterov) == (0.9, 0.1, 0.01, False)


def test_a_product_with_a_number_keeps_the_dtype_of_a_tensor_without_dimension() -> None:
    x = torch.tensor(0.3)
    product = theria.hvp(lambda p: (0.5 * p["x"].exp() * p["z"].square().sum()), {"x": x, "z": torch.ones(2)},
                         {"x": torch.ones(()), "z": torch.ones(2)})  # fmt: skip
    assert {v.dtype for v in product.values()} == {torch.float32}
    # f = e^x |z|²/2: f_xx + f_xz·1 = e^x (1 + 2), f_zx + f_zz = e^x (1 + 1)
    assert torch.allclose(product["x"], 3 * x.exp())
    assert torch.allclose(product["z"], 2 * x.exp() * torch.ones(2))


MODES = "forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "f",
    [
        lambda K, y: y @ torch.cholesky_inverse(torch.linalg.cholesky(K)) @ y,
        lambda K, y: y @ torch.linalg.solve_ex(K, y)[0],
        lambda K, y: y @ torch.linalg.tensorsolve(K, y),
    ],
    ids=["cholesky_inverse", "solve_ex", "tensorsolve"],
)
def test_relatives_of_solve_have_the_second_derivative_of_the_inverse(f: Any, mode: str) -> None:
    torch.manual_seed(0)
    B, y, p, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 4), (4,), (2,), (2,)))

    def kernel(p: Tensor) -> Tensor:
        return B @ B.T * p[0].exp() + torch.eye(4, dtype=torch.float64) * p[1].exp()

    truth: Any = torch.autograd.functional.hvp(lambda p: y @ torch.linalg.inv(kernel(p)) @ y, p, v)[1]
    product = theria.hvp(lambda p: f(kernel(p), y), p, v, mode=mode)  # type: ignore[arg-type]
    assert torch.allclose(product, truth, rtol=1e-9)
