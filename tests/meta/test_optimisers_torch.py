"""Fifty steps of every inner optimiser against torch.optim, in float64; Lion against its algorithm."""

import itertools

import pytest
import torch

from theria.meta.optimisers import SGD, Adam, AdamW, Lion, RMSprop

PARITY = 1e-10  # float64, the same mathematics over 50 steps; torch groups some products otherwise

SGD_OPTIONS = [
    {"momentum": momentum, "nesterov": nesterov, "dampening": dampening, "weight_decay": decay}
    for momentum, nesterov, dampening, decay in itertools.product(
        (0.0, 0.5, 0.9), (False, True), (0.0, 0.3), (0.0, 0.1)
    )
    if (momentum or not (nesterov or dampening)) and not (nesterov and dampening)
]
ADAM_OPTIONS = [
    {"eps": eps, "weight_decay": decay, "amsgrad": amsgrad, "betas": betas}
    for eps, decay, amsgrad, betas in itertools.product(
        (1e-8, 0.1), (0.0, 0.1), (False, True), ((0.9, 0.999), (0.0, 0.5), (0.5, 0.9))
    )
]
RMSPROP_OPTIONS = [
    {"alpha": alpha, "eps": eps, "weight_decay": decay, "momentum": momentum, "centered": centered}
    for alpha, eps, decay, momentum, centered in itertools.product(
        (0.5, 0.99), (1e-8, 0.1), (0.0, 0.1), (0.0, 0.9), (False, True)
    )
]
CASES = [
    *((SGD, torch.optim.SGD, options) for options in SGD_OPTIONS),
    *((Adam, torch.optim.Adam, options) for options in ADAM_OPTIONS),
    *((AdamW, torch.optim.AdamW, options) for options in ADAM_OPTIONS),
    *((RMSprop, torch.optim.RMSprop, options) for options in RMSPROP_OPTIONS),
]
RATES = [0.02, 0.05, 0.01, 0.03]


def loss(params):
    """Convex, so that rounding does not grow; the first row of w has no gradient, and so second moments of zero."""
    w, b = params["w"][1:], params["b"]
    return (w.sum() + b.mean()).cosh().log() + (w * w).mean() + ((b - 1) ** 2).sum() / 4


def start():
    return {"w": torch.randn(4, 4, dtype=torch.float64), "b": torch.randn(4, 2, dtype=torch.float64)}


def fifty_steps(ours, hyper, params):
    state = ours.init(params)
    for _ in range(50):
        params, state = ours.update(torch.func.grad(loss)(params), state, params, hyper)
    return params


def reference(make, params, rates, **options):
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    theirs = make(leaves.values(), lr=rates[0], **options)
    for t in range(50):
        theirs.param_groups[0]["lr"] = rates[min(t, len(rates) - 1)]
        theirs.zero_grad()
        loss(leaves).backward()
        theirs.step()
    return leaves


def same(actual, expected):
    for name, p in expected.items():
        torch.testing.assert_close(actual[name], p.detach(), rtol=PARITY, atol=PARITY)


@pytest.mark.parametrize(("make", "theirs", "options"), CASES)
def test_fifty_steps_equal_torch(make, theirs, options):
    params = start()
    same(fifty_steps(make(lr=0.02, **options), {}, params), reference(theirs, params, [0.02], **options))


@pytest.mark.parametrize("learn_lr", [False, True, "tensor"])
@pytest.mark.parametrize(("make", "theirs"), [case[:2] for case in {case[0]: case for case in CASES}.values()])
def test_fifty_steps_with_a_rate_for_each_equal_torch(make, theirs, learn_lr):
    params, ours = start(), make(lr=RATES, learn_lr=learn_lr, weight_decay=0.1)
    same(fifty_steps(ours, ours.hyper(params), params), reference(theirs, params, RATES, weight_decay=0.1))


@pytest.mark.parametrize(("make", "theirs", "options"), [CASES[1], CASES[10], CASES[-10], CASES[-1]])
def test_hyperparameters_as_tensors_equal_torch(make, theirs, options):
    """Each hyperparameter of torch's, given as a tensor that replaces another number of construction."""
    params = start()
    named = {"lr": 0.02, **options}
    if "betas" in named:
        named |= dict(zip(("beta1", "beta2"), named.pop("betas"), strict=True))
    given = {k: torch.tensor(v, dtype=torch.float64) for k, v in named.items() if isinstance(v, float) and v}
    kept = {k: v for k, v in options.items() if isinstance(v, bool)}
    kept |= dict.fromkeys(given.keys() - {"lr", "beta1", "beta2"}, 0.123)
    same(fifty_steps(make(lr=1.0, **kept), given, params), reference(theirs, params, [0.02], **options))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lion_is_its_algorithm(decay):
    """Algorithm 2 of the paper, written in place on one vector."""
    params, b1, b2, lr = start(), 0.9, 0.99, 0.01
    expected = {name: p.clone() for name, p in params.items()}
    momentum = {name: torch.zeros_like(p) for name, p in params.items()}
    for _ in range(50):
        for name, g in torch.func.grad(loss)(expected).items():
            c = momentum[name].mul(b1).add(g, alpha=1 - b1)
            expected[name] = expected[name] - lr * (c.sign() + decay * expected[name])
            momentum[name].mul_(b2).add_(g, alpha=1 - b2)
    same(fifty_steps(Lion(lr, (b1, b2), decay), {}, params), expected)
