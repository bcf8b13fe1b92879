"""What the inner loss reads that is not among its arguments is, in a derivative that runs it again, as it was."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from theria.meta import CAVIA, IMAML, MAML, SGD, ExtraInputs, Identity, Implicit, MixedMode, ProtoMAML, Unrolled
from theria.meta.adjoint import Adjoint
from theria.meta.outside import Outside

SAME = 1e-10  # float64, the same derivative in another order of sums
AGAIN: list[Adjoint] = [MixedMode(), MixedMode(checkpoint_every=2), Unrolled(checkpoint_every=2)]


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def episode() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, n, dtype=torch.float64, generator=generator) for n in (3, 1, 3, 1))


def network(*layers: nn.Module, last: int = 1) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), *layers, nn.Tanh(), nn.Linear(5, last)).double()


def gradient(learner: nn.Module, data: tuple[Tensor, ...], between: Any) -> list[Tensor]:
    torch.manual_seed(2)
    loss = learner(data, batched=False)
    between()
    loss.backward()
    return [p.grad for p in learner.parameters() if p.grad is not None]


# --- learners: right, whatever happens before the backward --------------------------------------------------------


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_that_of_the_forward_and_stays_what_it_is(adjoint: Adjoint, training: bool):
    def run(adjoint: Adjoint, changed: bool) -> list[Tensor]:
        net = network(nn.Dropout(0.5))
        learner = MAML(net, mean_square, SGD(0.3), 3, adjoint).train(training)
        found = gradient(learner, episode(), lambda: learner.train(training != changed))
        assert all(module.training == (training != changed) for module in net.modules())
        return found

    truth = run(Unrolled(), False)
    torch.testing.assert_close(run(adjoint, True), truth, rtol=SAME, atol=SAME)


LEARNERS = {
    "maml": lambda net, adjoint: MAML(net, mean_square, SGD(0.3), 3, adjoint, batch_norm="running"),
    "imaml": lambda net, adjoint: IMAML(net, mean_square, SGD(0.3), 3, adjoint, tol=None, batch_norm="running"),
    "cavia": lambda net, adjoint: CAVIA(ExtraInputs(net), mean_square, 1, SGD(0.3), 3, adjoint, batch_norm="running"),
    "proto": lambda net, adjoint: ProtoMAML(net, None, SGD(0.3), 3, adjoint, None, ways=2, batch_norm="running"),
}


@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
@pytest.mark.parametrize("kind", LEARNERS)
def test_running_averages_that_move_before_the_backward_change_nothing(kind: str, adjoint: Adjoint):
    x, y, q, z = episode()
    if kind == "proto":
        y = z = torch.arange(6) % 2
    data = (x[:, :2], y, q[:, :2], z) if kind == "cavia" else (x, y, q, z)

    def run(adjoint: Adjoint, moved: bool) -> list[Tensor]:
        net = network(nn.BatchNorm1d(5))
        return gradient(LEARNERS[kind](net, adjoint), data, lambda: net(x * 3 + 1) if moved else None)

    torch.testing.assert_close(run(adjoint, True), run(Unrolled(), False), rtol=SAME, atol=SAME)


# --- functions of the user's own: the mode is put back, other changes raise ---------------------------------------

NET = network(nn.Dropout(0.5)).eval()


def of_net(net: nn.Module, params: dict[str, Tensor], c: Tensor) -> Tensor:
    x, y, *_ = episode()
    return mean_square(functional_call(net, params, (c * x,)), y)


class Held:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def loss(self, params: dict[str, Tensor], c: Tensor) -> Tensor:
        return of_net(self.net, params, c)


def by_global(params: dict[str, Tensor], c: Tensor) -> Tensor:
    return (lambda: of_net(NET, params, c))()


WAYS = {
    "closure": lambda net: lambda params, c: of_net(net, params, c),
    "partial": lambda net: partial(of_net, net),
    "method": lambda net: Held(net).loss,
    "global": lambda net: by_global,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("adjoint", AGAIN, ids=repr)
def test_the_mode_of_a_module_that_a_function_holds(way: str, adjoint: Adjoint):
    def run(adjoint: Adjoint, changed: bool) -> Tensor:
        NET.eval()
        params = {name: p.detach() for name, p in NET.named_parameters()}
        c = torch.ones((), dtype=torch.float64, requires_grad=True)
        final = adjoint.solve(WAYS[way](NET), params, c, SGD(0.3), {}, 3)
        NET.train(changed)
        return torch.autograd.grad(final["0.weight"].sum(), c)[0]

    truth = run(Unrolled(), False)
    torch.testing.assert_close(run(adjoint, True), truth, rtol=SAME, atol=SAME)
    assert NET.training


A = torch.eye(2, dtype=torch.float64)  # `written` changes it and puts it back


def solved(adjoint: Adjoint, loss: Any, c: Tensor) -> Tensor:
    return adjoint.solve(loss, {"w": torch.zeros(2, dtype=torch.float64)}, c, SGD(0.5), {}, 4)["w"].sum()


def ones(**options: Any) -> Tensor:
    return torch.ones(2, dtype=torch.float64, **options)


@pytest.mark.parametrize("adjoint", [*AGAIN, Implicit(), Identity()], ids=repr)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_global_tensor_that_is_written_before_the_backward_raises(adjoint: Adjoint, mapped: bool):
    def of(c: Tensor) -> Tensor:
        return solved(adjoint, lambda p, c: (A @ p["w"] - c).square().sum(), c)

    c = ones(requires_grad=True)
    value = vmap(of)(torch.stack([c, 2 * c])).sum() if mapped else of(c)
    A.mul_(2)
    try:
        with pytest.raises(RuntimeError, match=r"a tensor \(2, 2\).*was written between.*clone\(\)"):
            value.backward()
    finally:
        A.mul_(0.5)
    exact = grad(lambda c: of(c))(ones())
    torch.testing.assert_close(exact.isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize("adjoint", [*AGAIN, Implicit()], ids=repr)
@pytest.mark.parametrize("change", ["moved", "replaced"])
def test_a_running_average_of_a_module_that_a_function_holds(adjoint: Adjoint, change: str):
    norm = nn.BatchNorm1d(2, affine=False).double().eval()
    x = episode()[0][:, :2]

    def loss(p: dict[str, Tensor], c: Tensor) -> Tensor:
        return (norm(x * p["w"]) - c).square().mean() + p["w"].square().sum()

    c = ones(requires_grad=True)
    value = solved(adjoint, loss, c)
    if change == "moved":  # the kernel writes the averages without counting a version
        norm.train()(x + 1)
        norm.eval()
    else:
        norm.running_mean = ones()
    with pytest.raises(RuntimeError, match=f"{'written' if change == 'moved' else 'replaced'} between"):
        value.backward()


@pytest.mark.parametrize("adjoint", [*AGAIN, Implicit()], ids=repr)
def test_what_the_loss_makes_itself_is_no_matter(adjoint: Adjoint):
    """A tensor of each evaluation, written there and kept until the next."""
    made: list[Tensor] = []

    def loss(p: dict[str, Tensor], c: Tensor) -> Tensor:
        scale = torch.ones(2, dtype=torch.float64)
        scale.mul_(2)
        made[:] = [scale]
        return (scale * p["w"] - c).square().sum() / 2

    c = ones(requires_grad=True)
    (g,) = torch.autograd.grad(solved(adjoint, loss, c), c)
    # w <- w - (4 w - 2 c) / 2 with w_0 = 0: w_1 = c, w_2 = 0, ..; the minimum is at c / 2
    torch.testing.assert_close(g, ones() / 2 if isinstance(adjoint, Implicit) else 0 * ones())


def test_a_tensor_without_a_version_is_not_known():
    with torch.inference_mode():
        B = torch.eye(2, dtype=torch.float64)
    c = ones(requires_grad=True)
    (g,) = torch.autograd.grad(solved(MixedMode(), lambda p, c: ((B.sum() / 2) * p["w"] - c).square().sum() / 2, c), c)
    torch.testing.assert_close(g, (1 - 0.5**4) * ones())


def test_nothing_is_kept_alive():
    x = torch.ones(3)
    outside = Outside()
    with outside.watched():
        x.sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="written"), outside.again():
        pass
    del x
    with outside.again():
        pass
