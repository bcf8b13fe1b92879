"""Calls that once gave a wrong number or an internal error; each now is right or says what is wrong."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import theria
from tests.tolerances import CUSTOM_F64, HVP_FD_F64
from theria.ops import ArgumentError, DtypeError, hvp_fd_vjp, sdpa, sdpa_forward, sdpa_hvp, sdpa_jvp, sdpa_vjp, sweep
from theria.testing import difference, make_sample, naive_attention

backends = pytest.mark.parametrize("backend", ["reference", "custom"])
MASKED_OUT = [-1e9, torch.finfo(torch.float32).min, 1e9]


def test_a_tensor_scale_is_refused_instead_of_losing_its_gradient() -> None:
    x = make_sample().x
    with pytest.raises(DtypeError, match="scale is a Tensor; a float is needed"):
        sdpa(*x, scale=torch.tensor(0.5, requires_grad=True))  # type: ignore[arg-type]


def test_finite_differences_refuse_residuals() -> None:
    """Residuals held fixed at both points would be frozen statistics."""
    s = make_sample()
    out, lse = sdpa_forward(*s.x)
    with pytest.raises(ArgumentError, match="given lse, out; the statistics are computed again"):
        hvp_fd_vjp(*s.x, *s.t, out=out, lse=lse)
    with pytest.raises(ArgumentError, match="tangent of query has shape"):
        hvp_fd_vjp(*s.x, s.t[0][:1], s.t[1], s.t[2])


@backends
@pytest.mark.parametrize("number", MASKED_OUT)
def test_a_row_whose_keys_are_all_masked_by_a_large_number(backend: str, number: float) -> None:
    """lse, which is that number, cannot hold how many keys there are; PyTorch's softmax can. Row 0 is such a row, row 1
    sees two keys, the others all; first derivatives, and the double backward along fixed cotangents."""
    torch.manual_seed(0)
    x = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(5, 5)
    mask[0], mask[1, 2:] = number, -abs(number)
    do, *t = (torch.randn(2, 5, 4) for _ in range(4))

    def derivatives(attend: Any) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attend(*x, mask), x, do, create_graph=True)
        second = torch.autograd.grad(first, x, t)
        return (*(g.detach() for g in first), *second)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = derivatives(F.scaled_dot_product_attention)
    found = derivatives(lambda *args: sdpa(*args, backend=backend))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32, sums in another order


@pytest.mark.parametrize("backend", ["reference", "custom"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [torch.finfo(torch.float32).min, torch.finfo(torch.float32).max])
def test_a_float32_number_beyond_half_precision_on_every_key(number: float, dtype: torch.dtype, backend: str) -> None:
    """It is no -inf: such a row attends to all of its keys alike. Beside plain PyTorch in float32."""
    torch.manual_seed(0)
    x = [torch.randn(2, 5, 4, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = torch.zeros(5, 5)
    mask[0], do = number, torch.randn(2, 5, 4, dtype=dtype)
    plain = [y.detach().float().requires_grad_() for y in x]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        right = F.scaled_dot_product_attention(plain[0], plain[1], plain[2], mask)
    mine = sdpa(x[0], x[1], x[2], mask, backend=backend)
    expected, found = torch.autograd.grad(right, plain, do.float()), torch.autograd.grad(mine, x, do)
    for a, b in zip((mine, *found), (right, *expected), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.0, atol=8 * torch.finfo(dtype).eps)


@backends
@pytest.mark.parametrize(("dtype", "number"), [(torch.float16, -60000.0), (torch.bfloat16, -1e4)])
def test_a_mask_in_half_precision_that_is_one_large_number(dtype: torch.dtype, number: float, backend: str) -> None:
    """The scores beside it are kept, as PyTorch keeps them: half precision has steps of 32 there."""
    torch.manual_seed(0)
    x = [torch.randn(1, n, 16, dtype=dtype) for n in (4, 10, 10)]
    mask = torch.full((4, 10), number, dtype=dtype)
    do, right = torch.randn(1, 4, 16, dtype=dtype), [y.double().requires_grad_() for y in x]
    mine = [y.clone().requires_grad_() for y in x]
    found = sdpa(mine[0], mine[1], mine[2], mask, backend=backend)
    exact = naive_attention(right[0], right[1], right[2], attn_mask=mask.double())
    pairs = zip(torch.autograd.grad(found, mine, do), torch.autograd.grad(exact, right, do.double()), strict=True)
    for a, b in ((found, exact), *pairs):
        assert (a.double() - b).norm() <= 8 * torch.finfo(dtype).eps * b.norm()


@backends
def test_explicit_functions_under_autocast_are_in_the_dtype_of_their_operands(backend: str) -> None:
    s = make_sample().to(torch.float32)
    rules: dict[str, Any] = {"backend": backend}

    def results() -> list[Tensor]:
        o, lse = sdpa_forward(*s.x, **rules)
        to, tau = sdpa_jvp(*s.x, *s.t, out=o, lse=lse, **rules)
        first = sdpa_vjp(*s.x, s.do, out=o, lse=lse, **rules)
        return [o, lse, to, tau, *first, *sdpa_hvp(*s.x, s.do, *s.t, out=o, lse=lse, **rules)]

    plain = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(a.equal(b) for a, b in zip(results(), plain, strict=True))


def test_a_row_whose_scores_are_all_enormous() -> None:
    """Without a mask, too, lse cannot hold beside 1.8e7 how many keys there are."""
    q, k = torch.full((1, 3, 4), 3000.0), torch.full((1, 5, 4), 3000.0)
    v, do = torch.randn(1, 5, 4, requires_grad=True), torch.randn(1, 3, 4)
    (dv,) = torch.autograd.grad(sdpa(q, k, v, backend="custom"), v, do)
    torch.testing.assert_close(dv, do.mean(1, keepdim=True).expand(1, 5, 4) * 3 / 5)


@backends
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # of PyTorch's own folding
def test_linearize_gives_the_same_at_every_call(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It folds what is constant in a recorded graph; what a rule wrote in place there was lost, or added again."""
    monkeypatch.setitem(sweep.TILE_ELEMENTS, "cpu", 1)  # blocks of 32 rows
    s = make_sample((2,), 40, 7)
    attend: Any = partial(sdpa, backend=backend)
    gradient: Any = torch.func.grad(lambda *x: attend(*x).sin().sum(), argnums=(0, 1, 2))
    for f in (attend, gradient):
        _, along = torch.func.linearize(f, *s.x)
        for scale in (1.0, -2.0, 0.0):
            t = [scale * y for y in s.t]
            exact, found = torch.func.jvp(f, tuple(s.x), tuple(t))[1], along(*t)
            pairs = ([found], [exact]) if isinstance(found, Tensor) else (found, exact)
            assert difference(*pairs) <= CUSTOM_F64


