"""Norms and losses of user models: equal to PyTorch's, and right where PyTorch's are not."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from theria.curvature import hvp
from theria.curvature.second_order import second_order
from theria.meta import MAML, SGD, FirstOrder, Higher, MixedMode, Unrolled

EXACT = 1e-10  # float64, the same derivative in another order of sums

NORMS = {
    "layer": (nn.LayerNorm(6), (4, 6)),
    "layer_2d": (nn.LayerNorm([3, 6]), (4, 3, 6)),
    "layer_plain": (nn.LayerNorm(6, elementwise_affine=False), (4, 6)),
    "layer_no_bias": (nn.LayerNorm(6, bias=False), (4, 6)),
    "batch_1d": (nn.BatchNorm1d(6, track_running_stats=False), (4, 6)),
    "batch_2d": (nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 2, 5)),
    "instance": (nn.InstanceNorm2d(3, affine=True), (4, 3, 2, 5)),
    "batch_running": (nn.BatchNorm1d(6).eval(), (4, 6)),
    "batch_2d_running": (nn.BatchNorm2d(3).eval(), (4, 3, 2, 5)),
    "group": (nn.GroupNorm(3, 6), (4, 6)),
    "group_2d": (nn.GroupNorm(2, 4), (4, 4, 2, 5)),
    "group_plain": (nn.GroupNorm(3, 6, affine=False), (4, 6)),
}


@pytest.fixture(params=NORMS.values(), ids=list(NORMS))
def case(request):
    module, shape = request.param
    params = {name: torch.randn_like(p, dtype=torch.float64) for name, p in module.named_parameters()}
    for buffer in module.double().buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)  # a mean, and a variance
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


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)], ids=str
)
def test_running_statistics_are_written_and_derivatives_right(norm, mode):
    params = {name: torch.randn_like(p) for name, p in norm.double().named_parameters()}
    x, v = torch.randn(2, 4, 3, 2, 5, dtype=torch.float64)
    written = []

    def loss(x):
        buffers = {name: b.clone() for name, b in norm.named_buffers()}
        written.append(buffers)
        return functional_call(norm, {**params, **buffers}, (x,)).sin().sum()

    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (expected,) = torch.autograd.grad((first * v).sum(), leaf)
    torch.testing.assert_close(hvp(loss, x, v, mode), expected, rtol=EXACT, atol=EXACT)
    assert written[0]["running_mean"].abs().min() > 0
    torch.testing.assert_close(written[1], written[0], rtol=0, atol=0)
    norm.eval()
    torch.testing.assert_close(second_order(loss)(x), loss(x), rtol=EXACT, atol=EXACT)
    norm.train()


def test_forward_over_reverse_equals_torchs_double_backward(case):
    module, params, x = case
    direction = torch.randn_like(x[0])

    def gradient(x):
        return grad(lambda x: functional_call(module, params, (x,)).sin().sum())(x)

    expected = grad(lambda x: (gradient(x) * direction).sum())(x[0])
    actual = jvp(second_order(gradient), (x[0],), (direction,))[1]
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)


HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # their rounding
SINGLE = 2e-6  # float32, other formulas

A, B = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
UNDER_AUTOCAST = {
    "mse": (F.mse_loss, (A, B)),
    "huber": (F.huber_loss, (A, B)),
    "solve": (torch.linalg.solve, (A, B)),
    "layer": (lambda x, w: F.layer_norm(x, [5], w, w), (A, B[0].float())),
    "layer_plain": (lambda x: F.layer_norm(x, [5]), (A,)),
    "batch": (lambda x, w: F.batch_norm(x, None, None, w, w, True), (A, B[0].float())),
    "batch_running": (lambda x, w: F.batch_norm(x, w, w.abs(), w, w), (A, B[0].float())),
    "instance": (lambda x, w: F.instance_norm(x[None], None, None, w, w), (A, B[0].float())),
    "group": (lambda x, w: F.group_norm(x, 1, w, w), (A, B[0].float())),
}


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["half", "mixed"])
@pytest.mark.parametrize(("function", "arguments"), UNDER_AUTOCAST.values(), ids=list(UNDER_AUTOCAST))
def test_autocast_gives_what_torch_gives(function, arguments, mixed, half):
    """Beside half precision float32, as parameters are; values to a rounding, and the dtype."""
    x, *others = arguments
    given = (x.to(half), *(other if mixed else other.to(half) for other in others))
    with torch.autocast("cpu", half):
        expected, actual = function(*given), second_order(function)(*given)
    tol = SINGLE if expected.dtype is torch.float32 else 2 * HALF[half]
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


@pytest.mark.parametrize("given", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
@pytest.mark.parametrize("name", ["layer", "batch", "batch_running", "instance", "group"])
def test_a_mixture_that_torch_refuses_is_refused(name, given):
    function, (x, w) = UNDER_AUTOCAST[name]
    with pytest.raises(RuntimeError, match="mixed dtype"):
        second_order(function)(x.to(given[0]), w.to(given[1]))


MIXED = {
    "layer": lambda: nn.LayerNorm(16),
    "batch": lambda: nn.BatchNorm1d(16, track_running_stats=False),
    "batch_running": lambda: nn.BatchNorm1d(16).eval(),
    "group": lambda: nn.GroupNorm(4, 16),
    "instance": lambda: nn.Sequential(nn.Unflatten(1, (4, 4)), nn.InstanceNorm1d(4, affine=True), nn.Flatten()),
}


@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse", "reverse_over_forward"])
@pytest.mark.parametrize("norm", MIXED.values(), ids=list(MIXED))
def test_products_under_autocast_are_those_of_float64(norm, mode):
    """The truth is PyTorch's own double backward without autocast, which is right."""
    model = nn.Sequential(nn.Linear(8, 16), norm(), nn.Tanh(), nn.Linear(16, 3))
    params = {name: 0.5 * torch.randn_like(p) + (p.ndim == 1) for name, p in model.named_parameters()}
    v = {name: torch.randn_like(p) for name, p in params.items()}
    x, y = torch.randn(64, 8), torch.randn(64, 3)

    def loss(params, model=model, x=x, y=y):
        return (functional_call(model, params, (x,)).to(y.dtype) - y).square().mean()

    leaves = {name: p.double().requires_grad_() for name, p in params.items()}
    inputs = list(leaves.values())
    first = torch.autograd.grad(loss(leaves, model.double(), x.double(), y.double()), inputs, create_graph=True)
    slope = torch.stack([(g * v[name]).sum() for name, g in zip(leaves, first, strict=True)]).sum()
    expected = torch.cat([h.flatten() for h in torch.autograd.grad(slope, inputs)])
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        product = hvp(loss, params, v, mode)
    actual = torch.cat([h.flatten().double() for h in product.values()])
    assert (actual - expected).norm() < 8 * HALF[torch.bfloat16] * expected.norm()  # a few layers, each rounding


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


