"""Every module under functional_call, vmap over parameters, and Hessian-vector products in three modes."""

from typing import Any

import pytest
import torch
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

from theria.nn import (
    MLP,
    ConvNet4,
    InContextClassifier,
    InContextRegressor,
    PrototypeTransformer,
    ResidualNet,
    TransformerClassifier,
)

EXACT = 1e-10  # float64, the same derivative by another order of the chain rule
DIFFERENCE = 1e-6  # central difference of a float64 gradient, step 1e-7: about 1e-16 / 1e-7 of rounding


def image_inputs():
    return (torch.rand(4, 1, 8, 8, dtype=torch.float64),)


def task_inputs():
    images = torch.rand(8, 1, 8, 8, dtype=torch.float64)
    return images[:6], torch.arange(3).repeat(2), images[6:]


def cases():
    small: dict[str, Any] = {"image_size": 8, "d_model": 8, "n_heads": 2, "n_layers": 1}
    yield "mlp", lambda: MLP([3, 5, 2], activation=torch.nn.Tanh), lambda: (torch.randn(4, 3, dtype=torch.float64),)
    # The smallest input that four stride-2 convolutions leave with varying statistics.
    yield "convnet", lambda: ConvNet4(3, image_size=8, width=4), image_inputs
    yield (
        "convnet_pool",
        lambda: ConvNet4(3, image_size=16, width=4, downsample="max_pool"),
        lambda: (torch.rand(4, 1, 16, 16, dtype=torch.float64),),
    )
    yield "residual", lambda: ResidualNet(3, widths=[4, 8], downsample="stride"), image_inputs
    yield (
        "residual_batch_pool",
        lambda: ResidualNet(3, widths=[4, 8], norm="batch", downsample="max_pool"),
        image_inputs,
    )
    yield "classifier_residual", lambda: TransformerClassifier(3, stem="residual", **small), image_inputs
    yield "classifier", lambda: TransformerClassifier(3, patch=4, **small), image_inputs
    yield "classifier_conv_cls", lambda: TransformerClassifier(3, stem="conv", pool="cls", **small), image_inputs
    yield (
        "in_context",
        lambda: InContextClassifier(3, **small),
        task_inputs,
    )
    yield "in_context_prototypes", lambda: InContextClassifier(3, readout="prototypes", **small), task_inputs
    for similarity in ("euclidean", "cosine"):
        yield (
            f"prototypes_{similarity}",
            lambda similarity=similarity: PrototypeTransformer(
                ResidualNet(widths=[4, 8]), 8, 3, d_model=8, n_heads=2, n_layers=1, similarity=similarity
            ),
            task_inputs,
        )
    yield (
        "regressor",
        lambda: InContextRegressor(3, d_model=8, n_heads=2, n_layers=1),
        lambda: (
            torch.randn(4, 3, dtype=torch.float64),
            torch.randn(4, dtype=torch.float64),
            torch.randn(2, 3, dtype=torch.float64),
        ),
    )


CASES = list(cases())


@pytest.fixture(params=CASES, ids=[name for name, *_ in CASES])
def problem(request):
    _, build, inputs = request.param
    torch.manual_seed(0)
    model, x = build().double(), inputs()
    params = {k: p.detach() + 0.1 * torch.randn_like(p) for k, p in model.named_parameters()}
    tangent = {k: torch.randn_like(p) for k, p in params.items()}

    def loss(params):
        out = functional_call(model, params, x)
        return (out.sin() * torch.arange(1.0, 1 + out.numel(), dtype=out.dtype).reshape(out.shape)).mean()

    return model, x, params, tangent, loss


def close(actual, expected, tol):
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


def test_hessian_vector_products_agree_in_every_mode(problem):
    *_, params, tangent, loss = problem
    forward_over_reverse = jvp(grad(loss), (params,), (tangent,))[1]

    def directional(p):
        return sum((g * tangent[k]).sum() for k, g in grad(loss)(p).items())

    close(grad(directional)(params), forward_over_reverse, EXACT)
    close(grad(lambda p: jvp(loss, (p,), (tangent,))[1])(params), forward_over_reverse, EXACT)
    step = 1e-7  # small, so that no ReLU or pooling changes its branch within it
    plus = grad(loss)({k: p + step * tangent[k] for k, p in params.items()})
    minus = grad(loss)({k: p - step * tangent[k] for k, p in params.items()})
    difference = {k: (plus[k] - minus[k]) / (2 * step) for k in params}
    scale = max(d.abs().max() for d in difference.values())
    close(
        {k: v / scale for k, v in forward_over_reverse.items()},
        {k: d / scale for k, d in difference.items()},
        DIFFERENCE,
    )


def test_forward_over_forward_equals_the_quadratic_form(problem):
    *_, params, tangent, loss = problem
    curvature = jvp(lambda p: jvp(loss, (p,), (tangent,))[1], (params,), (tangent,))[1]
    hessian_vector = jvp(grad(loss), (params,), (tangent,))[1]
    expected = sum((hessian_vector[k] * tangent[k]).sum() for k in params)
    torch.testing.assert_close(curvature, expected, rtol=EXACT, atol=EXACT)


def test_vmap_over_parameters_equals_the_loop(problem):
    model, x, params, tangent, loss = problem
    stacked = {k: torch.stack([params[k], params[k] + 0.1 * tangent[k]]) for k in params}
    rows = [{k: p[i] for k, p in stacked.items()} for i in range(2)]
    batched = vmap(lambda p: jvp(grad(loss), (p,), (tangent,))[1])(stacked)
    for i in range(2):
        close({k: v[i] for k, v in batched.items()}, jvp(grad(loss), (rows[i],), (tangent,))[1], EXACT)
    out = vmap(lambda p: functional_call(model, p, x))(stacked)
    torch.testing.assert_close(out[1], functional_call(model, rows[1], x), rtol=EXACT, atol=EXACT)


def test_gradient_of_vmapped_gradients_equals_the_loop(problem):
    """The composition of MAML over a batch of tasks, where PyTorch's own norms are silently wrong."""
    *_, params, tangent, loss = problem
    stacked = {k: torch.stack([params[k], params[k] + 0.1 * tangent[k]]) for k in params}

    def product(gradients):
        return torch.stack([(g * tangent[k]).sum() for k, g in gradients.items()]).sum()

    batched = grad(lambda stacked: product(vmap(grad(loss))(stacked)))(stacked)
    for i in range(2):
        row = {k: p[i] for k, p in stacked.items()}
        close({k: g[i] for k, g in batched.items()}, grad(lambda p: product(grad(loss)(p)))(row), EXACT)


def test_stacked_models_run_under_vmap():
    models = [MLP([3, 5, 2]) for _ in range(3)]
    params, buffers = stack_module_state(models)  # type: ignore[arg-type]
    x = torch.randn(4, 3)
    out = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
    torch.testing.assert_close(out, torch.stack([m(x) for m in models]), rtol=1e-5, atol=1e-6)
