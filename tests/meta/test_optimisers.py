"""Inner SGD against torch.optim.SGD, its derivative in the rates against central differences."""

import pytest
import torch

from theria.meta import SGD

PARITY = 1e-10  # float64, the same arithmetic in the same order over 50 steps
DIFFERENCE = 1e-7  # central differences, step 1e-6: truncation 1e-12 and rounding 1e-10 times the derivatives


def loss(params):
    w, b = params["w"], params["b"]
    return (w.sin() @ b).square().sum() + (w * w).mean() + b.cos().sum()


def start():
    return {"w": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(4, 2, dtype=torch.float64)}


@pytest.mark.parametrize("learn_lr", [False, True])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True), (0.5, True)])
def test_fifty_steps_equal_torch(momentum, nesterov, learn_lr):
    params = start()
    reference = {name: p.clone().requires_grad_() for name, p in params.items()}
    theirs = torch.optim.SGD(reference.values(), lr=0.02, momentum=momentum, nesterov=nesterov)
    ours = SGD(0.02, momentum=momentum, nesterov=nesterov, learn_lr=learn_lr)
    state, hyper = ours.init(params), ours.hyper(params)
    for _ in range(50):
        params, state = ours.update(torch.func.grad(loss)(params), state, params, hyper)
        theirs.zero_grad()
        loss(reference).backward()
        theirs.step()
    for name, p in reference.items():
        torch.testing.assert_close(params[name], p.detach(), rtol=PARITY, atol=PARITY)


def test_learned_rates_start_at_lr_with_one_for_each_entry():
    params = start()
    hyper = SGD(0.3, learn_lr=True).hyper(params)
    assert {name: tuple(r.shape) for name, r in hyper["lr"].items()} == {"w": (3, 4), "b": (4, 2)}
    assert all((r == 0.3).all() for r in hyper["lr"].values())
    assert SGD(0.3).hyper(params) == {}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_derivative_in_the_rates(momentum, nesterov):
    params, optimiser = start(), SGD(0.05, momentum=momentum, nesterov=nesterov, learn_lr=True)

    def final(hyper):
        p, state = params, optimiser.init(params)
        for _ in range(3):
            p, state = optimiser.update(torch.func.grad(loss)(p), state, p, hyper)
        return loss(p)

    hyper = optimiser.hyper(params)
    gradient = torch.func.grad(final)(hyper)["lr"]
    for name, rate in hyper["lr"].items():
        direction = torch.randn_like(rate)

        def along(step, name=name, rate=rate, direction=direction):
            return final({"lr": {**hyper["lr"], name: rate + step * direction}})

        difference = (along(1e-6) - along(-1e-6)) / 2e-6
        torch.testing.assert_close((gradient[name] * direction).sum(), difference, rtol=DIFFERENCE, atol=DIFFERENCE)


def test_a_scalar_rate_for_a_parameter_is_enough():
    params = start()
    hyper = {"lr": {"w": torch.tensor(0.1, dtype=torch.float64), "b": torch.tensor(0.2, dtype=torch.float64)}}
    optimiser = SGD(1.0)
    new, _ = optimiser.update(params, {}, params, hyper)
    torch.testing.assert_close(new["w"], 0.9 * params["w"], rtol=PARITY, atol=PARITY)
    torch.testing.assert_close(new["b"], 0.8 * params["b"], rtol=PARITY, atol=PARITY)


def test_inputs_are_not_mutated():
    params = start()
    before = {name: p.clone() for name, p in params.items()}
    optimiser = SGD(0.1, momentum=0.9)
    state = optimiser.init(params)
    optimiser.update(params, state, params, {})
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    assert all((buffer == 0).all() for buffer in state.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0}, "lr=0.0.*positive"),
        ({"lr": -1.0}, "lr=-1.0.*positive"),
        ({"lr": float("nan")}, "lr=nan.*finite"),
        ({"lr": float("inf")}, "lr=inf.*finite"),
        ({"lr": 0.1, "momentum": 1.0}, r"momentum=1.0 is outside \[0, 1\)"),
        ({"lr": 0.1, "nesterov": True}, "momentum > 0"),
    ],
)
def test_impossible_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SGD(**arguments)
