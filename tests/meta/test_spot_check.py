"""`spot_check` where differences are not to be trusted: kinks near the point and far from it, noise. All in float64."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from theria.data import Sinusoid
from theria.meta import MAML, SGD, FirstOrder, MixedMode
from theria.meta.adjoint import Adjoint
from theria.meta.certificate import SpotCheck, spot_check
from theria.nn import MLP

ZERO = torch.zeros((), dtype=torch.float64)


def check_maml(seed: int, adjoint: Adjoint) -> SpotCheck:
    """The gradient of this adjoint against the objective, a network of ReLUs."""
    torch.manual_seed(seed)
    model = MLP((1, 40, 40, 1)).double()
    episode = Sinusoid(shots=10, queries=10, tasks=3, seed=seed).sample(0)
    episode = type(episode)(*(t.double() for t in episode))

    def objective(p: dict[str, Tensor], adjoint: Adjoint = MixedMode()) -> Tensor:  # noqa: B008 (a frozen value)
        learner = MAML(model, torch.nn.functional.mse_loss, SGD(lr=0.01), steps=5, adjoint=adjoint)
        return functional_call(learner, p, (episode,))

    learner = MAML(model, torch.nn.functional.mse_loss)
    params = {name: p.detach() for name, p in learner.named_parameters()}
    return spot_check(objective, params, torch.func.grad(objective)(params, adjoint))


@pytest.mark.parametrize("seed", range(3))
def test_a_network_of_relus(seed: int) -> None:
    """The largest steps cross kinks, and are off by 1 % to 300 %."""
    right = check_maml(seed, MixedMode())
    assert right.ok, right
    assert right.conclusive, right
    assert max(right.uncertainty) < 1e-6
    wrong = check_maml(seed, FirstOrder())
    assert not wrong.ok, wrong
    assert wrong.conclusive, wrong


def test_kinks_anywhere_never_make_a_right_gradient_wrong() -> None:
    """Kinks from 1e-9 to 0.1 away on both sides: it agrees, or it cannot tell."""
    conclusive = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        away, sign, size = torch.rand(3, 6, dtype=torch.float64, generator=generator)
        kinks = torch.where(sign > 0.5, 1, -1) * 10 ** (-9 + 8 * away)

        def f(x: Tensor, kinks: Tensor = kinks, size: Tensor = size) -> Tensor:
            return x.exp() + (size * (x - kinks).relu()).sum()

        check = spot_check(f, ZERO, directions=1)
        assert check.ok or not check.conclusive, (seed, check)
        conclusive += check.conclusive
    assert conclusive > 30  # one in six has no kink within 1e-7


def test_a_kink_at_the_point_is_no_gradient() -> None:
    """Differences of all sizes agree: on the mean of two slopes."""
    check = spot_check(lambda x: 3 * x.relu(), ZERO, torch.ones_like(ZERO), directions=1)
    assert not check.conclusive
    assert "kinks such as those of ReLU" in check.advice


def test_noise_below_the_largest_step_is_seen_through() -> None:
    """A ripple of size 1e-9, as of an inner solution: the smallest steps are lost, the largest are not."""

    def f(x: Tensor) -> Tensor:
        return (2 * x).sin() + 1e-9 * (1e9 * x).sin().detach()

    right = spot_check(f, ZERO, torch.full_like(ZERO, 2.0), directions=1)
    assert right.ok, right
    assert right.conclusive, right
    wrong = spot_check(f, ZERO, torch.full_like(ZERO, 2.02), directions=1)
    assert not wrong.ok, wrong
    assert wrong.conclusive, wrong


def test_few_evaluations_where_all_agrees_at_once() -> None:
    calls = 0

    def f(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x.square().sum()

    spot_check(f, torch.ones(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64), directions=2)
    assert calls == 10


def test_nan_is_neither_right_nor_conclusive() -> None:
    check = spot_check(lambda x: x * float("nan"), ZERO, torch.ones_like(ZERO), directions=1)
    assert not check.ok
    assert not check.conclusive
