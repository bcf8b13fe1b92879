"""The kernel of the mixed second tangent against the closed formula in float64."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton sees a kernel

from theria.ops import blockwise, reference
from theria.ops.operands import AttentionSpec, Operands, Tangents, default_scale, with_dropout
from theria.ops.triton import jvp_jvp as module
from theria.ops.triton.jvp_jvp import jvp_jvp
from theria.ops.triton.tiles import Tile

# NumPy's word on the interpreter's own conversions
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative, in the norm: float32 rounds O, lse and every product; float16 also rounds inputs' products to 11 bits.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3}
OPERANDS = 3


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def double(xs):
    """The same named tuple with its floating tensors in float64."""
    return type(xs)(*(x.double() if x is not None and x.is_floating_point() else x for x in xs))


class Case:
    """Operands, three directions and what the reference says of them."""

    def __init__(self, q, k, v, mask=None, *, causal=False, dropout=0.0, present=(1,) * 9) -> None:
        spec = AttentionSpec("triton", default_scale(q.shape[-1]), causal)
        ops = Operands(q, k, v, mask, None)
        if dropout:
            spec = AttentionSpec("triton", spec.scale, causal, dropout)
            ops, spec = with_dropout(ops, spec, 7)
        self.ops, self.spec = ops, spec
        chosen = [
            make(*x.shape, dtype=x.dtype) if flag else None for x, flag in zip((q, k, v) * 3, present, strict=True)
        ]
        self.t = [Tangents(*chosen[i : i + OPERANDS]) for i in range(0, len(chosen), OPERANDS)]
        ops64 = double(ops)
        t64 = [double(t) for t in self.t]
        o, lse = reference.forward(ops64, spec)
        taus = [reference.jvp(ops64, o, lse, t, spec)[1] for t in t64[:2]]
        self.o, self.lse, self.taus = o.to(q.dtype), lse.float(), [tau.float() for tau in taus]
        self.truth = reference.jvp_jvp(ops64, o, lse, t64[0], t64[1], t64[2], taus[0], taus[1], spec)

    def run(self, rule=jvp_jvp) -> Tensor:
        return rule(self.ops, self.o, self.lse, *self.t, *self.taus, self.spec)

    def check(self) -> None:
        tto = self.run()
        assert tto.shape == self.truth.shape
        error = (tto.double() - self.truth).norm() / self.truth.norm().clamp_min(1e-30)
        assert error <= TOLERANCE[tto.dtype], float(error)


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
