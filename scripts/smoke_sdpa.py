"""Forward, backward and double backward on every backend, against autograd of a naive softmax: one second, one table.

    python scripts/smoke_sdpa.py

Exit status 1 if a backend that is available here is wrong or fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from theria.ops import sdpa

BACKENDS = ("reference", "custom", "triton", "auto")
SHAPE = (2, 3, 37, 16)  # B, H, N, D; N is odd, so that a block is cut
# float64 agrees to about 1e-15; a float32 kernel to about 1e-6, times what second order and sums over N add
BOUND = {torch.float64: 1e-11, torch.float32: 1e-4}

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.mT / query.shape[-1] ** 0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def derivatives(attention: Attention, dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    """[[O], [dQ, dK, dV], [the gradients of a function of dQ, dK, dV with respect to Q, K, V, dO]], in float64."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(7)]
    *inputs, d_out = (x.to(device, dtype).requires_grad_() for x in draws[:4])
    seconds = [x.to(device, dtype) for x in draws[4:]]
    out = attention(*inputs)
    first = torch.autograd.grad(out, inputs, d_out, create_graph=True)
    second = torch.autograd.grad(first, [*inputs, d_out], seconds)
    return [[x.detach().double().cpu() for x in order] for order in ([out], first, second)]


def relative_error(result: list[Tensor], truth: list[Tensor]) -> float:
    errors = [((x - y).norm() / y.norm()).item() for x, y in zip(result, truth, strict=True)]
    return max(float("inf") if error != error else error for error in errors)  # NaN is the worst error


def check(backend: str, dtype: torch.dtype, device: str, truth: list[list[Tensor]]) -> bool:
    """Prints the row of one backend; returns False if it is available and fails."""
    label = f"{backend:<10} {str(dtype).removeprefix('torch.'):<8} {device:<5}"
    try:
        result = derivatives(lambda q, k, v: sdpa(q, k, v, is_causal=True, backend=backend), dtype, device)
    except NotImplementedError as reason:
        print(f"{label} not available: {str(reason).splitlines()[0]}")
        return True
    except Exception as error:  # a failing backend must not hide the rows after it
        print(f"{label} FAILED: {type(error).__name__}: {error}")
        return False
    errors = [relative_error(*pair) for pair in zip(result, truth, strict=True)]
    right = max(errors) <= BOUND[dtype]
    print(label, *(f"{error:>12.1e}" for error in errors), "  ok" if right else f"  FAILED: above {BOUND[dtype]:.0e}")
    return right


def main() -> int:
    truth = derivatives(naive, torch.float64, "cpu")
    print(
        f"torch {torch.__version__}, causal, (B, H, N, D) = {SHAPE}; relative errors against naive softmax in float64"
    )
    print(f"{'backend':<10} {'dtype':<8} {'on':<5} {'forward':>12} {'backward':>12} {'double':>12}")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = [(b, t, d) for d in devices for b in BACKENDS for t in BOUND]
    results = [check(*row, truth) for row in rows]
    print("all available backends agree" if all(results) else f"{results.count(False)} rows FAILED")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
