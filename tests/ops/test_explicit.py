"""The explicit rules against autograd of the naive formula, with and without residuals, groups and mask gradients."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp

from tests.boundary import WITH_TRUTH, ids
from tests.tolerances import CUSTOM_F64, FINITE_DIFFERENCE_F64, HVP_FD_F32, HVP_FD_F64
from theria import ops
from theria.ops import hvp_fd_vjp, sdpa_forward, sdpa_hvp, sdpa_jvp, sdpa_jvp_jvp, sdpa_vjp
from theria.testing import Sample, difference, make_sample, naive_attention

backends = pytest.mark.parametrize("backend", ["reference", "custom", "auto"])
samples = pytest.mark.parametrize("sample", WITH_TRUTH, ids=ids)


def naive(s: Sample) -> Any:
    return lambda *x: naive_attention(*x, **s.options)


def naive_lse(q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """Log-sum-exp by attention to a value that is one at a single key, for plain and causal calls."""
    S = q @ k.mT * options.get("scale", q.shape[-1] ** -0.5)
    if options.get("is_causal"):
        S = S.masked_fill(torch.ones_like(S, dtype=torch.bool).triu(1), float("-inf"))
    return S.logsumexp(-1)


@backends
@samples
def test_five_rules(backend: str, sample: Sample) -> None:
    s = sample
    run: dict[str, Any] = {"backend": backend, **s.options}
    out, lse = sdpa_forward(*s.x, **run)
    assert lse.shape == out.shape[:-1]
    residuals: dict[str, Any] = {"out": out, "lse": lse}
    expected, expected_tangent, *_ = jvp(naive(s), s.x, s.t)

    def directional(*x: Tensor) -> Tensor:
        return (naive(s)(*x) * s.do).sum()

    expected_grads = vjp(naive(s), *s.x)[1](s.do)
    expected_hvp = jvp(grad(directional, (0, 1, 2)), s.x, s.t)[1]
    expected_second = jvp(lambda *x: jvp(naive(s), x, s.t)[1], s.x, s.u)[1]
    assert difference([out], [expected]) <= CUSTOM_F64
    for extra in ({}, residuals):
        assert difference(sdpa_vjp(*s.x, s.do, **extra, **run), expected_grads) <= CUSTOM_F64
        assert difference(sdpa_jvp(*s.x, *s.t, **extra, **run)[:1], [expected_tangent]) <= CUSTOM_F64
        assert difference(sdpa_hvp(*s.x, s.do, *s.t, **extra, **run), expected_hvp) <= CUSTOM_F64
        second = sdpa_jvp_jvp(*s.x, s.t, s.u, **extra, **run)
        # a single key has no curvature: what is compared is rounding
        assert difference([second], [expected_second]) <= CUSTOM_F64 or second.abs().max() < 1e-15


@backends
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}], ids=str)
def test_lse_and_its_tangent(backend: str, options: dict[str, Any]) -> None:
    s = make_sample()
    _, lse = sdpa_forward(*s.x, **options, backend=backend)
    _, tau = sdpa_jvp(*s.x, *s.t, **options, backend=backend)
    expected, tangent, *_ = jvp(partial(naive_lse, **options), s.x[:2], s.t[:2])
    assert difference([lse], [expected]) <= CUSTOM_F64
    assert difference([tau], [tangent]) <= CUSTOM_F64


@backends
def test_tangent_of_the_cotangent(backend: str) -> None:
    """Forward over reverse in (x, dO) jointly."""
    s = make_sample()
    tdo = torch.randn_like(s.do)

    def pull(x: Any, do: Tensor) -> Any:
        return vjp(partial(naive_attention, **s.options), *x)[1](do)

    expected = jvp(pull, (s.x, s.do), (s.t, tdo))[1]
    assert difference(sdpa_hvp(*s.x, s.do, *s.t, tdo, backend=backend), expected) <= CUSTOM_F64


@backends
def test_mask_cotangents_to_second_order(backend: str) -> None:
    s = make_sample()
    mask, tmask = (torch.randn(2, 1, 5, 7, dtype=torch.float64) for _ in range(2))

    def pull(x: Any, mask: Tensor) -> Any:
        return vjp(lambda x, mask: naive_attention(*x, attn_mask=mask), x, mask)[1](s.do)

    (dx, dmask), (tdx, tdmask), *_ = jvp(pull, (s.x, mask), (s.t, tmask))
    run: dict[str, Any] = {"attn_mask": mask, "mask_grad": True, "backend": backend}
    assert difference(sdpa_vjp(*s.x, s.do, **run), (*dx, dmask)) <= CUSTOM_F64
    hvp = sdpa_hvp(*s.x, s.do, *s.t, tangent_mask=tmask, **run)
    assert difference(hvp, (*tdx, tdmask)) <= CUSTOM_F64


@backends
def test_absent_tangents_are_zero_tangents(backend: str) -> None:
    s = make_sample()
    zeros = [torch.zeros_like(x) for x in s.x]
    for bits in range(8):
        some = [t if bits >> i & 1 else None for i, t in enumerate(s.t)]
        full = [z if t is None else t for t, z in zip(some, zeros, strict=True)]
        a, b = (sdpa_hvp(*s.x, s.do, *t, backend=backend) for t in (some, full))
        assert difference(a, b) <= CUSTOM_F64
        a, b = (sdpa_jvp(*s.x, *t, backend=backend) for t in (some, full))
        assert difference(a, b) <= CUSTOM_F64
        a, b = (sdpa_jvp_jvp(*s.x, t, s.u, (None, s.t[1], None), backend=backend) for t in (some, full))
        assert difference([a], [b]) <= CUSTOM_F64


@backends
def test_mixed_tangents(backend: str) -> None:
    """∂²/∂ε₁∂ε₂ along x + ε₁t + ε₂u + ε₁ε₂w, w being the mixed tangents."""
    s = make_sample()
    w = tuple(torch.randn_like(x) for x in s.x)
    zero = torch.zeros((), dtype=torch.float64)

    def path(e1: Tensor, e2: Tensor) -> Tensor:
        rows = zip(s.x, s.t, s.u, w, strict=True)
        return naive_attention(*(a + e1 * b + e2 * c + e1 * e2 * d for a, b, c, d in rows))

    one = torch.ones_like(zero)
    expected = jvp(lambda e2: jvp(lambda e1: path(e1, e2), (zero,), (one,))[1], (zero,), (one,))[1]
    assert difference([sdpa_jvp_jvp(*s.x, s.t, s.u, w, backend=backend)], [expected]) <= CUSTOM_F64


@backends
def test_jvp_against_central_differences(backend: str) -> None:
    s, h = make_sample(), 1e-5
    plus, minus = ([a + sign * h * b for a, b in zip(s.x, s.t, strict=True)] for sign in (1, -1))
    expected = (naive_attention(*plus) - naive_attention(*minus)) / (2 * h)
    assert difference(sdpa_jvp(*s.x, *s.t, backend=backend)[:1], [expected]) <= FINITE_DIFFERENCE_F64


@backends
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, HVP_FD_F64), (torch.float32, HVP_FD_F32)], ids=str)
def test_finite_difference_hvp_scales_its_step(
    backend: str, magnitude: float, dtype: torch.dtype, bound: float
) -> None:
    """The same accuracy for inputs and directions of any size, in both precisions; statistics are recomputed."""
    s = make_sample()
    size = magnitude**0.5
    q, k, v = ((a * factor).to(dtype) for a, factor in zip(s.x, (size, size, 1.0), strict=True))
    for stretch in (1e-4, 1.0, 1e4):
        tq, tk, tv = (a * stretch for a in s.t)
        low = (tq.to(dtype), tk.to(dtype), tv.to(dtype))
        product = hvp_fd_vjp(q, k, v, *low, grad_out=s.do.to(dtype), backend=backend)
        exact = sdpa_hvp(q.double(), k.double(), v.double(), s.do, tq, tk, tv, backend="reference")
        assert difference(product, exact) <= bound


def test_seed_names() -> None:
    """sdpa_bwd_* take the row statistics m and l; their cotangents are those of the vjp."""
    s = make_sample()
    q, k, v = s.x
    scale = q.shape[-1] ** -0.5
    S = q @ k.mT * scale
    m = S.amax(-1)
    l = (S - m[..., None]).exp().sum(-1)
    expected = vjp(naive_attention, *s.x)[1](s.do)
    dq = ops.sdpa_bwd_dq(q, k, v, s.do, m, l, scale)
    dk = ops.sdpa_bwd_dk(q, k, v, s.do, m, l, scale)
    dv = ops.sdpa_bwd_dv(q, k, s.do, m, l, scale)
    assert difference((dq, dk, dv), expected) <= CUSTOM_F64
    ones = jvp(grad(lambda *x: naive_attention(*x).sum(), (0, 1, 2)), s.x, s.t)[1]
    assert difference(hvp_fd_vjp(*s.x, *s.t), ones) <= HVP_FD_F64


def test_grouped_queries_keep_the_callers_shapes() -> None:
    s = make_sample((2, 6), key_batch=(2, 2), options={"enable_gqa": True})
    grads = sdpa_hvp(*s.x, s.do, *s.t, **s.options)
    assert [g.shape for g in grads] == [x.shape for x in s.x]