def test_a_boolean_mask_has_no_tangent() -> None:
    s, mask = make_sample(), torch.ones(5, 7, dtype=torch.bool)
    with pytest.raises(DtypeError, match="boolean attn_mask, which has no tangent"):
        sdpa_jvp(*s.x, *s.t, attn_mask=mask, tangent_mask=mask)


def test_statistics_of_too_low_a_precision_are_refused() -> None:
    s = make_sample().to(torch.bfloat16)
    out, lse = sdpa_forward(*s.x, backend="reference")
    with pytest.raises(DtypeError, match=r"lse has dtype torch\.bfloat16; torch\.float32 is needed"):
        sdpa_vjp(*s.x, s.do, out=out, lse=lse, backend="custom")
    with pytest.raises(DtypeError, match="grad_out is a NoneType"):
        sdpa_vjp(*s.x, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "key_batch", "gqa"), [((2, 4), (2, 2), True), ((2, 3), (1, 3), False), ((2, 3), (), False)], ids=str
)
def test_mapped_cotangents_with_broadcast_operands(batch: tuple, key_batch: tuple, gqa: bool) -> None:
    s = make_sample(batch, key_batch=key_batch, options={"enable_gqa": gqa})
    x = s.leaves()
    cotangents = torch.stack([s.do, s.do.sin()])
    out = sdpa(*x, **s.options, backend="custom")
    mapped = torch.autograd.grad(out, x, cotangents, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, x, c, retain_graph=True) for c in cotangents]
    loop = [torch.stack(pair) for pair in zip(*each, strict=True)]
    assert difference(mapped, loop) <= CUSTOM_F64


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_mask_with_half_precision(backend: str, dtype: torch.dtype) -> None:
    s = make_sample().to(dtype)
    mask = torch.randn(5, 7, requires_grad=True)
    out = sdpa(*s.x, mask, backend=backend)
    (grad,) = torch.autograd.grad(out, mask, s.do)
    exact = naive_attention(*s.to(torch.float64).x, attn_mask=mask.double())
    (expected,) = torch.autograd.grad(exact, mask, s.do.double())
    assert out.dtype == dtype
    assert grad.dtype == torch.float32
    assert difference([out], [exact]) <= 4 * torch.finfo(dtype).eps
    assert difference([grad], [expected]) <= 16 * torch.finfo(dtype).eps


