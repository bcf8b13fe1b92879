"""Found by attacking the kernels' host side: tensors whose memory is not what they hold, replays of empty calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from theria.ops import sdpa
from theria.ops.explicit import sdpa_hvp, sdpa_jvp, sdpa_vjp
from theria.ops.triton import plans
from theria.testing import difference, naive_attention

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


def outcomes(attend: Callable[..., Tensor], x: Sequence[Tensor], mask: Tensor, do: Tensor, t: Sequence[Tensor]) -> Any:
    """Output, its gradient, the double backward, forward over reverse and forward over forward."""
    x = [y.clone().requires_grad_() for y in x]
    out = attend(*x, attn_mask=mask)
    first = torch.autograd.grad(out, x, do, create_graph=True)
    second = torch.autograd.grad(first, x, t)

    def loss(*y: Tensor) -> Tensor:
        return (attend(*y, attn_mask=mask) * do).sum()

    y = tuple(z.detach() for z in x)
    curvature = torch.func.jvp(torch.func.grad(loss, argnums=(0, 1, 2)), y, tuple(t))[1]

    def tangent(*z: Tensor) -> Tensor:
        return torch.func.jvp(lambda *u: attend(*u, attn_mask=mask), z, tuple(t))[1]

    mixed = torch.func.jvp(tangent, y, tuple(t))
    return [z.detach() for z in (out, *first, *second, *curvature, *mixed)]


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # of an exponent: it becomes -inf, as it should
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [20, 150])
@pytest.mark.parametrize("number", [-1e9, torch.finfo(torch.float32).min, 1e9])
def test_a_row_whose_keys_are_all_masked_by_a_large_number(
    number: float, keys: int, causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Beside it lse cannot hold how many keys there are.

    Rows 0 of the first head and 5 of the second are such rows, row 1 sees two keys, the others all. 20 keys go to the
    short kernels, 150 to the long ones. The truth is plain PyTorch in float32, which loses the scores beside the
    number, too; float64 would not.
    """
    torch.manual_seed(0)
    rows, width = 21, 4
    x = [make(2, n, width).to(dtype) for n in (rows, keys, keys)]
    do, *t = (make(2, n, width).to(dtype) for n in (rows, rows, keys, keys))
    mask = torch.zeros(2, rows, keys, device=DEVICE)
    mask[0, 0], mask[0, 1, 2:], mask[1, 5] = number, -abs(number), number
    found = outcomes(partial(fused, is_causal=causal), x, mask, do, t)
    plain = [y.float() for y in x], mask, do.float(), [y.float() for y in t]
    for mine, right in zip(found, outcomes(partial(naive_attention, is_causal=causal), *plain), strict=True):
        assert mine.dtype == dtype
        assert error(mine, right.double()) <= tolerance


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


@pytest.mark.parametrize("keys", [4, 130])
@pytest.mark.parametrize("shared", ["key", "value"])
def test_only_one_of_key_and_value_is_shared_by_the_heads(shared: str, keys: int) -> None:
    """A program that sums over the heads of a shared key reads keys, values and tangents of the first head alone."""
    q, k, v = make(2, 3, 4), make(2, keys, 4), make(2, keys, 4)
    one, two = (k[0], v) if shared == "key" else (k, v[0])
    x = (q, one, two)
    t, do = [make(*y.shape) for y in x], make(2, 3, 4)
    wanted = 1 if shared == "key" else 2

    def loss(attend: Callable[..., Tensor], *y: Tensor) -> Tensor:
        return (attend(*y) * do.to(y[0].dtype)).sum()

    for argnums in ((wanted,), (0, wanted)):
        exact = tuple(y.double() for y in x), tuple(y.double() for y in t)
        mine = torch.func.jvp(torch.func.grad(partial(loss, fused), argnums=argnums), x, tuple(t))
        right = torch.func.jvp(torch.func.grad(partial(loss, truth), argnums=argnums), *exact)
        for a, b in zip((*mine[0], *mine[1]), (*right[0], *right[1]), strict=True):
            assert error(a, b) <= FLOAT32


def test_a_key_that_a_map_leaves_as_it_is_beside_values_of_each_task() -> None:
    q, k, v = make(3, 5, 4), make(6, 4), make(3, 6, 4)

    def loss(attend: Callable[..., Tensor], k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(lambda q, v: attend(q, k, v).sin())(q, v).sum()

    mine = torch.func.grad(partial(loss, fused))(k, q, v)
    assert error(mine, torch.func.grad(partial(loss, truth))(k.double(), q.double(), v.double())) <= FLOAT32


def test_small_cotangents_in_float16_of_rows_that_are_all_one_large_number() -> None:
    """Each of 1,024 keys has a thousandth of such a row, and of its cotangent, which float16 can hardly hold."""
    torch.manual_seed(0)
    x = [make(1, n, 4).half() for n in (16, 1024, 1024)]
    do, *t = (1e-4 * make(1, 16, 4)).half(), *(make(*y.shape).half() for y in x)
    mask = torch.full((16, 1024), -1e9, device=DEVICE)

    def derivatives(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        y = [z.to(dtype).requires_grad_() for z in x]
        first = torch.autograd.grad(attend(*y, attn_mask=mask), y, do.to(dtype), create_graph=True)
        return [*(z.detach() for z in first), *torch.autograd.grad(first, y, [z.to(dtype) for z in t])]

    exact = derivatives(naive_attention, torch.float32)
    in_half = derivatives(partial(sdpa, backend="custom"), torch.float16)
    for mine, other, right in zip(derivatives(fused, torch.float16), in_half, exact, strict=True):
        assert error(mine, right.double()) <= 1.2 * error(other, right.double()) + 1e-3


def test_seeds_are_mapped_beside_an_additive_mask() -> None:
    q, k, v = make(1, 4, 8), make(1, 140, 8), make(1, 140, 8)
    mask, seeds = make(4, 140), torch.tensor([1, 2], device=DEVICE)

    def gradient(seed: Tensor, backend: str) -> Tensor:
        return torch.func.grad(lambda q: sdpa(q, k, v, mask, 0.3, seed=seed, backend=backend).sin().sum())(q)

    mine, right = (torch.vmap(partial(gradient, backend=name))(seeds) for name in ("triton", "reference"))
    assert error(mine, right.double()) <= FLOAT32
