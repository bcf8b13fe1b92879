"""Gauss-Newton and Fisher products against their matrices written out, through attention and in closed form."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.curvature.conftest import CLASSES, Network, flat
from theria.curvature import (
    Categorical,
    Gaussian,
    empirical_fisher_product,
    fisher_product,
    gauss_newton_product,
    hvp,
    module_function,
    module_loss,
)

EXACT = 1e-10  # float64; sums of a few hundred terms through a small network
PRODUCTS = {
    "gauss_newton": lambda net, v, **k: gauss_newton_product(
        net.model_fn, lambda z: F.cross_entropy(z, net.y), net.params, v, **k
    ),
    "fisher": lambda net, v, **k: fisher_product(net.model_fn, Categorical(), net.params, v, **k),
    "gaussian": lambda net, v, **k: fisher_product(net.model_fn, Gaussian(0.5), net.params, v, **k),
    "empirical": lambda net, v, **k: empirical_fisher_product(
        lambda p: F.cross_entropy(net.model_fn(p), net.y, reduction="none"), net.params, v, **k
    ),
    "hessian": lambda net, v, **k: hvp(net.loss, net.params, v, **k),
}


def log_gradients(net: Network, classes: torch.Tensor) -> torch.Tensor:
    """(n, N): the gradient of log p(class) of each example, from the Jacobian."""
    weights = F.one_hot(classes, CLASSES) - net.logits.softmax(-1)
    return torch.einsum("nc,ncp->np", weights, net.jacobian)


def matrix(net: Network, kind: str) -> torch.Tensor:
    """Each matrix by its definition, not by the factorisation that the products use."""
    n = len(net.y)
    if kind == "hessian":
        return net.hessian
    if kind == "empirical":
        g = log_gradients(net, net.y)
        return g.mT @ g / n
    if kind == "gaussian":
        return torch.einsum("ncp,ncq->pq", net.jacobian, net.jacobian) / (0.5 * n)
    p, total = net.logits.softmax(-1), torch.zeros_like(net.hessian)
    for c in range(CLASSES):  # E_{y ~ p} of the outer product
        g = log_gradients(net, torch.full((n,), c))
        total += (p[:, c : c + 1] * g).mT @ g
    return total / n


@pytest.mark.parametrize("kind", PRODUCTS)
def test_against_the_matrix_through_attention(network: Network, kind: str) -> None:
    expected = matrix(network, kind)
    v = torch.randn(4, len(expected), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one = PRODUCTS[kind](network, network.tree(v[0]))
    torch.testing.assert_close(flat(one), expected @ v[0], rtol=EXACT, atol=EXACT)
    for chunk_size in (None, 3):
        batch = flat(PRODUCTS[kind](network, network.tree(v), chunk_size=chunk_size), 1)
        torch.testing.assert_close(batch, v @ expected, rtol=EXACT, atol=EXACT)


def test_reduction_is_over_the_examples(network: Network) -> None:
    v = network.tree(torch.ones_like(network.hessian[0]))
    for kind in ("fisher", "gaussian", "empirical"):
        mean, total = (flat(PRODUCTS[kind](network, v, reduction=r)) for r in ("mean", "sum"))
        torch.testing.assert_close(5 * mean, total)


@pytest.mark.parametrize("kind", PRODUCTS)
def test_symmetry(network: Network, kind: str) -> None:
    u, w = torch.randn(2, len(network.hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    left, right = (flat(PRODUCTS[kind](network, network.tree(x))) for x in (u, w))
    torch.testing.assert_close(u @ right, w @ left, rtol=1e-12, atol=1e-12)


def test_gauss_newton_of_least_squares_is_closed_form_on_pytrees() -> None:
    """Outputs A a + b of a linear model: J = (A, 1), so that the Hessian is the Gauss-Newton matrix."""
    A, target = torch.randn(2, 6, 3, dtype=torch.float64)
    params = {"a": torch.randn(3, dtype=torch.float64), "b": (torch.zeros((), dtype=torch.float64),)}
    v = {"a": torch.randn(3, dtype=torch.float64), "b": (torch.ones((), dtype=torch.float64),)}

    def model_fn(p: Any) -> Any:
        return {"out": A @ p["a"] + p["b"][0]}

    def loss_fn(out: Any) -> torch.Tensor:
        return (out["out"] - target[:, 0]).square().sum()

    product = gauss_newton_product(model_fn, loss_fn, params, v)
    Jv = A @ v["a"] + 1
    torch.testing.assert_close(product["a"], 2 * A.mT @ Jv, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(product["b"][0], 2 * Jv.sum(), rtol=1e-12, atol=1e-12)
    exact = hvp(lambda p: loss_fn(model_fn(p)), params, v)
    torch.testing.assert_close(product, exact, rtol=1e-12, atol=1e-12)


def test_gauss_newton_drops_the_models_own_curvature() -> None:
    """Model w^2, loss z^2/2: J'H_L J = 4 w^2, while the Hessian is 6 w^2."""
    w = torch.tensor([1.5], dtype=torch.float64)
    product = gauss_newton_product(torch.square, lambda z: 0.5 * z.square().sum(), w, torch.ones_like(w))
    torch.testing.assert_close(product, 4 * w.square())
    torch.testing.assert_close(hvp(lambda p: 0.5 * p.pow(4).sum(), w, torch.ones_like(w)), 6 * w.square())


