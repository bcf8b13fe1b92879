"""What the GPU benchmark runs: the implementations side by side and the work that is the same for all of them.

An order is prepared for one implementation and gives a function without arguments that does the work and returns its
results, (B, H, N, D) each; what the work starts from (the forward, the graph of first gradients) is done beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from theria.ops import sdpa, sdpa_forward, sdpa_hvp, sdpa_vjp
from theria.testing import naive_attention

Work = Callable[[], tuple[Tensor, ...]]


class Inputs(NamedTuple):
    """Operands, cotangent of the output, a direction, tangent of the cotangent."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    tq: Tensor
    tk: Tensor
    tv: Tensor
    tdo: Tensor

    @property
    def x(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def t(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.tq, self.tk, self.tv


def make_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cuda") -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    return Inputs(*(torch.randn(shape, dtype=dtype, device=device, generator=generator) for _ in range(8)))


@dataclass(frozen=True)
class Candidate:
    """One implementation.

    Attributes:
        attend: attention of (q, k, v, is_causal=), differentiable as far as it goes.
        double: the whole double backward as one function of (inputs, causal); None where autograd does it.
        hvp: forward over reverse as one function of (inputs, residuals, causal); the residuals are those of the orders
            below, by the names of `sdpa_hvp`.
    """

    name: str
    attend: Callable[..., Tensor] | None = None
    double: Callable[..., tuple[Tensor, ...]] | None = None
    hvp: Callable[..., tuple[Tensor, ...]] | None = None


def prepare(candidate: Candidate, order: str, inputs: Inputs, causal: bool) -> Work:
    """The work of one order."""
    if candidate.attend is None:
        assert candidate.double is not None
        return partial(candidate.double, inputs, causal)
    return ORDERS[order](candidate, inputs, causal)


def _forward(candidate: Candidate, inputs: Inputs, causal: bool) -> Work:
    assert candidate.attend is not None
    attend = candidate.attend
    return lambda: (attend(*inputs.x, is_causal=causal),)


def _vjp(candidate: Candidate, inputs: Inputs, causal: bool) -> Work:
    assert candidate.attend is not None
    x = [a.detach().requires_grad_() for a in inputs.x]
    out = candidate.attend(*x, is_causal=causal)
    return lambda: torch.autograd.grad(out, x, inputs.do, retain_graph=True)


def _jvp(candidate: Candidate, inputs: Inputs, causal: bool) -> Work:
    """Output and tangent."""
    assert candidate.attend is not None
    return partial(torch.func.jvp, partial(candidate.attend, is_causal=causal), inputs.x, inputs.t)


def _double_backward(candidate: Candidate, inputs: Inputs, causal: bool) -> Work:
    """Cotangents of dQ, dK, dV to gradients of Q, K, V and dO."""
    assert candidate.attend is not None
    x, do = [a.detach().requires_grad_() for a in inputs.x], inputs.do.detach().requires_grad_()
    grads = torch.autograd.grad(candidate.attend(*x, is_causal=causal), x, do, create_graph=True)
    return lambda: torch.autograd.grad(grads, [*x, do], inputs.t, retain_graph=True)


def _forward_over_reverse(candidate: Candidate, inputs: Inputs, causal: bool) -> Work:
    """Tangents of dQ, dK, dV along tangents of Q, K, V and dO."""
    assert candidate.hvp is not None
    backend = "triton" if candidate is THERIA else "custom"
    residuals = dict(zip(("out", "lse"), sdpa_forward(*inputs.x, is_causal=causal, backend=backend), strict=True))
    dq, *_ = sdpa_vjp(*inputs.x, inputs.do, is_causal=causal, backend=backend, **residuals)
    return partial(candidate.hvp, inputs, residuals | {"dquery": dq}, causal)


ORDERS = {
    "forward": _forward,
    "vjp": _vjp,
    "jvp": _jvp,
    "double backward": _double_backward,
    "forward over reverse": _forward_over_reverse,
}


def fused(backend: SDPBackend) -> Callable[..., Tensor]:
    """PyTorch's attention on one of its backends."""

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    return attend


def closed_form(inputs: Inputs, causal: bool) -> tuple[Tensor, ...]:
    """The double backward by its formulas (theria/ops/README.md (5)-(18)), (N, M) matrices and all: 12 products."""
    q, k, v, do, tq, tk, tv, _ = inputs
    scale = q.shape[-1] ** -0.5
    s = (q @ k.mT) * scale
    if causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), float("-inf"))
    p = s.softmax(-1)
    ts = (tq @ k.mT + q @ tk.mT) * scale
    tp = p * (ts - (p * ts).sum(-1, keepdim=True))
    dp, tdp = do @ v.mT, do @ tv.mT
    dp = dp - (p * dp).sum(-1, keepdim=True)
    ds = p * dp
    y = tp * dp + p * tdp
    tds = y - p * y.sum(-1, keepdim=True)
    dq, dk = (tds @ k + ds @ tk) * scale, (tds.mT @ q + ds.mT @ tq) * scale
    return dq, dk, tp.mT @ do, tp @ v + p @ tv


def _compiled(inputs: Inputs, causal: bool) -> tuple[Tensor, ...]:
    return torch.compile(closed_form, dynamic=False)(inputs, causal)


def _hvp(inputs: Inputs, residuals: dict[str, Any], causal: bool, backend: str = "triton") -> tuple[Tensor, ...]:
    return sdpa_hvp(*inputs.x, inputs.do, *inputs.t, inputs.tdo, is_causal=causal, backend=backend, **residuals)


def _math_hvp(inputs: Inputs, residuals: dict[str, Any], causal: bool) -> tuple[Tensor, ...]:
    del residuals

    def gradients(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(partial(naive_attention, is_causal=causal), q, k, v)[1](do)

    return torch.func.jvp(gradients, (*inputs.x, inputs.do), (*inputs.t, inputs.tdo))[1]


def _jvp_flash_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    from jvp_flash_attention.jvp_attention import JVPAttn  # type: ignore[import-not-found]

    return JVPAttn.fwd_dual(q, k, v, causal=is_causal)


THERIA = Candidate("theria", partial(sdpa, backend="triton"), hvp=_hvp)
MATH = Candidate("math", fused(SDPBackend.MATH), hvp=_math_hvp)
FLASH = Candidate("flash", fused(SDPBackend.FLASH_ATTENTION))
CUDNN = Candidate("cudnn", fused(SDPBackend.CUDNN_ATTENTION))
EAGER = Candidate("closed form", double=closed_form)
COMPILED = Candidate("compiled", double=_compiled)
JVP_FLASH = Candidate("jvp_flash_attention", _jvp_flash_attention)
TRUTH = Candidate("truth", partial(sdpa, backend="custom"), hvp=partial(_hvp, backend="custom"))


def missing(candidate: Candidate) -> str | None:
    """Why a candidate cannot run here."""
    if candidate is JVP_FLASH and find_spec("jvp_flash_attention") is None:
        return "not installed"
    return None
