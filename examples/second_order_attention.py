"""Curvature through attention: the Hessian-vector product of an attention layer in three modes.

    python examples/second_order_attention.py

PyTorch's fused attention stops at the first derivative; theria's has the second, exactly and in linear memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import theria

MODES = ("forward_over_reverse", "reverse_over_reverse", "reverse_over_forward")
TOLERANCE = 1e-12  # float64: the modes are the same number by different orders of summation


def main() -> None:
    torch.manual_seed(0)
    x, target = torch.randn(2, 2, 4, 64, 16, dtype=torch.float64)  # (B, H, N, D)
    weights = {name: torch.randn(16, 16, dtype=torch.float64) / 4 for name in ("query", "key", "value")}
    direction = {name: torch.randn_like(w) for name, w in weights.items()}

    def loss(w: dict[str, Tensor], attention=theria.sdpa) -> Tensor:
        out = attention(x @ w["query"], x @ w["key"], x @ w["value"], is_causal=True)
        return (out - target).square().mean()

    print(theria.explain(x, x, x, is_causal=True))
    products = [theria.hvp(loss, weights, direction, mode=mode) for mode in MODES]
    curvature = [sum((direction[name] * p[name]).sum() for name in direction) for p in products]
    for mode, value in zip(MODES, curvature, strict=True):
        print(f"{mode:<22} v.Hv = {value:.15f}")
    spread = max(abs(value - curvature[0]) for value in curvature) / abs(curvature[0])
    if spread > TOLERANCE:
        raise SystemExit(f"the modes differ by {spread:.1e}")

    try:
        theria.hvp(lambda w: loss(w, F.scaled_dot_product_attention), weights, direction, mode="reverse_over_reverse")
        print("F.scaled_dot_product_attention took its math path here, with an (N, M) matrix for each head")
    except RuntimeError as error:
        print(f"F.scaled_dot_product_attention: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
