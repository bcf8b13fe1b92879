"""Found by attacking the kernels' host side: tensors whose memory is not what they hold, replays of empty calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from theria.ops import sdpa
from theria.ops.explicit import sdpa_hvp, sdpa_jvp, sdpa_vjp
from theria.ops.triton import plans
from theria.testing import difference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32 = 2e-6  # what float32 "highest" may be off float64
fused: Callable[..., Tensor] = partial(sdpa, backend="triton")
neg_view: Callable[..., Tensor] = torch.ops.aten._neg_view.default
zeros_without_memory: Callable[..., Tensor] = torch.ops.aten._efficientzerotensor.default
truth: Callable[..., Tensor] = partial(sdpa, backend="reference")


def make(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def error(actual: Tensor, exact: Tensor) -> float:
    return difference([actual.cpu()], [exact.cpu()])


def test_a_call_without_heads_is_not_replayed_as_one_of_its_inputs() -> None:
    q, k, v = make(1, 1, 3, 4), make(1, 1, 5, 4), make(0, 1, 5, 4)
    for _ in range(3):
        x = [y.clone().requires_grad_() for y in (q, k, v)]
        o = fused(*x)
        assert o.shape == (0, 1, 3, 4)
        grads = torch.autograd.grad(o, x, torch.zeros_like(o))
        assert [g.shape for g in grads] == [y.shape for y in x]
        assert not grads[0].any()
        assert not grads[1].any()


@pytest.mark.parametrize("width", [1, 4])
def test_negative_views_have_their_sign(width: int) -> None:
    """The imaginary part of a conjugate shares memory with its negative; with width 1 nothing else asks for a copy."""
    q, k, v = make(2, 2, 3, 4), make(2, 2, 5, 4), make(2, 2, 5, width)
    fused(q, k, v)  # a layout that is then replayed
    for negative in (neg_view(v), torch.complex(v, v).conj().imag):
        assert negative.is_neg()
        assert error(fused(q, k, negative), truth(q.double(), k.double(), -v.double())) <= FLOAT32
    do = make(2, 2, 3, width)
    for mine, exact in zip(
        sdpa_vjp(q, k, v, neg_view(do), backend="triton"),
        sdpa_vjp(*(x.double() for x in (q, k, v, -do)), backend="reference"),
        strict=True,
    ):
        assert error(mine, exact) <= FLOAT32


def test_zeros_without_memory_are_zeros() -> None:
    """Forward mode makes such tensors; a kernel must not be given their address."""
    q, k, v, do = make(1, 2, 3, 4), make(1, 2, 5, 4), make(1, 2, 5, 4), make(1, 2, 3, 4)
    nothing = zeros_without_memory(q.shape, device=DEVICE)
    still = torch.zeros_like(q)
    for _ in range(2):
        assert fused(nothing, k, v).equal(fused(still, k, v))
        for rule, rest in ((sdpa_vjp, ()), (sdpa_jvp, (k, v)), (sdpa_hvp, (nothing, k, v))):
            with_nothing = rule(q, k, v, nothing, *rest, backend="triton")
            with_zeros = rule(q, k, v, still, *(still if x is nothing else x for x in rest), backend="triton")
            assert error(torch.cat([x.flatten() for x in with_nothing]),
                         torch.cat([x.flatten() for x in with_zeros]).double()) <= FLOAT32  # fmt: skip
    assert sdpa_vjp(q, k, v, do, backend="triton")[0].any()


@pytest.fixture
def newer_names() -> Iterator[None]:
    """The setting of float32 products by the names that torch.get_float32_matmul_precision() refuses to mix with."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before
    torch.get_float32_matmul_precision()  # tells again


@pytest.mark.usefixtures("newer_names")
def test_the_precision_of_products_may_be_set_by_its_newer_names() -> None:
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        torch.get_float32_matmul_precision()
    assert plans.matmul_precision() == "high"
    q, k, v = make(1, 2, 3, 4), make(1, 2, 5, 4), make(1, 2, 5, 4)
    exact = truth(q.double(), k.double(), v.double())
    assert error(fused(q, k, v), exact) <= 5e-3  # TensorFloat-32 keeps ten bits
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert plans.matmul_precision() == "highest"
    assert error(fused(q, k, v), exact) <= FLOAT32


class ClearedByAnother(dict[Any, Any]):
    """Plans that another thread clears as soon as this one has looked. (Triton's interpreter has no threads.)"""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self.clear()
        return found


def test_plans_may_be_cleared_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_plans", ClearedByAnother())
    call = make(1, 1, 3, 4), make(1, 1, 5, 4), make(1, 1, 5, 4)
    first = fused(*call)
    assert fused(*call).equal(first)
