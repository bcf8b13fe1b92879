"""The kernel of the mixed second tangent against the closed formula in float64."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton sees a kernel

from tests.ops.triton.calls import SHAPES, error
from tests.tolerances import TRITON_F32
from theria.ops import blockwise, reference
from theria.ops.operands import AttentionSpec, Operands, Tangents, batch_shape, default_scale, with_dropout
from theria.ops.triton import jvp_jvp as module
from theria.ops.triton.forward import forward
from theria.ops.triton.jvp import jvp
from theria.ops.triton.jvp_jvp import jvp_jvp
from theria.ops.triton.tiles import Tile, override

# NumPy's word on the interpreter's own conversions
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative, in the norm: float32 rounds O, lse and every product; float16 also rounds inputs' products to 11 bits.
TOLERANCE = {torch.float32: TRITON_F32, torch.float16: 4e-3}
# Scores up to s are rounded to s·2⁻²⁴, and with them P.
ROUNDING = 2.0**-24
OPERANDS = 3
ALL = (1,) * 9


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def scales(rows: int, decades: float) -> Tensor:
    return 10 ** ((2 * torch.rand(rows, 1, device=DEVICE) - 1) * decades)


def double(xs):
    """The same named tuple with its floating tensors in float64."""
    return type(xs)(*(x.double() if x is not None and x.is_floating_point() else x for x in xs))


class Case:
    """Operands, three directions and what the reference says of them.

    ``decades``: rows of the directions differ by as many powers of ten at most; ``own``: O, lse and tau are those of
    the kernels.
    """

    def __init__(
        self, q, k, v, mask=None, *, causal=False, dropout=0.0, present=ALL, lead=(), decades=0.0, own=False
    ) -> None:
        spec = AttentionSpec("triton", default_scale(q.shape[-1]), causal)
        ops = Operands(q, k, v, mask, None)
        if dropout:
            spec = AttentionSpec("triton", spec.scale, causal, dropout)
            ops, spec = with_dropout(ops, spec, 7)
        self.ops, self.spec = ops, spec
        chosen = [
            make(*(lead or x.shape[:-2]), *x.shape[-2:], dtype=x.dtype) * scales(x.shape[-2], decades).to(x.dtype)
            if flag
            else None
            for x, flag in zip((q, k, v) * 3, present, strict=True)
        ]
        self.t = [Tangents(*chosen[i : i + OPERANDS]) for i in range(0, len(chosen), OPERANDS)]
        ops64 = double(ops)
        t64 = [double(t) for t in self.t]
        o, lse = reference.forward(ops64, spec)
        lse = lse.expand(*batch_shape(*ops, *(x for t in self.t for x in t)), -1)
        taus = [reference.jvp(ops64, o, lse, t, spec)[1] for t in t64[:2]]
        self.o, self.lse, self.taus = o.to(q.dtype), lse.float(), [tau.float() for tau in taus]
        self.truth = reference.jvp_jvp(ops64, o, lse, t64[0], t64[1], t64[2], taus[0], taus[1], spec)
        self.size = float(reference.scores(ops64, spec).abs().max())
        if own:
            self.o, self.lse = forward(ops, spec)
            self.taus = [jvp(ops, self.o, self.lse, t, spec)[1] for t in self.t[:2]]

    def run(self, rule=jvp_jvp) -> Tensor:
        return rule(self.ops, self.o, self.lse, *self.t, *self.taus, self.spec)

    def check(self, tolerance: float = 0.0) -> None:
        tto = self.run()
        assert error(tto, self.truth) <= TOLERANCE[tto.dtype] + tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("N", "M", "D", "E", "causal"),
    [(5, 7, 3, 4, False), (33, 70, 8, 5, True), (70, 33, 16, 24, True), (1, 65, 17, 1, False), (64, 64, 16, 16, True)],
)
def test_it_is_the_closed_formula(N, M, D, E, causal, dtype, poisoned):
    Case(make(2, N, D, dtype=dtype), make(2, M, D, dtype=dtype), make(2, M, E, dtype=dtype), causal=causal).check()


@pytest.mark.parametrize("tile", [Tile(16, 64, 4, 2), Tile(64, 16, 4, 2)])
def test_tiles_of_other_shapes(tile, monkeypatch, poisoned):
    monkeypatch.setattr(module, "select", lambda *_: tile)
    Case(make(1, 40, 8), make(1, 50, 8), make(1, 50, 8), causal=True).check()


# Of 512 combinations: all of the two directions without mixed tangents; all of the mixed ones, alone and beside both.
COMBINATIONS = [
    *((*pair, 0, 0, 0) for pair in itertools.product((0, 1), repeat=6)),
    *((flag,) * 6 + mixed for flag in (0, 1) for mixed in itertools.product((0, 1), repeat=3)),
]


@pytest.mark.parametrize("present", [c for c in COMBINATIONS if any(c)])
def test_absent_tangents(present, poisoned):
    Case(make(1, 3, 2), make(1, 4, 2), make(1, 4, 3), present=present).check()


def test_no_tangent_gives_zero(poisoned):
    tto = Case(make(1, 3, 2), make(1, 4, 2), make(1, 4, 3), present=(0,) * 9).run()
    assert torch.equal(tto, torch.zeros_like(tto))


@pytest.mark.parametrize("kind", ["bool", "padding", "additive"])
def test_masks(kind, poisoned):
    masks = {
        "bool": torch.rand(2, 1, 9, 21, device=DEVICE) > 0.3,
        "padding": (torch.arange(21, device=DEVICE) < torch.tensor([[13], [21]], device=DEVICE))[:, None, None],
        "additive": make(1, 2, 9, 21),
    }
    Case(make(2, 2, 9, 8), make(2, 2, 21, 8), make(2, 2, 21, 8), masks[kind]).check()


def test_a_row_that_sees_no_key_gives_zero(poisoned):
    mask = torch.rand(1, 9, 21, device=DEVICE) > 0.3
    mask[0, 4] = False
    case = Case(make(1, 9, 8), make(1, 21, 8), make(1, 21, 8), mask)
    case.check()
    assert torch.equal(case.run()[0, 4], torch.zeros(8, device=DEVICE))


def test_grouped_queries(poisoned):
    Case(make(1, 2, 3, 9, 8), make(1, 2, 1, 21, 8), make(1, 2, 1, 21, 8)).check()


def test_dropout_is_that_of_custom(poisoned):
    case = Case(make(2, 2, 20, 8), make(2, 2, 37, 8), make(2, 2, 37, 8), dropout=0.3)
    case.check()
    torch.testing.assert_close(case.run(), case.run(blockwise.jvp_jvp), rtol=1e-4, atol=1e-5)


def test_strided_inputs_are_read_in_place(poisoned):
    q, k, v = (make(2, 20, 3, 8).transpose(1, 2) for _ in range(3))
    case = Case(q, k, v)
    case.check()
    assert case.run().stride() == q.stride()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_continues_the_other_kernels(shape, causal, poisoned):
    """With their O, lse and tau; among the shapes are those of one key, where the weights cancel."""
    N, M, D, E = shape
    Case(make(2, N, D), make(2, M, D), make(2, M, E), causal=causal, own=True).check()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout": 0.3}, {"masked": True}], ids=str)
def test_probabilities_have_the_bits_of_the_jvp(options, poisoned):
    """Where only V moves both are P̃tV."""
    options = dict(options)
    mask = torch.rand(1, 33, 70, device=DEVICE) > 0.3 if options.pop("masked", False) else None
    operands = make(2, 33, 40), make(2, 70, 40), make(2, 70, 24)
    case = Case(*operands, mask, present=(*(0,) * 8, 1), own=True, **options)
    tile = Tile(32, 16, 4, 1)
    with override("jvp", tile), override("jvp_jvp", tile):
        to, _ = jvp(case.ops, case.o, case.lse, case.t[2], case.spec)
        # on a device another program may order its additions differently
        assert torch.equal(case.run(), to) if DEVICE == "cpu" else error(case.run(), to.double()) <= TRITON_F32


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_the_weight_of_a_single_key_is_one(scale, poisoned):
    """With the forward kernel's lse, whatever the score is: they are the same product."""
    case = Case(make(2, 20, 16) * scale, make(2, 1, 16), make(2, 1, 5), present=(*(0,) * 8, 1), own=True)
    assert case.size > scale
    # on a device another tile may be another matrix instruction, which orders its additions differently
    case.check(0.0 if DEVICE == "cpu" else 4 * case.size * ROUNDING)


