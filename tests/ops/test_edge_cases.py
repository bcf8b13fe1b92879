"""Hidden rows, huge logits, NaN and Inf, empty dimensions; parity with F.scaled_dot_product_attention."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp

from tests.tolerances import CUSTOM_F64
from theria.ops import sdpa, sdpa_forward, sdpa_hvp, sdpa_vjp
from theria.testing import difference, make_sample, masks, naive_attention

backends = pytest.mark.parametrize("backend", ["reference", "custom"])


@backends
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_row_that_sees_no_key_is_zero_with_zero_derivatives(backend: str, kind: str) -> None:
    sample = make_sample()
    hidden = torch.ones(5, 7, dtype=torch.bool)
    hidden[2] = False
    mask = hidden if kind == "boolean" else torch.zeros(5, 7, dtype=torch.float64).masked_fill(~hidden, float("-inf"))
    attend = partial(sdpa, attn_mask=mask, backend=backend)
    out, tangent, *_ = jvp(attend, sample.x, sample.t)
    assert out[..., 2, :].abs().max() == 0
    assert tangent[..., 2, :].abs().max() == 0

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (attend(q, k, v) * sample.do).sin().sum()

    first, second, *_ = jvp(grad(loss, (0, 1, 2)), sample.x, sample.t)
    assert first[0][..., 2, :].abs().max() == 0
    assert second[0][..., 2, :].abs().max() == 0
    assert all(x.isfinite().all() for x in (*first, *second))
    _, lse = sdpa_forward(*sample.x, attn_mask=mask, backend=backend)
    assert (lse[..., 2] == float("-inf")).all()


@backends
def test_logits_of_ten_thousand_stay_finite_and_right(backend: str) -> None:
    """Scores of ±1e4 in float32; the truth is float64 on the same numbers."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 6, 8).sign() * 59.5  # q·k/√8 reaches 8·59.5²/2.83 = 1.0e4
    k = torch.randn(2, 3, 9, 8).sign() * 59.5
    v, do = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 6, 4)
    t = [torch.randn_like(x) for x in (q, k, v)]
    assert (q @ k.mT / 8**0.5).abs().max() >= 5e3
    low = (sdpa(q, k, v, backend=backend), *sdpa_hvp(q, k, v, do, *t, backend=backend))
    x64 = [x.double() for x in (q, k, v, do, *t)]
    exact = (naive_attention(*x64[:3]), *sdpa_hvp(*x64, backend="reference"))
    assert all(x.isfinite().all() for x in low)
    # the float32 score itself is only known to 1e4·6e-8 = 6e-4
    assert difference(low[:1], exact[:1]) <= 2e-3
    assert difference(low[1:], exact[1:]) <= 5e-3


@backends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_nan_and_inf_propagate(backend: str, bad: float, operand: int) -> None:
    x = make_sample().x
    x[operand][0, 0, 0, 0] = bad
    out = sdpa(*x, backend=backend)
    expected = naive_attention(*x)
    assert not out[0, 0].isfinite().all()
    assert out.isfinite().equal(expected.isfinite())
    assert not sdpa_vjp(*x, torch.ones_like(out), backend=backend)[0][0, 0].isfinite().all()


@backends
@pytest.mark.parametrize(
    ("batch", "N", "M", "E"), [((0, 2), 5, 7, 3), ((2, 2), 0, 7, 3), ((2, 2), 5, 0, 3), ((2, 2), 5, 7, 0)], ids=str
)
def test_empty_dimensions_work_as_in_pytorch(backend: str, batch: tuple[int, int], N: int, M: int, E: int) -> None:
    sample = make_sample(batch, N, M, 4, E)
    x = sample.leaves()
    out = sdpa(*x, backend=backend)
    expected = F.scaled_dot_product_attention(*x)
    assert out.equal(expected)
    grads = torch.autograd.grad(out, x, sample.do, create_graph=True)
    second = torch.autograd.grad(grads, x, sample.t, materialize_grads=True)
    assert [g.shape for g in second] == [a.shape for a in x]
    assert all((g == 0).all() for g in second) or M > 0


@backends
def test_width_zero_attends_uniformly(backend: str) -> None:
    v = torch.randn(2, 3, 4)
    out = sdpa(torch.empty(2, 5, 0), torch.empty(2, 3, 0), v, backend=backend)
    torch.testing.assert_close(out, v.mean(-2, keepdim=True).expand(2, 5, 4))


def pytorch_cases() -> dict[str, dict[str, Any]]:
    named = {name: o for name, o in masks(5, 7).items() if "dropout_p" not in o and name != "causal_and_bias"}
    return named | {"mask_1d_row": {"attn_mask": torch.randn(1, 7, dtype=torch.float64)}}


@backends
@pytest.mark.parametrize("name", pytorch_cases())
def test_equals_pytorch(backend: str, name: str) -> None:
    x, options = make_sample().x, pytorch_cases()[name]
    out = sdpa(*x, **options, backend=backend)
    assert difference([out], [F.scaled_dot_product_attention(*x, **options)]) <= CUSTOM_F64


@backends
@pytest.mark.parametrize("heads", [(6, 3, 3), (6, 2, 2), (6, 1, 1), (6, 3, 6), (4, 4, 4)], ids=str)
def test_grouped_queries_equal_pytorch(backend: str, heads: tuple[int, int, int]) -> None:
    q, k, v = (torch.randn(2, h, n, 4, dtype=torch.float64) for h, n in zip(heads, (5, 7, 7), strict=True))
    out = sdpa(q, k, v, enable_gqa=True, backend=backend)
    assert difference([out], [F.scaled_dot_product_attention(q, k, v, enable_gqa=True)]) <= CUSTOM_F64
    three = sdpa(q[0], k[0], v[0], enable_gqa=True, backend=backend)
    assert difference([three], [out[0]]) <= CUSTOM_F64


@backends
def test_ranks_may_differ(backend: str) -> None:
    q, k, v = torch.randn(2, 3, 5, 4), torch.randn(3, 7, 4), torch.randn(7, 2)
    out = sdpa(q, k, v, backend=backend)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
