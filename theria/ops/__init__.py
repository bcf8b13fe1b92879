"""Scaled dot-product attention with exact first and second derivatives."""

from theria.ops.capabilities import CAPABILITIES, Capability
from theria.ops.checks import ArgumentError, DtypeError, UnsupportedError
from theria.ops.explicit import sdpa_forward, sdpa_hvp, sdpa_jvp, sdpa_jvp_jvp, sdpa_vjp
from theria.ops.finite_difference import hvp_fd_vjp
from theria.ops.sdpa import Explanation, explain, sdpa
from theria.ops.seed_names import sdpa_bwd_dk, sdpa_bwd_dq, sdpa_bwd_dv, triton_sdpa_fused

__all__ = [
    "CAPABILITIES",
    "ArgumentError",
    "Capability",
    "DtypeError",
    "Explanation",
    "UnsupportedError",
    "explain",
    "hvp_fd_vjp",
    "sdpa",
    "sdpa_bwd_dk",
    "sdpa_bwd_dq",
    "sdpa_bwd_dv",
    "sdpa_forward",
    "sdpa_hvp",
    "sdpa_jvp",
    "sdpa_jvp_jvp",
    "sdpa_vjp",
    "triton_sdpa_fused",
]