@pytest.mark.parametrize("own", [False, True])
def test_large_scores(own, poisoned):
    case = Case(make(1, 20, 8), make(1, 70, 8) * 100, make(1, 70, 8), own=own)
    assert case.size > 300
    case.check(4 * case.size * ROUNDING)


@pytest.mark.parametrize("absent", range(9))
def test_every_operand_is_accurate_in_its_own_scale(absent, poisoned):
    """Rows up to four decades apart: none may be multiplied by the factor of another row or another operand."""
    present = tuple(int(i != absent) for i in range(9))
    Case(make(2, 20, 16), make(2, 40, 16), make(2, 40, 5) * scales(40, 2), present=present, decades=2).check()


def test_masked_keys_may_hold_anything_finite(poisoned):
    """A padded batch whose padding was never written; float32 holds the product of two such scores."""
    M = 40
    seen = (torch.arange(M, device=DEVICE) < M // 2)[None, None, :]
    case = Case(make(2, 20, 16), make(2, M, 16), make(2, M, 5), seen)
    for _, k, v, _ in (case.ops[:4], *case.t):
        assert k is not None
        assert v is not None
        k.masked_fill_(~seen.mT, 1e15)
        v.masked_fill_(~seen.mT, 1e30)
    case.check()


@pytest.mark.parametrize(
    ("q", "k", "v", "lead"),
    [
        ((2, 3), (1, 3), (1, 1), ()),
        ((1, 1), (1, 1), (4, 1), ()),
        ((), (), (), ()),
        ((1,), (1,), (1,), (3,)),
        ((2, 1, 3, 2), (2, 1, 1, 2), (1, 1, 3, 1), ()),
        ((2, 1, 1, 1, 2),) * 3 + ((),),
        ((2, 2, 1, 3, 1), (1, 2, 1, 1, 1), (2, 1, 1, 3, 2), ()),
    ],
)
def test_leading_dimensions_broadcast(q, k, v, lead, poisoned):
    """With ``lead``, several directions at one point; with more dimensions than a kernel addresses nothing is split."""
    Case(make(*q, 5, 4), make(*k, 7, 4), make(*v, 7, 3), lead=lead).check()


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "dropout": 0.3}], ids=str)
def test_grouped_queries_in_several_tiles(options, poisoned):
    with override("jvp_jvp", Tile(16, 16, 1, 1)):
        Case(make(1, 2, 3, 21, 8), make(1, 2, 1, 37, 8), make(1, 2, 1, 37, 5), **options).check()
