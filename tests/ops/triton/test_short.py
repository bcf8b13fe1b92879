"""The short kernels against the closed formulas in float64: several heads a program, one, and blocks of rows."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton sees a kernel

from theria.ops import blockwise, reference, sdpa
from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents, default_scale, with_dropout
from theria.ops.triton import short
from theria.ops.triton.launch import Frame
from theria.ops.triton.short import hvp_short, jvp_hvp_short, vjp_short
from theria.ops.triton.tiles import Tile, override
from theria.testing import difference

# NumPy's word on the interpreter's own conversions
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative, in the norm. float32: rounding of lse and of the products. float16: P, dS and tdS are rounded to 11 bits.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3}
NAMES = ("to", "tau", "tdq", "tdk", "tdv")
ALL = (1, 1, 1)
SPEC = AttentionSpec("triton", 1.0)


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def double(xs):
    """The same named tuple with its floating tensors in float64."""
    return type(xs)(*(x.double() if x is not None and x.is_floating_point() else x for x in xs))


class Case:
    """Operands, cotangents, tangents, and what the reference says of them."""

    def __init__(self, q, k, v, mask=None, *, causal=False, dropout=0.0, present=ALL, tdo=True, wanted=ALL) -> None:
        self.spec, self.ops = AttentionSpec("triton", default_scale(q.shape[-1]), causal), Operands(q, k, v, mask, None)
        if dropout:
            self.ops, self.spec = with_dropout(self.ops, AttentionSpec("triton", 0.3, causal, dropout), 7)
        given = zip((q, k, v), present, strict=True)
        self.t = Tangents(*(make(*x.shape, dtype=x.dtype) if here else None for x, here in given))
        dq, dk, dv = (x.shape if want else None for x, want in zip((q, k, v), wanted, strict=True))
        self.shapes: Shapes = (dq, dk, dv, None)
        ops64 = double(self.ops)
        o, lse = reference.forward(ops64, self.spec)
        self.o, self.lse = o.to(q.dtype), lse.float()
        self.do = make(*o.shape, dtype=q.dtype)
        self.tdo = make(*o.shape, dtype=q.dtype) if tdo else None
        t64, tdo64 = double(self.t), None if self.tdo is None else self.tdo.double()
        to, tau = reference.jvp(ops64, o, lse, t64, self.spec)
        do64 = self.do.double()
        self.first = reference.vjp(ops64, o, lse, do64, self.spec, self.shapes)
        self.second = (
            to, tau, *reference.hvp(ops64, o, lse, do64, t64, tdo64, to, tau, self.spec, self.shapes)
        )  # fmt: skip

    def vjp(self) -> tuple[Any, ...]:
        return vjp_short(self.ops, self.o, self.lse, self.do, self.spec, self.shapes)

    def jvp_hvp(self) -> tuple[Any, ...]:
        return jvp_hvp_short(self.ops, self.o, self.lse, self.do, self.t, self.tdo, self.spec, self.shapes)

    def hvp(self) -> tuple[Any, ...]:
        nothing = torch.full_like(self.do, float("nan")), torch.full_like(self.lse, float("nan"))  # is not read
        return hvp_short(self.ops, self.o, self.lse, self.do, self.t, self.tdo, *nothing, self.spec, self.shapes)

    def moved(self) -> list[Tensor]:
        return [x for x in self.t if x is not None]

    def check(self) -> None:
        self.compare(self.vjp(), self.first, NAMES[2:])
        self.check_second()

    def check_second(self) -> None:
        self.compare(self.jvp_hvp(), self.second, NAMES)
        self.compare(self.hvp(), self.second[2:], NAMES[2:])

    def compare(self, results, truths, names) -> None:
        assert results[-1] is None
        for name, x, truth in zip(names, results[:-1], truths[:-1], strict=True):
            if truth is None:
                assert x is None, name
                continue
            assert x.shape == truth.shape, name
            assert x.dtype == (torch.float32 if name == "tau" else self.do.dtype), name
            error = (x.double() - truth).norm()
            assert error <= TOLERANCE[self.do.dtype] * truth.norm() + 1e-6, (name, float(error / truth.norm()))


@pytest.fixture(params=["several heads", "one head"])
def regime(request, monkeypatch, poisoned):
    """A program for several heads, or for one, whose rows it walks over in blocks of 16."""
    several = request.param == "several heads"
    monkeypatch.setattr(short, "PACKED", 32 if several else 0)
    tile = Tile(64 if several else 16, 16, 1, 1)
    with override("vjp_short", tile), override("second_short", tile):
        yield


SHAPES = [(5, 7, 3, 4, False), (32, 20, 16, 24, True), (16, 32, 32, 17, False), (1, 1, 1, 1, False)]


@pytest.mark.parametrize(("N", "M", "D", "E", "causal"), SHAPES)
def test_they_are_the_closed_formulas(N, M, D, E, causal, regime):
    Case(make(3, N, D), make(3, M, D), make(3, M, E), causal=causal).check()


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(causal, regime):
    q, k, v = (make(3, *shape, dtype=torch.float16) for shape in ((20, 16), (25, 16), (25, 8)))
    Case(q, k, v, causal=causal).check()


@pytest.mark.parametrize(
    ("N", "M", "D", "E", "causal"), [(70, 128, 8, 5, True), (3, 100, 65, 24, False), (130, 33, 8, 8, True)]
)
def test_larger_heads(N, M, D, E, causal, poisoned):
    Case(make(2, N, D), make(2, M, D), make(2, M, E), causal=causal, tdo=False).check()


@pytest.mark.parametrize("present", list(itertools.product((0, 1), repeat=3)))
@pytest.mark.parametrize("tdo", [False, True])
def test_absent_tangents(present, tdo, poisoned):
    case = Case(make(3, 3, 2), make(3, 4, 2), make(3, 4, 3), present=present, tdo=tdo)
    case.check_second()


@pytest.mark.parametrize("wanted", list(itertools.product((0, 1), repeat=3)))
def test_only_what_is_wanted(wanted, poisoned):
    Case(make(3, 3, 2), make(3, 4, 2), make(3, 4, 3), wanted=wanted).check()


@pytest.mark.parametrize("kind", ["bool", "padding", "additive", "bias"])
def test_masks(kind, regime):
    masks = {
        "bool": torch.rand(2, 1, 9, 21, device=DEVICE) > 0.3,
        "padding": (torch.arange(21, device=DEVICE) < torch.tensor([[13], [21]], device=DEVICE))[:, None, None],
        "additive": make(1, 2, 9, 21),
        "bias": make(1, 1, 9, 1),
    }
    Case(make(2, 2, 9, 8), make(2, 2, 21, 8), make(2, 2, 21, 8), masks[kind]).check()


def test_a_row_that_sees_no_key(regime):
    mask = torch.rand(3, 9, 21, device=DEVICE) > 0.3
    mask[0, 4] = False
    case = Case(make(3, 9, 8), make(3, 21, 8), make(3, 21, 8), mask)
    case.check()
    for x in (case.vjp()[0], *case.jvp_hvp()[:3]):
        assert torch.equal(x[0, 4], torch.zeros_like(x[0, 4]))


@pytest.mark.parametrize("wanted", [ALL, (1, 0, 1), (0, 1, 0)])
@pytest.mark.parametrize("N", [5, 20])
def test_grouped_queries(N, wanted, regime):
    Case(make(2, 2, 3, N, 8), make(2, 2, 1, 21, 8), make(2, 2, 1, 21, 8), wanted=wanted).check()


def test_keys_of_all_heads(regime):
    """Operands that ``vmap`` leaves unbatched, grouped by nothing that is the last dimension."""
    Case(make(3, 2, 5, 8), make(1, 2, 7, 8), make(3, 2, 7, 8)).check()


def test_dropout_is_that_of_custom(regime):
    case = Case(make(3, 2, 13, 8), make(3, 2, 23, 8), make(3, 2, 23, 8), dropout=0.4)
    case.check()
    rest = (case.ops, case.o, case.lse)
    truth = blockwise.vjp(*rest, case.do, case.spec, case.shapes)
    for x, y in zip(case.vjp()[:3], truth[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
        assert torch.equal(x == 0, y == 0)


def test_strided_inputs_are_read_in_place(regime):
    q, k, v = (make(2, 12, 3, 8).transpose(1, 2) for _ in range(3))
    case = Case(q, k, v)
    case.check()
    assert [x.stride() for x in case.vjp()[:3]] == [q.stride()] * 3


def test_many_leading_dimensions(regime):
    q = make(2, 2, 5, 3, 8).transpose(2, 3)
    k, v = make(2, 1, 3, 7, 8), make(1, 2, 3, 7, 8)
    Case(q, k, v).check()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_one_head_holds_stays_there(value, regime):
    """A task that diverged leaves the others of its batch alone, bit by bit."""
    q, k, v = make(6, 5, 8), make(6, 7, 8), make(6, 7, 8)
    case = Case(q, k, v)
    before = (*case.vjp()[:3], *case.jvp_hvp()[:5])
    for x in (q, k, v, *case.moved(), case.do):
        x[2] = value
    for x, y in zip((*case.vjp()[:3], *case.jvp_hvp()[:5]), before, strict=True):
        assert torch.equal(torch.cat([x[:2], x[3:]]), torch.cat([y[:2], y[3:]]))
        assert x[2].isnan().all()


@pytest.mark.parametrize("wanted", [ALL, (1, 0, 0), (0, 0, 1), (0, 0, 0)])
@pytest.mark.parametrize("tdo", [False, True])
def test_in_two_walks(wanted, tdo, poisoned):
    """A tile that is split; blocks of a head, and several heads.

    No sum has another order, so that the interpreter gives the same bits. A compiler may fuse another product of a sum
    with it, where both of what is added are products.
    """
    long = Case(make(2, 37, 8), make(2, 21, 8), make(2, 21, 5), causal=True, wanted=wanted, tdo=tdo)
    several = Case(make(5, 5, 8), make(5, 7, 8), make(5, 7, 5), wanted=wanted, tdo=tdo)
    for case, tile in ((long, Tile(16, 32, 1, 1)), (several, Tile(32, 16, 1, 1))):
        with override("second_short", tile):
            whole = case.jvp_hvp()
        with override("second_short", tile._replace(split=True)):
            split = case.jvp_hvp()
        case.compare(split, case.second, NAMES)
        for x, y in zip(whole, split, strict=True):
            assert x is None if y is None else DEVICE == "cuda" or torch.equal(x, y)


BY_ROWS = Tile(64, 32, 4, 2, split=True)  # whose first walk has scores as (rows, keys)


def operands(N: int, M: int, D: int, E: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return make(1, 2, N, D, dtype=dtype), make(1, 2, M, D, dtype=dtype), make(1, 2, M, E, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("N", [64, 70])
@pytest.mark.parametrize("kind", ["plain", "causal", "bool", "no key", "additive", "far", "dropout"])
def test_whole_rows_in_the_first_walk(kind, N, dtype, poisoned):
    """Blocks of 64 rows, the last of them with rows that do not exist; the second walk takes 32 at a time.

    "far" is a mask beside which lse does not hold how many keys there are; scores are 0 there, or they would be lost.
    """
    q, k, v = operands(N, 21, 8, 5, dtype)
    far = (torch.arange(N, device=DEVICE) % 5 == 0)[None, None, :, None]
    if kind == "far":
        q = q.masked_fill(far, 0.0)
    mask = {
        "bool": torch.rand(1, 1, N, 21, device=DEVICE) > 0.3,
        "no key": ~far,
        "additive": make(1, 2, N, 21),
        "far": far * -1e9,
    }.get(kind)
    case = Case(q, k, v, mask, causal=kind == "causal", dropout=0.4 * (kind == "dropout"))
    with override("second_short", BY_ROWS):
        case.check_second()


@pytest.mark.parametrize("present", list(itertools.product((0, 1), repeat=3)))
@pytest.mark.parametrize("tdo", [False, True])
def test_absent_tangents_in_the_first_walk(present, tdo, poisoned):
    case = Case(*operands(40, 10, 4, 3, torch.float32), present=present, tdo=tdo)
    with override("second_short", BY_ROWS):
        case.check_second()


@pytest.mark.parametrize("wanted", list(itertools.product((0, 1), repeat=3)))
def test_only_what_is_wanted_of_two_walks(wanted, poisoned):
    grouped = make(2, 3, 40, 4), make(2, 1, 10, 4), make(2, 1, 10, 3)
    for x in (operands(40, 10, 4, 3, torch.float32), grouped):
        case = Case(*x, wanted=wanted)
        with override("second_short", BY_ROWS):
            case.check_second()


def test_float32_loses_no_more_than_plain_pytorch():
    """A row of P whose sum is 1 but for rounding, times what its keys have in common in dP: where that is large, dS,
    in which only differences count, has the error. Without the division by that sum it is 2.3 times plain PyTorch's.
    """
    errors = []
    for seed in range(6):
        torch.manual_seed(seed)
        x = [3 * make(2, 8, 16), make(2, 8, 16), make(2, 8, 16)]
        do = 20 + make(2, 8, 16)

        def grads(backend, dtype, x=x, do=do):
            leaves = [a.to(dtype).requires_grad_() for a in x]
            out = sdpa(*leaves, backend=backend)
            return torch.autograd.grad(out, leaves[:2], do.to(dtype))

        truth = grads("reference", torch.float64)
        errors.append([difference(grads(backend, torch.float32), truth) for backend in ("triton", "reference")])
    ours, plain = (sum(column) for column in zip(*errors, strict=True))
    assert ours < 1.7 * plain


def test_a_pack_that_does_not_divide_the_heads(poisoned):
    tile = Tile(128, 16, 4, 1)
    with override("vjp_short", tile), override("second_short", tile):
        Case(make(11, 5, 8), make(11, 7, 8), make(11, 7, 8)).check()


def test_what_fits():
    def fits(N, M, D, E, dtype=torch.float16):
        return short.fits(Frame(Operands(make(1, N, D), make(1, M, D), make(1, M, E), None, None), SPEC), dtype)

    assert fits(256, 128, 64, 64)
    assert not fits(257, 128, 64, 64)  # one program per head would walk over all rows
    assert not fits(128, 128, 128, 128)
    assert not fits(10, 129, 16, 16)
    assert not fits(10, 10, 129, 16)
    assert not fits(10, 10, 16, 129)
    assert fits(10, 64, 32, 32, torch.float32)
    assert not fits(10, 65, 32, 32, torch.float32)
    assert not fits(10, 64, 33, 32, torch.float32)
