"""Float32 operands as two fp16 parts: what they hold, and results that no other row can spoil."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import pytest
import torch
from torch import Tensor

from tests.ops.triton.calls import DEVICE, call, error, exact, make
from tests.tolerances import TRITON_F32

pytest.importorskip("triton")
from theria.ops import reference
from theria.ops.operands import Operands, Tangents
from theria.ops.triton.hvp import hvp
from theria.ops.triton.jvp import jvp, jvp_before_hvp
from theria.ops.triton.jvp_jvp import GROUPS, OPERANDS
from theria.ops.triton.launch import Frame
from theria.ops.triton.parts import SplitFrame, splits, with_parts
from theria.testing.kernels import make_problem

N, M, D = 40, 70, 16


def parts_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hi, lo and factors of the rows of a (1, N, D) tensor as kernels are given them."""
    frame = with_parts(Frame(*call(x, x, x)), ("q",))
    assert isinstance(frame, SplitFrame)
    hi, lo = frame.parts["q"].view(torch.float16).unflatten(-1, (2, -1)).double().unbind(-2)
    factors = frame.factors["rows"][..., : x.shape[-2], :1].double()
    return hi[..., : x.shape[-1]], lo[..., : x.shape[-1]], factors


def scales(rows: int, decades: float) -> Tensor:
    return 10 ** ((2 * torch.rand(rows, 1, device=DEVICE) - 1) * decades)


@pytest.mark.parametrize("width", [3, 8, 16])
@pytest.mark.parametrize("decades", [0.0, 30.0])
def test_parts_hold_rows_of_any_scale(width: int, decades: float) -> None:
    x = make(1, N, width) * scales(N, decades)
    hi, lo, factors = parts_of(x)
    largest = x.double().abs().amax(-1, keepdim=True)
    assert (torch.frexp(factors).mantissa == 0.5).all()
    assert (hi.abs() < 2.0**10).all()
    assert (((hi + lo) * factors - x).abs() <= 2.0**-23 * x.double().abs() + 2.0**-33 * largest).all()


def test_extremes_are_held() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0**-149, 2.0**-130], [3.4e38, -1.0], [1.0, 2.0**-40]], device=DEVICE)[None]
    hi, lo, factors = parts_of(x)
    back = (hi + lo) * factors
    assert torch.equal(back[0, :2], x[0, :2].double())
    assert error(back, x.double()) < 2.0**-23
    with numpy.errstate(invalid="ignore"):  # in the interpreter
        hi, lo, factors = parts_of(
            torch.tensor([[[float("inf"), 1.0], [float("nan"), 1.0], [1.0, 1.0]]], device=DEVICE)
        )
    assert not ((hi + lo) * factors)[0, :2, 0].isfinite().any()
    assert torch.equal(((hi + lo) * factors)[0, 2], torch.ones(2, device=DEVICE).double())


def test_an_operand_of_any_group_has_its_width_and_its_factors() -> None:
    """The mixed second tangent has four operands of each width."""
    ops, spec = call(*(make(2, rows, width) * scales(rows, 4) for rows, width in ((N, 5), (M, 5), (M, 19))))
    given = {"tq": ops.q, "tk": ops.k, "tv": ops.v, "tq2": ops.q, "tk2": ops.k, "ttq": ops.q, "ttk": ops.k}
    given |= {"tv2": ops.v, "ttv": ops.v}
    tensors = {name: x * scales(x.shape[-2], 4) for name, x in given.items() if name != "tk2"}
    frame = with_parts(Frame(ops, spec, **tensors), OPERANDS, GROUPS)
    assert isinstance(frame, SplitFrame)
    assert frame.parts.keys() == set(OPERANDS) - {"tk2"}
    for group, names in GROUPS.items():
        assert frame.factors[group].shape == (2, 256, 4)
        for index, name in enumerate(names):
            if name == "tk2":
                assert (frame.factors[group][..., index] == 1).all()
                continue
            x = frame.tensors[name]
            hi, lo = frame.parts[name].view(torch.float16).unflatten(-1, (2, -1)).double().unbind(-2)
            back = (hi + lo)[..., : x.shape[-1]] * frame.factors[group][:, : x.shape[-2], index, None].double()
            assert worst_row(back, x.double()) < 2.0**-22


def test_what_heads_share_is_split_once() -> None:
    q, k, v = make(2, 3, 4, N, D), make(2, 3, 1, M, D), make(3, 1, M, D).expand(2, 3, 1, M, D)
    frame = with_parts(Frame(*call(q, k, v)), ("q", "k", "v"))
    assert isinstance(frame, SplitFrame)
    assert frame.parts["k"].shape == k.shape
    assert frame.parts["v"].shape == (1, 3, 1, M, D)