def test_the_empirical_fisher_is_another_matrix(network: Network) -> None:
    v = network.tree(torch.ones_like(network.hessian[0]))
    fisher, empirical = (flat(PRODUCTS[kind](network, v)) for kind in ("fisher", "empirical"))
    assert torch.linalg.vector_norm(fisher - empirical) > 0.1 * torch.linalg.vector_norm(fisher)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.BatchNorm1d(4, track_running_stats=False)])
def test_modules_with_pytorchs_norms_over_batched_directions(norm: nn.Module) -> None:
    """Whose fused second derivatives are wrong under some transforms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    model_fn, params = module_function(model, x)
    J = flat(torch.func.jacrev(model_fn)(params), 2)
    v = {k: torch.randn(3, *p.shape, dtype=torch.float64) for k, p in params.items()}
    product = gauss_newton_product(model_fn, lambda z: F.mse_loss(z, y), params, v)
    expected = flat(v, 1) @ torch.einsum("ncp,ncq->pq", J, J) * (2 / y.numel())
    torch.testing.assert_close(flat(product, 1), expected, rtol=EXACT, atol=EXACT)


def test_module_helpers_keep_the_module_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x, y = torch.randn(8, 3), torch.randn(8, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss, params = module_loss(model, F.mse_loss, x, y)
    assert not any(p.requires_grad for p in params.values())
    torch.testing.assert_close(loss(params), F.mse_loss(F.batch_norm(model[0](x), None, None, training=True), y))
    hvp(loss, params, params)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        module_function(nn.ReLU(), x)


def test_what_does_not_fit_is_named() -> None:
    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"v has shapes \(4,\)"):
        gauss_newton_product(torch.sin, torch.sum, x, torch.randn(4))
    with pytest.raises(ValueError, match=r"loss_fn returned \(3,\); a scalar"):
        gauss_newton_product(torch.sin, torch.sin, x, x)
    with pytest.raises(TypeError, match=r"must return floating tensors; given torch\.int64"):
        gauss_newton_product(lambda p: p.long(), torch.sum, x, x)
    with pytest.raises(TypeError, match=r"give Categorical\(\) or Gaussian"):
        fisher_product(torch.sin, "categorical", x, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model_fn returned \(\); a tensor \(..., C\) is needed"):
        fisher_product(torch.sum, Categorical(), x, x)
    with pytest.raises(ValueError, match="reduction='none' is not known"):
        fisher_product(torch.sin, Categorical(), x, x, reduction="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"losses_fn returned \(\); one loss an example"):
        empirical_fisher_product(torch.sum, x, x)
    with pytest.raises(ValueError, match="variance=0"):
        Gaussian(0.0)
