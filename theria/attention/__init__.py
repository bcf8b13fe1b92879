"""Seed-compatible entry points and the patching of existing models."""

from theria.attention.custom import sdpa_custom
from theria.attention.patching import higher_order, register_hf
from theria.ops import sdpa_bwd_dk, sdpa_bwd_dq, sdpa_bwd_dv, sdpa_jvp, triton_sdpa_fused

__all__ = [
    "higher_order",
    "register_hf",
    "sdpa_bwd_dk",
    "sdpa_bwd_dq",
    "sdpa_bwd_dv",
    "sdpa_custom",
    "sdpa_jvp",
    "triton_sdpa_fused",
]
