"""Operands of half precision whose keys and values have a large part in common, as biases give them.

What a row has in common in dP and tS falls out of every derivative, and the rounding of an output must not be left.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from theria.ops import sdpa
from theria.testing import difference, naive_attention

COMMON = 3.0  # the size of the common part of keys and values, whose spread is 1
ROUNDINGS = 1.0  # of the result itself, in the norm: everything before is computed in float32


def problem(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """q, k, v, a direction of them, and a cotangent."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = draw(1, 40, 32), draw(1, 90, 32) + COMMON * draw(32), draw(1, 90, 24) + COMMON * draw(24)
    t = [draw(*x.shape) for x in (q, k, v)]
    return [x.to(dtype) for x in (q, k, v)], [x.to(dtype) for x in t], draw(1, 40, 24).to(dtype)


def derivatives(attend, x: list[Tensor], t: list[Tensor], do: Tensor) -> list[tuple[Tensor, ...]]:
    """Gradients, and the double backward."""
    leaves, do = [a.detach().requires_grad_() for a in x], do.detach().requires_grad_()
    first = torch.autograd.grad(attend(*leaves), leaves, do, create_graph=True)
    return [tuple(a.detach() for a in first), torch.autograd.grad(first, [*leaves, do], t)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_they_cost_no_accuracy(dtype: torch.dtype, causal: bool) -> None:
    x, t, do = problem(dtype)
    results = derivatives(lambda *a: sdpa(*a, is_causal=causal, backend="custom"), x, t, do)
    exact = derivatives(
        lambda *a: naive_attention(*a, is_causal=causal), [a.double() for a in x], [a.double() for a in t], do.double()
    )
    for ours, truth in zip(results, exact, strict=True):
        for a, b in zip(ours, truth, strict=True):
            assert difference((a,), (b,)) <= ROUNDINGS * torch.finfo(dtype).eps