LEARNERS = {
    "layer": (lambda: nn.LayerNorm(8), "batch"),
    "batch": (lambda: nn.BatchNorm1d(8), "batch"),
    "batch_running": (lambda: nn.BatchNorm1d(8), "running"),
    "group": (lambda: nn.GroupNorm(2, 8), "batch"),
}


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("adjoint", [Unrolled(), Unrolled(1), MixedMode(), FirstOrder()], ids=repr)
@pytest.mark.parametrize(("norm", "batch_norm"), LEARNERS.values(), ids=list(LEARNERS))
def test_batched_learners_under_autocast(norm, batch_norm, adjoint, half):
    """Against the same learner in float64, one task at a time."""
    model = nn.Sequential(nn.Linear(4, 8), norm(), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(3, 18, 4), torch.arange(3).repeat(3, 6)
    episode = (x[:, :12], y[:, :12], x[:, 12:], y[:, 12:])
    learner = MAML(model, cross_entropy, SGD(0.3), 2, adjoint, batch_norm=batch_norm)
    with torch.autocast("cpu", half):
        loss = learner(episode)
    loss.backward()
    actual = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    learner.double().zero_grad()
    losses = [learner((sx.double(), sy, qx.double(), qy)) for sx, sy, qx, qy in zip(*episode, strict=True)]
    torch.stack(losses).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (actual - expected).norm() < 12 * HALF[half] * expected.norm()  # a few layers and steps, each rounding


def test_a_product_with_a_number_keeps_the_dtype_of_a_tensor_without_dimension():
    x = torch.tensor(0.3)
    product = hvp(lambda p: (0.5 * p["x"].exp() * p["z"].square().sum()), {"x": x, "z": torch.ones(2)},
                         {"x": torch.ones(()), "z": torch.ones(2)})  # fmt: skip
    assert {v.dtype for v in product.values()} == {torch.float32}
    # f = e^x |z|²/2: f_xx + f_xz·1 = e^x (1 + 2), f_zx + f_zz = e^x (1 + 1)
    assert torch.allclose(product["x"], 3 * x.exp())
    assert torch.allclose(product["z"], 2 * x.exp() * torch.ones(2))
