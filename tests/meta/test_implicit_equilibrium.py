"""Deep equilibrium layers through theria.ops.sdpa, against backpropagation through 500 steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from theria.meta.implicit import Anderson, IterationError, Picard, ScaledIdentity
from theria.meta.solvers import GMRES
from theria.nn.equilibrium import DeepEquilibrium, EquilibriumBlock
from theria.testing.memory import PeakMemory

STEPS = 500
EQUAL = 1e-8  # the equilibrium to 1e-13, its linear systems to 1e-12, 500 steps of rounding
TIGHT: dict[str, Any] = {"tol": 1e-13, "max_iter": 200, "linear_solver": GMRES(rtol=1e-12)}


@pytest.fixture(params=["custom", "reference"])
def block(request) -> EquilibriumBlock:
    torch.manual_seed(0)
    return EquilibriumBlock(12, 3, d_ff=16, gain=1.0, backend=request.param).double()


def unrolled(block: nn.Module, x: Tensor, steps: int = STEPS) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = block(x, z)
    return z


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, weights = torch.randn(2, *shape, dtype=torch.float64)
    return x, weights


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=["Picard", "Anderson"])
def test_gradients_equal_those_of_500_unrolled_steps(block, solver):
    x, weights = inputs(2, 5, 12)
    x.requires_grad_()
    leaves = [x, *block.parameters()]
    layer = DeepEquilibrium(block, solver=solver, **TIGHT)
    z, expected = layer(x), unrolled(block, x)
    torch.testing.assert_close(z, expected, rtol=EQUAL, atol=EQUAL)
    actual = torch.autograd.grad((z * weights).sin().sum(), leaves)
    expected = torch.autograd.grad((expected * weights).sin().sum(), leaves)
    assert max(b.abs().max().item() for b in expected) > 0.1
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=EQUAL, atol=EQUAL)


def test_the_adjoint_matters():
    """The gradient through the last step alone is another one: the test above could fail."""
    torch.manual_seed(0)
    block = EquilibriumBlock(12, 3, d_ff=16, gain=1.0, backend="reference").double()
    x, weights = inputs(2, 5, 12)
    gradients = []
    for options in (TIGHT, {**TIGHT, "linear_solver": ScaledIdentity()}):
        layer = DeepEquilibrium(block, **options)
        gradients.append(grad(lambda x, layer=layer: (layer(x) * weights).sum())(x))
    assert (gradients[0] - gradients[1]).norm() > 1e-2 * gradients[0].norm()


def test_functional_style_forward_mode_and_second_order(block):
    x, weights = inputs(4, 12)
    layer = DeepEquilibrium(block, **TIGHT)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in params.items()}

    def implicit(params: dict[str, Tensor]) -> Tensor:
        return (functional_call(layer, params, (x,)) * weights).sin().sum()

    def by_steps(params: dict[str, Tensor]) -> Tensor:
        inner = {name.removeprefix("block."): p for name, p in params.items()}
        z = torch.zeros_like(x)
        for _ in range(60):  # enough for 1e-12 here
            z = functional_call(block, inner, (x, z))
        return (z * weights).sin().sum()

    def close(a: Any, b: Any) -> None:
        torch.testing.assert_close(a, b, rtol=EQUAL, atol=EQUAL)

    close(jvp(implicit, (params,), (direction,))[1], jvp(by_steps, (params,), (direction,))[1])
    over_reverse = jvp(grad(implicit), (params,), (direction,))[1]
    expected = jvp(grad(by_steps), (params,), (direction,))[1]
    reverse = grad(lambda p: sum((g * direction[name]).sum() for name, g in grad(implicit)(p).items()))(params)
    for name in params:
        close(over_reverse[name], expected[name])
        close(reverse[name], expected[name])


def test_samples_under_vmap_stop_on_their_own(block):
    x, _ = inputs(3, 4, 12)
    x = x * torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)[:, None, None]
    layer = DeepEquilibrium(block, solver=Picard(check_every=1), **TIGHT)
    together, alone = vmap(layer.solve)(x), [layer.solve(sample) for sample in x]
    assert together.iterations.tolist() == [solution.iterations.item() for solution in alone]
    assert len(set(together.iterations.tolist())) > 1
    gradients = vmap(grad(lambda x: layer(x).pow(3).sum()))(x)
    for i in range(3):
        torch.testing.assert_close(gradients[i], grad(lambda x: layer(x).pow(3).sum())(x[i]), rtol=EQUAL, atol=EQUAL)


def test_memory_does_not_depend_on_the_iterations():
    torch.manual_seed(0)
    block = EquilibriumBlock(16, 2, gain=1.0)
    x = torch.randn(4, 16, 16)

    def peak(function) -> int:
        with PeakMemory() as memory:
            function().sum().backward()
        block.zero_grad()
        return memory.peak

    loose, tight = (DeepEquilibrium(block, tol=tol, linear_solver=GMRES(rtol=1e-3)) for tol in (1e-2, 1e-6))
    assert tight.solve(x).iterations >= 2 * loose.solve(x).iterations
    assert peak(lambda: tight(x)) < 1.2 * peak(lambda: loose(x))
    assert peak(lambda: unrolled(block, x, 20)) > 3 * peak(lambda: tight(x))


def test_a_block_that_does_not_settle_raises(block):
    x, _ = inputs(4, 12)
    with pytest.raises(IterationError, match="did not converge"):
        DeepEquilibrium(block, max_iter=2)(x)
    assert DeepEquilibrium(block, max_iter=2, throw=False).solve(x).result != 0
    with pytest.raises(ValueError, match="draws random numbers"):
        DeepEquilibrium(Dropping())(x)


class Dropping(nn.Module):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return nn.functional.dropout(0.1 * z + x)
