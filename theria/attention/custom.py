"""``sdpa_custom``: the operator under the name, and with the default backend, that earlier users know."""

from __future__ import annotations

from torch import Tensor

from theria.ops import sdpa


def sdpa_custom(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    seed: int | Tensor | None = None,
    backend: str = "reference",
) -> Tensor:
    """:func:`theria.ops.sdpa` with ``backend="reference"`` by default; same shapes and errors.

    Args:
        query: (B, H, N, D). key: (B, H, M, D). value: (B, H, M, E).
        backend: "reference", "custom", "triton" (also under its earlier name "triton_full_fused") or "auto".

    Returns:
        (B, H, N, E).
    """
    return sdpa(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        seed=seed,
        backend=backend,
    )
