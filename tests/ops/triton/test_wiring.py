"""What lies between the public functions and the kernels: choice of kernels, sizes of zero, layouts, imports."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from tests.tolerances import TRITON_F32
from theria.ops import sdpa, sdpa_forward, sdpa_hvp, sdpa_jvp, sdpa_vjp
from theria.testing import COMPOSITIONS, difference, make_sample

pytest.importorskip("triton")

from theria.ops.operands import AttentionSpec, Operands, Tangents
from theria.ops.triton import rules
from theria.ops.triton.launch import Frame

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = AttentionSpec("triton", 0.5)
attend = partial(sdpa, backend="triton")
truth = partial(sdpa, backend="reference")


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def test_triton_is_imported_with_the_first_call() -> None:
    program = (
        "import sys, torch, theria\n"
        "x = torch.ones(1, 2, 4)\n"
        "theria.sdpa(x, x, x), theria.explain(x, x, x)\n"
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PATH": "", "TRITON_INTERPRET": "0"})


@pytest.mark.parametrize(("batch", "N", "M"), [((0,), 3, 4), ((2,), 0, 4), ((2,), 3, 0), ((2, 0), 0, 0)], ids=str)
def test_calls_without_a_score(batch: tuple[int, ...], N: int, M: int) -> None:
    sample = make_sample(batch, N, M, 4, 3).to(torch.float32, DEVICE)
    for composition in ("forward", "double_backward", "forward_over_reverse", "forward_over_forward"):
        results, expected = (COMPOSITIONS[composition](f, sample) for f in (attend, truth))
        assert [x.shape for x in results] == [x.shape for x in expected]
        assert all(x.eq(0).all() for x in results)
    assert sdpa_forward(*sample.x, backend="triton")[1].eq(float("-inf")).all()


def test_a_zero_direction_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    s = make_sample((2,), 3, 4, 2, 3).to(torch.float32, DEVICE)
    residuals = dict(zip(("out", "lse"), sdpa_forward(*s.x, backend="triton"), strict=True))
    tdo = torch.randn_like(s.do)
    along_do = sdpa_hvp(*s.x, s.do, tangent_grad_out=tdo, backend="triton", **residuals)
    assert difference(along_do, sdpa_vjp(*s.x, tdo, backend="triton")) == 0.0
    monkeypatch.setattr(Frame, "describe", None)
    assert all(x.eq(0).all() for x in sdpa_jvp(*s.x, backend="triton", **residuals))
    assert all(x.eq(0).all() for x in sdpa_hvp(*s.x, s.do, backend="triton", **residuals))


def call(N: int, M: int, D: int, E: int, lead: tuple[int, ...] = (2,)) -> tuple[Any, ...]:
    ops = Operands(rand(*lead, N, D), rand(*lead, M, D), rand(*lead, M, E), None, None)
    o, lse = rules.forward(ops, SPEC)
    t = Tangents(*(torch.randn_like(x) for x in ops[:3]))
    return ops, o, lse, torch.randn_like(o), t, torch.randn_like(o)


def test_short_and_long_kernels_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, o, lse, do, t, tdo = call(5, 7, 4, 3)
    shapes = ops.q.shape, ops.k.shape, ops.v.shape, None
    results = []
    for short in (True, False):
        monkeypatch.setattr(rules.short, "fits", lambda *_, short=short: short)
        vjp = rules.vjp(ops, o, lse, do, SPEC, shapes)
        results.append((*vjp[:3], *rules.jvp_hvp(ops, o, lse, do, None, t, tdo, SPEC, shapes)[:5]))
    assert difference(*results) <= TRITON_F32


def test_long_keys_go_to_the_long_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules.short, "vjp_short", None)
    ops, o, lse, do, *_ = call(2, 1000, 2, 2, (1,))
    dq, *_ = rules.vjp(ops, o, lse, do, SPEC, (ops.q.shape, None, None, None))
    assert dq is not None
    assert dq.isfinite().all()


def test_more_leading_dimensions_than_a_kernel_addresses() -> None:
    """Nested maps over different operands at different depths, which no four strides describe."""
    x = rand(2, 2, 2, 3, 2), rand(2, 2, 2, 4, 2), rand(2, 2, 2, 4, 3)

    def nested(f: Any) -> Tensor:
        for dims in ((0, None, None), (None, 0, 0), (0, None, 0), (None, 0, None), (0, 0, 0)):
            f = vmap(f, dims)
        return f(*x)

    assert difference([nested(attend)], [nested(truth)]) <= TRITON_F32


@pytest.mark.parametrize("name", ["rows", "columns", "offset", "expanded"])
def test_layouts_give_what_contiguous_copies_give(name: str) -> None:
    layouts = {
        "rows": lambda x: x[..., ::2, :],
        "columns": lambda x: x.mT.contiguous().mT[..., ::2, :],
        "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)[..., ::2, :],
        "expanded": lambda x: x[:1, ..., ::2, :].expand(2, -1, -1, -1),
    }
    x = [layouts[name](rand(2, 2, 6, 4)) for _ in range(3)]
    copies = [a.contiguous() for a in x]
    do, t = rand(2, 2, 3, 4), copies[::-1]
    results = [
        sdpa_hvp(q, k, v, layouts[name](rand(2, 2, 6, 4)) * 0 + do, *t, backend="triton") for q, k, v in (x, copies)
    ]
    # on a device an unaligned tensor has a program of its own, which may order its additions differently
    exact = DEVICE == "cpu" or name != "offset"
    assert all(a.equal(b) if exact else difference((a,), (b,)) <= TRITON_F32 for a, b in zip(*results, strict=True))


def test_outputs_have_the_layout_of_the_queries() -> None:
    """A (B, N, H, D) projection gives a (B, N, H, E) output in memory, as PyTorch's fused attention does."""
    q, k, v = (rand(2, 5, 3, 4).transpose(1, 2).requires_grad_() for _ in range(3))
    out = attend(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.transpose(1, 2).is_contiguous() for g in grads)


def test_a_mask_that_is_differentiated_too_deep_to_be_seen_is_refused() -> None:
    ops, o, lse, do, t, _ = call(3, 4, 2, 2)
    mask = rand(1, 3, 4)
    with pytest.raises(NotImplementedError, match="backend='custom' can"):
        rules.jvp(ops._replace(mask=mask), o, lse, t._replace(mask=mask), SPEC)
    with pytest.raises(NotImplementedError, match="backend='custom' can"):
        rules.vjp(ops._replace(mask=mask), o, lse, do, SPEC, (None, None, None, mask.shape))