@pytest.mark.parametrize("N", [256, 40])
def test_operands_of_a_jvp_and_its_hvp_are_split_once(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem((1, 2, N, 70, 8, 12), torch.float32, False, DEVICE)
    ops, o, lse, do, t, tdo, spec = (getattr(problem, x) for x in ("ops", "o", "lse", "do", "t", "tdo", "spec"))
    shapes = ops.q.shape, ops.k.shape, ops.v.shape, None
    to, tau = jvp(ops, o, lse, t, spec)
    apart = (to, tau, *hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes))
    to, tau, left = jvp_before_hvp(ops, o, lse, do, t, tdo, spec)
    assert left is not None
    assert isinstance(left.frame, SplitFrame)
    assert left.frame.parts.keys() == {"q", "k", "v", "tq", "tk", "tv", "do", "tdo"}
    monkeypatch.delattr(SplitFrame, "_new_parts")
    together = (to, tau, *hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes, left))
    for x, y in zip(together, apart, strict=True):
        if x is None or y is None:
            assert x is y
            continue
        assert torch.equal(x, y) if DEVICE == "cpu" else error(x, y.double()) <= TRITON_F32


@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=str)
def test_the_default_dtype_is_not_that_of_the_parts(default: torch.dtype) -> None:
    ops, spec = call(make(1, N, D), make(1, M, D), make(1, M, D))
    torch.set_default_dtype(default)
    try:
        frame = with_parts(Frame(ops, spec), ("q", "k", "v"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(frame, SplitFrame)
    assert {x.dtype for x in (*frame.parts.values(), *frame.factors.values())} == {torch.float32}


@pytest.fixture
def high() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_only_the_highest_precision_of_float32_splits(high: None) -> None:
    x = make(2, N, D)
    assert not splits(Frame(*call(x, x, x)))
    torch.set_float32_matmul_precision("highest")
    assert splits(Frame(*call(x, x, x)))
    assert not splits(Frame(*call(x.half(), x.half(), x.half())))


def results(ops: Operands, do: Tensor, t: Tangents, spec, rules) -> list[Tensor]:
    """tO, tau and the cotangents' tangents, from statistics in float64."""
    o, lse = reference.forward(exact(ops), spec)
    to, tau = reference.jvp(exact(ops), o, lse, Tangents(*(None if x is None else x.double() for x in t)), spec)
    rows = [x.to(ops.q.dtype) for x in (o, lse, to, tau)]
    shapes = (ops.q.shape, ops.k.shape, ops.v.shape, None)
    first = rules[0](ops, rows[0], rows[1], t, spec)
    return [*first, *rules[1](ops, rows[0], rows[1], do, t, None, rows[2], rows[3], spec, shapes)[:3]]


def worst_row(actual: Tensor, truth: Tensor) -> float:
    """The largest error of a row relative to it."""
    return float(((actual - truth).norm(dim=-1) / truth.norm(dim=-1).clamp_min(1e-300)).max())


def compare(ops: Operands, spec, do: Tensor, t: Tangents, bar: float) -> None:
    got = results(ops, do, t, spec, (jvp, hvp))
    wide = Tangents(*(None if x is None else x.double() for x in t))
    truth = results(exact(ops), do.double(), wide, spec, (reference.jvp, reference.hvp))
    for x, z in zip(got, truth, strict=True):
        if x.dim() == 3:
            assert worst_row(x.double(), z) < bar


def test_every_row_is_accurate_in_its_own_scale() -> None:
    ops, spec = call(make(2, N, D), make(2, M, D), make(2, M, D) * scales(M, 4))
    t = Tangents(make(2, N, D) * scales(N, 4), make(2, M, D) * scales(M, 4), make(2, M, D) * scales(M, 4))
    compare(ops, spec, make(2, N, D) * scales(N, 4), t, 5 * TRITON_F32)


def test_masked_keys_may_hold_anything_finite() -> None:
    """A padded batch whose padding was never written."""
    seen = (torch.arange(M, device=DEVICE) < M // 2)[None, None, :]
    fill = ~seen[0].mT
    k, v, tk, tv = (make(2, M, D).masked_fill(fill, x) for x in (1e30, -1e25, 1e30, 1e20))
    ops, spec = call(make(2, N, D), k, v, seen)
    got = results(ops, do := make(2, N, D), t := Tangents(make(2, N, D), tk, tv), spec, (jvp, hvp))
    clean = Operands(ops.q, k * ~fill, v * ~fill, seen, None)
    zero = Tangents(t.q, tk * ~fill, tv * ~fill)
    wide = Tangents(*(None if x is None else x.double() for x in zero))
    truth = results(exact(clean), do.double(), wide, spec, (reference.jvp, reference.hvp))
    for x, z in zip(got, truth, strict=True):
        assert error(x, z) < TRITON_F32
