"""Derivatives of lse, and of its tangent tau, beside those of the closed formula and of finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tests.ops.triton.calls import DEVICE
from tests.tolerances import CUSTOM_F64
from theria.ops import sdpa_forward, sdpa_jvp
from theria.testing import difference

FLOAT32 = 2e-6  # what float32 "highest" may be off float64
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True},
    "a row without a key": {"attn_mask": torch.arange(3)[:, None] != 1},
    "additive": {"attn_mask": torch.tensor([0.3, -1.0, 2.0, 0.1, -0.4, 0.0], dtype=torch.float64)},
    "dropout": {"dropout_p": 0.5, "seed": 3},
    "scaled": {"scale": -0.7},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def operands(grouped: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and tangents of q and k; the batch of v is larger than that of the others."""
    torch.manual_seed(0)
    heads = 2 if grouped else 4
    shapes = (1, 4, 3, 5), (1, heads, 6, 5), (2, heads, 6, 2)
    x = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return x, [torch.randn_like(y) for y in x[:2]]


def lse_of(v: Tensor, options: dict[str, Any], backend: str) -> Callable[..., Tensor]:
    return lambda q, k: sdpa_forward(q, k, v, backend=backend, **options)[1]


def tau_of(v: Tensor, options: dict[str, Any], backend: str) -> Callable[..., Tensor]:
    return lambda q, k, tq, tk: sdpa_jvp(q, k, v, tq, tk, backend=backend, **options)[1]


def finite(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Without the rows that see no key, whose lse is −∞."""
    return lambda *x: (y := f(*x))[y.isfinite()]


@options
def test_gradcheck(options: dict[str, Any]) -> None:
    (q, k, v), t = operands("enable_gqa" in options)
    leaves = [x.requires_grad_() for x in (q, k)]
    lse = finite(lse_of(v, options, "custom"))
    assert gradcheck(lse, leaves, check_forward_ad=True)
    assert gradgradcheck(lse, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)
    assert gradcheck(tau_of(v, options, "custom"), (*leaves, *(x.requires_grad_() for x in t)), check_forward_ad=True)


@pytest.mark.parametrize(
    ("backend", "name"), [*(("custom", name) for name in OPTIONS), ("triton", "causal"), ("triton", "grouped")]
)
def test_beside_the_closed_formula(backend: str, name: str) -> None:
    """A loss of the output and of lse, as merging the parts of a long sequence has it; and of tau."""
    options = OPTIONS[name]
    x, t = operands("enable_gqa" in options)
    w = torch.rand(2, 4, 3, dtype=torch.float64)

    def results(backend: str, move: Callable[[Any], Any]) -> list[Tensor]:
        q, k, v, *directions, weight = map(move, (*x, *t, w))
        rules = {name: move(y) if isinstance(y, Tensor) else y for name, y in options.items()}

        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            o, lse = sdpa_forward(q, k, v, backend=backend, **rules)
            return (lse.masked_fill(lse.isinf(), 0.0).sin() * weight).sum() + (o * o).sum()

        def of_tangents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            to, tau = sdpa_jvp(q, k, v, *directions, backend=backend, **rules)
            return (tau.sin() * weight).sum() + (to * to).sum()

        gradient = torch.func.grad(loss, argnums=(0, 1, 2))
        mapped = torch.vmap(lambda q: gradient(q, k, v))(torch.stack([q, 2 * q]))
        along = torch.func.jvp(lambda q, k: gradient(q, k, v), (q, k), tuple(directions))[1]
        forward = torch.func.jvp(lambda q, k: loss(q, k, v), (q, k), tuple(directions))[1]
        return [*gradient(q, k, v), *mapped, *along, forward, *torch.func.grad(of_tangents, argnums=(0, 1, 2))(q, k, v)]

    def to_gpu(y: Tensor) -> Tensor:
        return y.to(DEVICE, torch.float32 if y.is_floating_point() else y.dtype)

    exact, found = results("reference", lambda y: y), results(backend, to_gpu if backend == "triton" else lambda y: y)
    assert difference([y.cpu() for y in found], exact) <= (FLOAT32 if backend == "triton" else CUSTOM_F64)


@pytest.mark.parametrize("backend", ["custom", "reference"])
def test_with_respect_to_an_additive_mask(backend: str) -> None:
    (q, k, v), (tq, tk) = operands()
    mask = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    tmask, w = torch.randn(3, 6, dtype=torch.float64), torch.rand(2, 4, 3, dtype=torch.float64)

    def plain(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return torch.logsumexp(q @ k.mT * 5**-0.5 + mask, -1).expand(2, 4, 3)

    def lse(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return sdpa_forward(q, k, v, attn_mask=mask, backend=backend)[1]

    exact = torch.func.jvp(plain, (q, k, mask), (tq, tk, tmask))[1]
    to, tau = sdpa_jvp(q, k, v, tq, tk, attn_mask=mask, tangent_mask=tmask, backend=backend)
    assert difference([torch.func.jvp(lse, (q, k, mask), (tq, tk, tmask))[1], tau], [exact, exact]) <= CUSTOM_F64
    to.sum().backward(retain_graph=True)
    of_tau = sdpa_jvp(q, k, v, tq, tk, attn_mask=mask, backend=backend)[1]
    pairs = [(of_tau, torch.func.jvp(lambda q, k: plain(q, k, mask), (q, k), (tq, tk))[1])]
    if backend == "reference":
        pairs += [(lse(q, k, mask), plain(q, k, mask)), (tau, exact)]
    else:
        for x in (lse(q, k, mask), tau):
            with pytest.raises(NotImplementedError, match="no derivative of lse with respect to attn_mask"):
                x.sum().backward()
    for x in pairs:
        grads = [torch.autograd.grad((y * w).sum(), mask)[0] for y in x]
        assert difference(grads[:1], grads[1:]) <= CUSTOM_F64