@backends
def test_grouped_queries_at_their_edges(backend: str) -> None:
    run: dict[str, Any] = {"enable_gqa": True, "backend": backend}
    q, k, v = torch.randn(1, 4, 3, 5), torch.randn(2, 2, 6, 5), torch.randn(2, 2, 6, 5)
    mask = torch.randn(2, 1, 3, 6)
    expected = F.scaled_dot_product_attention(q.expand(2, 4, 3, 5), k, v, mask, enable_gqa=True)
    torch.testing.assert_close(sdpa(q, k, v, mask, **run), expected)
    assert sdpa(q[:, :0], k[:, :0], v[:, :0], **run).shape == (2, 0, 3, 5)
    with pytest.raises(ArgumentError, match="multiple of key's; given 4 and 0"):
        sdpa(q, k[:, :0], v[:, :0], **run)
    with pytest.raises(ArgumentError, match="key has 2 heads and value 4"):
        sdpa_vjp(q, k, torch.randn(2, 4, 6, 5), torch.randn(2, 4, 3, 5), **run)
    sample = make_sample((2, 4), key_batch=(2, 2))
    row, trow = torch.randn(2, 7, dtype=torch.float64)
    tangent = sdpa_jvp(*sample.x, *sample.t, attn_mask=row, tangent_mask=trow, **run)[0]
    full = sdpa_jvp(*sample.x, *sample.t, attn_mask=row.expand(5, 7), tangent_mask=trow.expand(5, 7), **run)[0]
    assert difference([tangent], [full]) <= CUSTOM_F64


def test_finite_differences_where_the_batch_of_grouped_queries_broadcasts() -> None:
    q, k, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((1, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 5)))
    ones = torch.ones(2, 4, 3, 5, dtype=torch.float64)
    expected = sdpa_hvp(q, k, v, ones, q, k, v, enable_gqa=True)
    assert difference(hvp_fd_vjp(q, k, v, q, k, v, enable_gqa=True), expected) <= HVP_FD_F64


@backends
def test_tensors_without_data(backend: str) -> None:
    s = make_sample().to(device="meta")
    assert sdpa(*s.x, backend=backend).shape == (2, 2, 5, 3)


def test_hvp_keeps_pytorchs_errors_and_checks_its_direction() -> None:
    x = torch.randn(2, 3)

    def loss(p: Tensor) -> Tensor:
        return F.layer_norm(p, (7,)).square().sum()

    with pytest.raises(RuntimeError, match="normalized_shape"):
        theria.hvp(loss, x, x)
    with pytest.raises(TypeError, match="dtypes of params"):
        theria.hvp(lambda p: p.square().sum(), x.double(), x)
    with pytest.raises(ValueError, match="K ≥ 1"):
        theria.hvp(lambda p: p.square().sum(), x, torch.zeros(0, 2, 3))
