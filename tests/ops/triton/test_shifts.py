"""Keys, values and tangents with a large part in common, in half precision: derivatives that depend on the spread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.triton.calls import DEVICE, call, case, error, exact, exact_tangents, make, truth_of
from theria.ops import reference
from theria.ops.operands import AttentionSpec, Operands, Tangents
from theria.ops.triton import rules

N = M = 160  # no short kernel takes so many keys
WIDTH = 16
COMMON = 3.0  # what keys have in common, and values, and tangents of keys, for a spread of 1
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
# Relative, in the norm, in units of the dtype's rounding: with delta and tau from the rounded output alone it is 40 to
# 200 of them. 5 are those of products whose factors are rounded.
LIMIT = 8.0

pytestmark = pytest.mark.usefixtures("poisoned")


def common_call(dtype: torch.dtype, **options) -> tuple[Operands, AttentionSpec]:
    q, k, v = (make(2, N, WIDTH) for _ in range(3))
    k, v = (x + COMMON * make(2, 1, WIDTH) for x in (k, v))
    return call(*(x.to(dtype) for x in (q, k, v)), **options)


def direction(dtype: torch.dtype, present=(True, True, True)) -> Tangents:
    t = [make(2, N, WIDTH), make(2, M, WIDTH) + COMMON * make(2, 1, WIDTH), make(2, M, WIDTH)]
    return Tangents(*(x.to(dtype) if given else None for x, given in zip(t, present, strict=True)))


def near(actual: Tensor | None, truth: Tensor | None, dtype: torch.dtype) -> None:
    assert actual is not None
    assert truth is not None
    assert error(actual, truth) <= LIMIT * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"p": 0.2}], ids=["plain", "causal", "dropout"])
def test_first_order(dtype, options):
    c = case(*common_call(dtype, **options))
    o, lse = rules.forward(c.ops, c.spec)
    actual = rules.vjp(c.ops, o, lse, c.do, c.spec, c.shapes)
    ops = exact(c.ops)
    truth = reference.vjp(ops, *reference.forward(ops, c.spec), c.do.double(), c.spec, c.shapes)
    for x, x64 in zip(actual[:3], truth[:3], strict=True):
        near(x, x64, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_dq", [True, False], ids=["in one walk", "in two"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("present", [(1, 1, 1, 0), (1, 1, 1, 1), (0, 1, 0, 0), (1, 0, 1, 1)])
def test_second_order(dtype, has_dq, is_causal, present):
    ops, spec = common_call(dtype, is_causal=is_causal)
    c = case(ops, spec, present=tuple(map(bool, present)))._replace(t=direction(dtype, present[:3]))
    o, lse = rules.forward(ops, spec)
    dq = rules.vjp(ops, o, lse, c.do, spec, c.shapes)[0] if has_dq else None
    actual = rules.jvp_hvp(ops, o, lse, c.do, dq, c.t, c.tdo, spec, c.shapes)[:5]
    for x, x64 in zip(actual, truth_of(c), strict=True):
        near(x, x64, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bends", [True, False], ids=["ttq, ttk", "straight"])
def test_two_directions(dtype, bends):
    ops, spec = common_call(dtype)
    t1, t2, t12 = direction(dtype), direction(dtype), direction(dtype) if bends else Tangents()
    o, lse = rules.forward(ops, spec)
    tau1, tau2 = (rules.jvp(ops, o, lse, t, spec)[1] for t in (t1, t2))
    actual = rules.jvp_jvp(ops, o, lse, t1, t2, t12, tau1, tau2, spec)
    ops = exact(ops)
    t1, t2, t12 = map(exact_tangents, (t1, t2, t12))
    o, lse = reference.forward(ops, spec)
    tau1, tau2 = (reference.jvp(ops, o, lse, t, spec)[1] for t in (t1, t2))
    near(actual, reference.jvp_jvp(ops, o, lse, t1, t2, t12, tau1, tau2, spec), dtype)


def derivatives(ops: Operands, spec: AttentionSpec, do: Tensor, t: Tangents, R) -> list[Tensor]:
    """dq, to, tau and tdq."""
    shapes = (*(x.shape for x in ops[:3]), None)
    o, lse = R.forward(ops, spec)
    dq = R.vjp(ops, o, lse, do, spec, shapes)[0]
    to, tau = R.jvp(ops, o, lse, t, spec)
    if R is rules:
        return [dq, to, tau, R.jvp_hvp(ops, o, lse, do, dq, t, None, spec, shapes)[2]]
    return [dq, to, tau, R.hvp(ops, o, lse, do, t, None, to, tau, spec, shapes)[0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_mask_hides_does_not_count(dtype):
    """The first keys, among which the common part is looked for, are far away and hidden; one row sees no key."""
    ops, spec = common_call(dtype)
    hidden = torch.zeros(1, N, M, dtype=torch.bool, device=DEVICE)
    hidden[..., :10] = hidden[:, N - 1] = True
    k, v = (x.clone() for x in ops[1:3])
    k[:, :10], v[:, :10] = -5e4, 50.0
    ops = Operands(ops.q, k, v, ~hidden, None)
    do, t = make(2, N, WIDTH).to(dtype), direction(dtype)
    actual = derivatives(ops, spec, do, t, rules)
    truth = derivatives(exact(ops), spec, do.double(), exact_tangents(t), reference)
    for x, x64 in zip(actual, truth, strict=True):
        near(x[:, :-64], x64[:, :-64], dtype)  # what all rows of a block see: nothing in the last one
        assert (x[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["causal", "mask"])
def test_what_a_row_does_not_see_changes_none_of_its_bits(dtype, how):
    """The common part is of keys that all rows of a block see. Row 3 sees 4 keys."""
    ops, spec = common_call(dtype, is_causal=how == "causal")
    if how == "mask":
        ops = ops._replace(mask=torch.ones(N, M, dtype=torch.bool, device=DEVICE).tril()[None])
    do, t = make(2, N, WIDTH).to(dtype), direction(dtype)
    expected = derivatives(ops, spec, do, t, rules)
    far = torch.ones(M, 1, device=DEVICE).index_fill(0, torch.arange(4, M, device=DEVICE), -2.0).to(dtype)
    others = [x * far for x in (ops.k, ops.v, t.k, t.v) if x is not None]
    changed = derivatives(ops._replace(k=others[0], v=others[1]), spec, do, Tangents(t.q, *others[2:]), rules)
    for x, y in zip(expected, changed, strict=True):
        assert torch.equal(x[:, :4], y[:, :4])
        assert not torch.equal(x, y)
