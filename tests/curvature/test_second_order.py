"""Norms and losses of user models: equal to PyTorch's, and right where PyTorch's are not."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from theria.curvature.second_order import second_order
from theria.meta import MAML, SGD, Higher, MixedMode, Unrolled

EXACT = 1e-10  # float64, the same derivative in another order of sums

NORMS = {
    "layer": (nn.LayerNorm(6), (4, 6)),
    "layer_2d": (nn.LayerNorm([3, 6]), (4, 3, 6)),
    "layer_plain": (nn.LayerNorm(6, elementwise_affine=False), (4, 6)),
    "layer_no_bias": (nn.LayerNorm(6, bias=False), (4, 6)),
    "batch_1d": (nn.BatchNorm1d(6, track_running_stats=False), (4, 6)),
    "batch_2d": (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 5)),
    "instance": (nn.InstanceNorm2d(3, affine=True), (4, 3, 2, 5)),
    "group": (nn.GroupNorm(3, 6), (4, 6)),
}


@pytest.fixture(params=NORMS.values(), ids=list(NORMS))
def case(request):
    module, shape = request.param
    params = {name: torch.randn_like(p, dtype=torch.float64) for name, p in module.named_parameters()}
    return module, params, 3 * torch.randn(2, *shape, dtype=torch.float64) + 1


def test_values_and_gradients_equal_torch(case):
    module, params, x = case

    def loss(params, x):
        return functional_call(module, params, (x,)).sin().sum()

    value = second_order(functional_call)(module, params, (x[0],))
    torch.testing.assert_close(value, functional_call(module, params, (x[0],)), rtol=EXACT, atol=EXACT)
    actual, expected = (grad(f, (0, 1))(params, x[0]) for f in (second_order(loss), loss))
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


def test_gradient_of_vmapped_gradients(case):
    module, params, x = case
    cotangent = torch.randn_like(x)

    @second_order
    def loss(params, x):
        return (functional_call(module, params, (x,)).sin() * x.cos()).sum()

    gradient = grad(lambda x: (vmap(grad(loss, 1), (None, 0))(params, x) * cotangent).sum())(x)
    for i in range(2):
        alone = grad(lambda x, c: (grad(loss, 1)(params, x) * c).sum())(x[i], cotangent[i])
        torch.testing.assert_close(gradient[i], alone, rtol=EXACT, atol=EXACT)


def test_half_precision_is_computed_in_float32():
    module, x = nn.LayerNorm(64).bfloat16(), 100 + torch.randn(8, 64).bfloat16()
    out = second_order(module.forward)(x)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out, module(x), rtol=2**-7, atol=2**-7)  # one bf16 rounding


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", [F.mse_loss, F.huber_loss], ids=lambda f: f.__name__)
def test_losses(loss, reduction):
    x, y, direction = torch.randn(3, 5, 2, dtype=torch.float64)
    mended = second_order(loss)
    torch.testing.assert_close(mended(x, y, reduction=reduction), loss(x, y, reduction=reduction))

    def gradient(x):
        return grad(lambda x: mended(x, y, reduction=reduction).sum())(x)

    expected = grad(lambda x: (gradient(x) * direction).sum())(x)
    torch.testing.assert_close(jvp(gradient, (x,), (direction,))[1], expected, rtol=EXACT, atol=EXACT)
    difference = (gradient(x + 1e-6 * direction) - gradient(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(expected, difference, rtol=1e-8, atol=1e-8)  # piecewise quadratic: no truncation


def test_losses_keep_pytorchs_warnings_and_errors():
    with pytest.warns(UserWarning, match="target size"):
        second_order(F.mse_loss)(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match="average"):
        second_order(F.mse_loss)(torch.zeros(3), torch.zeros(3), reduction="average")


class Encoder(nn.Module):
    """PyTorch's own encoder layer, whose LayerNorms are where a vmapped unrolled MAML goes wrong."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def test_maml_on_pytorchs_own_transformer():
    model = Encoder().double()
    x, y = torch.randn(3, 11, 4, 8, dtype=torch.float64), torch.randint(3, (3, 11))
    episode = (x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])
    results = []
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        for adjoint in (Higher(), Unrolled(), MixedMode()):  # the first without vmap
            model.zero_grad()
            MAML(model, cross_entropy, SGD(0.3), 2, adjoint)(episode).backward()
            results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for actual in results[1:]:
        torch.testing.assert_close(actual, results[0], rtol=EXACT, atol=EXACT)
