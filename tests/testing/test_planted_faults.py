"""The conformance suite can fail: planted faults that other libraries have are caught by the law they break."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tolerances import CUSTOM_F64, LAW_F64
from theria.testing import COMPOSITIONS, LAWS, compare, difference, make_sample, naive_attention

SAMPLE = make_sample(D=3)


class OpaqueBackward(torch.autograd.Function):
    """A fused kernel's backward that autograd takes for a constant: double backward drops attention's curvature."""

    @staticmethod
    def forward(ctx: Any, *x: Tensor) -> Tensor:
        ctx.save_for_backward(*x)
        return naive_attention(*x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        with torch.enable_grad():
            x = [a.detach().requires_grad_() for a in ctx.saved_tensors]
            return torch.autograd.grad(naive_attention(*x), x, grads[0])


def frozen_statistics(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """lse held fixed while differentiating: the rows of P no longer sum to one along a tangent."""
    S = query @ key.mT / query.shape[-1] ** 0.5
    return (S - S.logsumexp(-1, keepdim=True).detach()).exp() @ value


def prerounded(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """K·scale rounded to float32 first."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return naive_attention(query, (key * factor).float().to(key.dtype), value, scale=1.0)


def leaky_mask(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """A finite constant for hidden keys, and one dropped key."""
    S = query @ key.mT / query.shape[-1] ** 0.5
    P = S.softmax(-1)
    return torch.cat([P[..., :-1], torch.zeros_like(P[..., -1:])], -1) @ value


FAULTS: list[tuple[Callable[..., Tensor], str]] = [
    (frozen_statistics, "key_shift"),
    (prerounded, "prescaled"),
    (leaky_mask, "probabilities"),
]


@pytest.mark.parametrize(("fault", "law"), FAULTS)
def test_a_law_catches_it(fault: Callable[..., Tensor], law: str) -> None:
    assert LAWS[law](fault, SAMPLE) > 1e3 * LAW_F64
    assert LAWS[law](naive_attention, SAMPLE) <= LAW_F64


def test_an_opaque_backward_is_caught() -> None:
    compose = COMPOSITIONS["double_backward"]
    with pytest.raises(RuntimeError, match=r"unused|does not require grad|not have been used"):
        compose(lambda *x: OpaqueBackward.apply(*x), SAMPLE)  # type: ignore[return-value]


def test_frozen_statistics_are_far_off() -> None:
    exact = COMPOSITIONS["func_jvp"](naive_attention, SAMPLE)
    assert difference(COMPOSITIONS["func_jvp"](frozen_statistics, SAMPLE), exact) > 0.1


def test_compare_rejects_a_lower_precision_and_nan() -> None:
    def half(*x: Tensor, **options: Any) -> Tensor:
        return naive_attention(*(a.half().to(a.dtype) for a in x), **options)

    assert not compare(half, SAMPLE, "forward", torch.float32).accurate
    assert not compare(lambda *x: naive_attention(*x) * float("nan"), SAMPLE, "forward", torch.float32).accurate
    assert compare(naive_attention, SAMPLE, "forward", torch.float32).accurate


def test_the_naive_truth_equals_a_loop_over_rows() -> None:
    q, k, v = SAMPLE.x
    rows = [
        sum(w * x for w, x in zip((key @ row / 3**0.5).softmax(-1), value, strict=True))
        for row, key, value in ((q[b, h, n], k[b, h], v[b, h]) for b in range(2) for h in range(2) for n in range(5))
    ]
    expected = torch.stack([r for r in rows if isinstance(r, Tensor)]).reshape(2, 2, 5, 3)
    assert difference([naive_attention(q, k, v)], [expected]) <= CUSTOM_F64
