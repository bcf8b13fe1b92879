"""theria.hvp: three modes, pytrees, batches of directions, against a closed form and finite differences."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import theria
from tests.tolerances import CUSTOM_F64, FINITE_DIFFERENCE_F64, LAW_F64
from theria.testing import difference, make_sample

MODES = ["forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"]
modes = pytest.mark.parametrize("mode", MODES)


@modes
def test_quadratic_has_its_matrix(mode: Any) -> None:
    A = torch.randn(6, 6, dtype=torch.float64)
    x, v = torch.randn(2, 6, dtype=torch.float64)
    product = theria.hvp(lambda p: 0.5 * p @ A @ p, x, v, mode=mode)
    assert difference([product], [0.5 * (A + A.T) @ v]) <= LAW_F64


def attention_loss(params: dict[str, Any], backend: str) -> Tensor:
    q, (k, v) = params["q"], params["kv"]
    return theria.sdpa(q, k, v, is_causal=True, backend=backend).pow(2).sum() + (params["bias"] ** 3).sum()


def attention_params(seed: int) -> dict[str, Any]:
    q, k, v = make_sample(seed=seed).x
    return {"q": q, "kv": (k, v), "bias": torch.randn(3, dtype=torch.float64)}


@modes
@pytest.mark.parametrize("backend", ["reference", "custom"])
def test_attention_on_a_pytree_against_central_differences(mode: Any, backend: str) -> None:
    loss = partial(attention_loss, backend=backend)
    params, v = attention_params(0), attention_params(1)
    product = theria.hvp(loss, params, v, mode=mode)
    h = 1e-5
    plus, minus = (tree_map(partial(torch.add, alpha=step), params, v) for step in (h, -h))
    gradient = torch.func.grad(loss)
    expected = tree_map(lambda a, b: (a - b) / (2 * h), gradient(plus), gradient(minus))
    assert difference(tree_leaves(product), tree_leaves(expected)) <= FINITE_DIFFERENCE_F64


@modes
def test_a_batch_of_directions_is_the_loop(mode: Any) -> None:
    loss = partial(attention_loss, backend="custom")
    params, directions = attention_params(0), [attention_params(i) for i in range(1, 4)]
    stacked = tree_map(lambda *x: torch.stack(x), *directions)
    loop = tree_map(lambda *x: torch.stack(x), *(theria.hvp(loss, params, v, mode=mode) for v in directions))
    for chunk_size in (None, 2):
        batch = theria.hvp(loss, params, stacked, mode=mode, chunk_size=chunk_size)
        assert difference(tree_leaves(batch), tree_leaves(loop)) <= CUSTOM_F64


def test_of_a_module_through_functional_call() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    x, params = torch.randn(5, 3).double(), dict[str, Tensor](model.named_parameters())
    v = {name: torch.randn_like(p) for name, p in params.items()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, p, (x,)).pow(2).mean()

    grads = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
    expected = torch.autograd.grad(grads, list(params.values()), list(v.values()))
    for mode in MODES:
        product = theria.hvp(loss, params, v, mode=mode)  # type: ignore[arg-type]
        assert difference(list(product.values()), expected) <= CUSTOM_F64


@modes
@pytest.mark.parametrize("kind", ["layer_norm", "batch_norm", "mse_loss", "huber_loss"])
def test_pytorchs_own_norms_and_losses_are_right_in_every_mode(mode: Any, kind: str) -> None:
    """Alone, some of these are wrong without an error over forward mode, or have no such derivative."""
    x, v, y = torch.randn(3, 4, 5, dtype=torch.float64)

    def loss(p: Tensor) -> Tensor:
        if kind.endswith("norm"):
            normed = F.layer_norm(p, (5,)) if kind == "layer_norm" else F.batch_norm(p, None, None, training=True)
            return (normed * y).sin().sum()
        return getattr(F, kind)(p.sin(), y)

    (gradient,) = torch.autograd.grad(loss(p := x.clone().requires_grad_()), p, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, p, v)  # reverse over reverse without vmap is right in PyTorch
    assert difference([theria.hvp(loss, x, v, mode=mode)], [expected]) <= CUSTOM_F64


def test_errors_come_before_any_work() -> None:
    def never(_: Any) -> Tensor:
        raise AssertionError("the loss was called")

    x = torch.randn(3)
    with pytest.raises(ValueError, match="mode 'forward' is not known; needed is one of forward_over_reverse"):
        theria.hvp(never, x, x, mode="forward")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pytree like params"):
        theria.hvp(never, {"a": x}, [x])
    with pytest.raises(ValueError, match=r"v has shapes \(4,\); needed are \(3,\)"):
        theria.hvp(never, x, torch.randn(4))
    with pytest.raises(TypeError, match=r"floating tensors; given torch\.int64"):
        theria.hvp(never, x, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no leaves"):
        theria.hvp(never, {}, {})
    with pytest.raises(ValueError, match=r"loss_fn returned \(3,\); a scalar tensor is needed"):
        theria.hvp(lambda p: p * 2, x, x)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, True, "a"])
def test_a_chunk_is_a_number_of_directions(chunk_size):
    with pytest.raises(ValueError, match=r"chunk_size=.*: give an integer of at least 1"):
        theria.hvp(lambda p: p.square().sum(), torch.ones(3), torch.ones(4, 3), chunk_size=chunk_size)
