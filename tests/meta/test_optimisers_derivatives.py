"""Derivatives of the inner optimisers in everything they are given, and at zero second moments."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap
from torch.utils import _pytree as pytree

from theria.meta import MixedMode, Unrolled
from theria.meta.optimisers import SGD, Adam, AdamW, InnerOptimiser, Lion, RMSprop, safe_sqrt

DIFFERENCE = 1e-8  # differences over four points, step 1e-4: truncation 1e-16 and rounding 1e-12, times derivatives
SAME = 1e-10  # float64, the same derivative in another order of sums
STEPS = 4


@dataclass(frozen=True)
class Case:
    """An optimiser and each of its hyperparameters with the value to differentiate at."""

    optimiser: InnerOptimiser
    hyper: dict[str, float]


MOMENTS = {"beta1": 0.8, "beta2": 0.7, "eps": 0.1, "weight_decay": 0.2, "lr": 0.1}
MEANS = {"lr": 0.05, "alpha": 0.8, "eps": 0.1, "weight_decay": 0.2}
CASES = {
    "sgd": Case(SGD(1.0), {"lr": 0.1, "weight_decay": 0.2}),
    "momentum": Case(SGD(1.0, momentum=0.1), {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.8}),
    "nesterov": Case(SGD(1.0, momentum=0.1, nesterov=True), {"lr": 0.1, "momentum": 0.8}),
    "dampening": Case(SGD(1.0, momentum=0.1, dampening=0.1), {"lr": 0.1, "momentum": 0.8, "dampening": 0.4}),
    "adam": Case(Adam(1.0), MOMENTS),
    "amsgrad": Case(Adam(1.0, amsgrad=True), MOMENTS),
    "adamw": Case(AdamW(1.0), MOMENTS),
    "rmsprop": Case(RMSprop(1.0), MEANS),
    "centered": Case(RMSprop(1.0, momentum=0.1, centered=True), {**MEANS, "momentum": 0.8}),
    "lion": Case(Lion(1.0), {"lr": 0.1, "beta1": 0.8, "beta2": 0.7, "weight_decay": 0.2}),
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def case(request) -> Case:
    return request.param


def loss(params, data):
    w, b = params["w"], params["b"]
    return (w.sin() @ b - data).square().sum() + (w * w).mean() + b.cos().sum()


def start():
    return {"w": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(4, 2, dtype=torch.float64)}


def each(case, params):
    """Every hyperparameter as a tensor for each parameter, the first entry-wise, the second one number."""
    return {
        kind: {"w": torch.full_like(params["w"], value), "b": params["b"].new_tensor(value)}
        for kind, value in case.hyper.items()
    }


def outer(case, adjoint=None):
    """(params, data, hyper) -> a scalar of the solution."""

    def function(params, data, hyper):
        final = (adjoint or Unrolled()).solve(loss, params, data, case.optimiser, hyper, STEPS)
        return (final["w"].exp() @ final["b"]).square().mean() + final["b"].sin().sum()

    return function


def arguments(case):
    params = start()
    return params, torch.randn(3, 2, dtype=torch.float64), each(case, params)


def central(function, at, direction, step=1e-4):
    """The derivative along a direction by four points: the error is that of the fifth derivative, times step^4."""

    def moved(steps):
        return function(pytree.tree_map(lambda x, d: x + steps * step * d, at, direction))

    return (8 * (moved(1) - moved(-1)) - (moved(2) - moved(-2))) / (12 * step)


def product(a, b):
    return sum(pytree.tree_leaves(pytree.tree_map(lambda x, y: (x * y).sum(), a, b)))


def test_first_derivative_in_each_hyperparameter_the_start_and_the_data(case):
    params, data, hyper = arguments(case)
    function = outer(case)
    gradient = grad(function, (0, 1, 2))(params, data, hyper)
    checks = [
        (gradient[2][kind], hyper[kind], lambda x, k=kind: function(params, data, {**hyper, k: x})) for kind in hyper
    ]
    checks += [(gradient[0], params, lambda x: function(x, data, hyper))]
    checks += [(gradient[1], data, lambda x: function(params, x, hyper))]
    for actual, at, along in checks:
        direction = pytree.tree_map(torch.randn_like, at)
        expected = central(along, at, direction)
        torch.testing.assert_close(product(actual, direction), expected, rtol=DIFFERENCE, atol=DIFFERENCE)
        forward = jvp(along, (at,), (direction,))[1]
        torch.testing.assert_close(product(actual, direction), forward, rtol=SAME, atol=SAME)


def test_a_derivative_that_is_not_zero_is_found_for_each_hyperparameter(case):
    """Else the comparison above could compare zeros."""
    params, data, hyper = arguments(case)
    gradient = grad(outer(case), 2)(params, data, hyper)
    for kind, value in gradient.items():
        size = sum(v.abs().sum() for v in value.values())
        expected_zero = isinstance(case.optimiser, Lion) and kind in ("beta1", "beta2")
        assert (size == 0) if expected_zero else (size > 1e-6), kind


def test_second_derivative_in_hyperparameters_and_start(case):
    params, data, hyper = arguments(case)
    direction = pytree.tree_map(torch.randn_like, (params, data, hyper))
    other = pytree.tree_map(torch.randn_like, (params, data, hyper))

    def slope(at):
        return product(grad(outer(case), (0, 1, 2))(*at), other)

    expected = central(slope, (params, data, hyper), direction)
    actual = product(grad(slope)((params, data, hyper)), direction)
    torch.testing.assert_close(actual, expected, rtol=10 * DIFFERENCE, atol=10 * DIFFERENCE)


@pytest.mark.parametrize("adjoint", [MixedMode(), MixedMode(checkpoint_every=2), Unrolled(checkpoint_every=3)], ids=str)
def test_adjoints_agree_in_every_argument(case, adjoint):
    at = arguments(case)
    expected = grad(outer(case), (0, 1, 2))(*at)
    actual = grad(outer(case, adjoint), (0, 1, 2))(*at)
    for a, b in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=SAME, atol=SAME)


def test_tasks_under_vmap_agree_with_the_loop(case):
    params, _, hyper = arguments(case)
    data = torch.randn(3, 3, 2, dtype=torch.float64)

    def gradient(adjoint):
        return vmap(grad(outer(case, adjoint), (0, 1, 2)), in_dims=(None, 0, None))(params, data, hyper)

    expected = [grad(outer(case), (0, 1, 2))(params, one, hyper) for one in data]
    for adjoint in (Unrolled(), MixedMode()):
        for i, one in enumerate(expected):
            for a, b in zip(pytree.tree_leaves(gradient(adjoint)), pytree.tree_leaves(one), strict=True):
                torch.testing.assert_close(a[i], b, rtol=SAME, atol=SAME)


def test_the_count_is_in_each_schedule_and_bias_correction_on_the_way_back():
    """Rates of each step and parameter, learned: MixedMode hands each step its own."""
    params, data = start(), torch.randn(3, 2, dtype=torch.float64)
    for make in (SGD, partial(Adam, eps=0.1), partial(RMSprop, eps=0.1)):
        case = Case(make([0.05, 0.02, 0.08], learn_lr="tensor"), {})
        hyper: Any = case.optimiser.hyper(params)
        actual = grad(outer(case, MixedMode()), 2)(params, data, hyper)["lr"]
        expected = grad(outer(case), 2)(params, data, hyper)["lr"]
        for name in params:
            assert actual[name].shape == (3,)
            assert actual[name].abs().min() > 0
            torch.testing.assert_close(actual[name], expected[name], rtol=SAME, atol=SAME)
            direction = torch.randn(3, dtype=torch.float64)

            def along(rates, name=name, case=case, hyper=hyper):
                return outer(case)(params, data, {"lr": {**hyper["lr"], name: rates}})

            difference = central(along, hyper["lr"][name], direction)
            torch.testing.assert_close(expected[name] @ direction, difference, rtol=DIFFERENCE, atol=DIFFERENCE)


def test_lion_is_differentiated_as_its_policy_says():
    """theta_T = theta_0 (1 - lr decay)^T - lr sum_t (1 - lr decay)^(T-1-t) sign_t, with constant signs."""
    params, data = start(), torch.randn(3, 2, dtype=torch.float64)
    optimiser, lr, decay = Lion(0.1, weight_decay=0.2), 0.1, 0.2

    def final(params, data, lr, decay):
        solved = Unrolled().solve(loss, params, data, optimiser, {"lr": lr, "weight_decay": decay}, STEPS)
        return solved["w"].sum()

    at = (params, data, torch.tensor(lr, dtype=torch.float64), torch.tensor(decay, dtype=torch.float64))
    d_params, d_data, d_lr, d_decay = grad(final, (0, 1, 2, 3))(*at)
    assert (d_data == 0).all()
    assert (d_params["b"] == 0).all()
    keep = 1 - lr * decay
    torch.testing.assert_close(d_params["w"], torch.full_like(params["w"], keep**STEPS), rtol=SAME, atol=SAME)
    signs, p, state = [], params, optimiser.init(params)
    for _ in range(STEPS):
        g = grad(loss)(p, data)
        signs.append(torch.sign(0.9 * state["momentum"]["w"] + 0.1 * g["w"]).sum())
        p, state = optimiser.update(g, state, p, {})

    def closed(lr, decay):
        keep = 1 - lr * decay
        steps = sum(keep ** (STEPS - 1 - t) * sign for t, sign in enumerate(signs))
        return params["w"].sum() * keep**STEPS - lr * steps

    expected = grad(closed, (0, 1))(*at[2:])
    torch.testing.assert_close((d_lr, d_decay), expected, rtol=SAME, atol=SAME)


# Zero gradients, and so zero second moments: a parameter that the loss reads only through its square at 0.
def flat(params, data):
    return (params["w"] ** 2).sum() * data / 2


NAN_SAFE = [
    Adam(0.1, eps=0.1),
    Adam(0.1, eps=0.1, amsgrad=True),
    AdamW(0.1, eps=0.1, weight_decay=0.0),
    RMSprop(0.1, eps=0.1),
    RMSprop(0.1, eps=0.1, centered=True, momentum=0.9),
]


@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=str)
@pytest.mark.parametrize("optimiser", NAN_SAFE, ids=str)
def test_one_step_at_a_zero_gradient_has_the_derivative_of_g_over_eps(optimiser, adjoint):
    """p - lr g / (|g| + eps) with g = data p at p = 0: d/dp = 1 - lr data / eps whatever the mean."""
    params, data = {"w": torch.zeros(3, dtype=torch.float64)}, torch.tensor(0.7, dtype=torch.float64)

    def final(params, data):
        return adjoint.solve(flat, params, data, optimiser, {}, 1)["w"].sum()

    gradient = grad(final)(params, data)["w"]
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 - 0.1 * 0.7 / 0.1), rtol=SAME, atol=SAME)


@pytest.mark.parametrize("optimiser", NAN_SAFE, ids=str)
def test_derivatives_of_every_order_are_finite_at_zero_second_moments(optimiser):
    params, data = {"w": torch.tensor([0.0, 0.3], dtype=torch.float64)}, torch.tensor(0.7, dtype=torch.float64)
    hyper = {k: torch.tensor(v, dtype=torch.float64) for k, v in {"lr": 0.1, "eps": 0.1, "weight_decay": 0.0}.items()}
    hyper |= {"beta2": torch.tensor(0.9)} if isinstance(optimiser, (Adam, AdamW)) else {"alpha": torch.tensor(0.9)}

    def final(params, data, hyper):
        return Unrolled().solve(flat, params, data, optimiser, hyper, 3)["w"].sin().sum()

    at = (params, data, hyper)
    first = grad(final, (0, 1, 2))(*at)
    second = hessian(final, (0, 1, 2))(*at)
    mixed = jvp(grad(final, (0, 1, 2)), at, at)[1]
    third = grad(lambda *a: product(jvp(grad(final, (0, 1, 2)), a, at)[1], at), (0, 1, 2))(*at)
    for leaf in pytree.tree_leaves((first, second, mixed, third)):
        assert torch.isfinite(leaf).all()


def test_the_safe_root_is_the_root_and_zero_below():
    x = torch.tensor([-1.0, 0.0, 1e-300, 4.0], dtype=torch.float64, requires_grad=True)
    root = safe_sqrt(x)
    torch.testing.assert_close(root, torch.tensor([0.0, 0.0, 1e-150, 2.0], dtype=torch.float64), rtol=1e-15, atol=0)
    (slope,) = torch.autograd.grad(root.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, torch.tensor([0, 0, 0.5e150, 0.25], dtype=torch.float64), rtol=1e-15, atol=0)
    (curvature,) = torch.autograd.grad(slope[[0, 1, 3]].sum(), x)
    torch.testing.assert_close(curvature, torch.tensor([0, 0, 0, -1 / 32], dtype=torch.float64), rtol=1e-15, atol=0)


def test_a_constant_gradient_gives_centered_rmsprop_no_nan_where_rounding_gives_torch_one():
    """v - u^2 of a constant gradient goes to zero and comes out below it by rounding."""
    p, optimiser = {"w": torch.zeros(50, dtype=torch.float64)}, RMSprop(0.01, alpha=0.5, centered=True)
    g, state = {"w": torch.linspace(0.1, 1.7, 50, dtype=torch.float64)}, optimiser.init(p)
    negative = False
    for _ in range(80):
        p, state = optimiser.update(g, state, p, {})
        negative |= bool((state["square"]["w"] - state["mean"]["w"] ** 2 < 0).any())
    assert negative
    assert torch.isfinite(p["w"]).all()
