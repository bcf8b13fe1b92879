"""What each backend supports, as data. The checks, ``explain`` and the tests all read this one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Capability:
    """The limits of one backend.

    Attributes:
        summary: one line for people.
        devices: device types it runs on; None for every one.
        dtypes: dtypes of query, key and value.
        max_head_dim: largest D and E.
        max_order: highest order of derivative; None for any.
        mask_gradient: whether an additive mask that requires grad may be given.
        missing: a function that says what is missing on this machine, or None when the backend can run.
    """

    summary: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int | None
    max_order: int | None
    mask_gradient: bool
    missing: Callable[[], str | None]


def _nothing() -> str | None:
    return None


def _kernels_missing() -> str | None:
    return "this version of theria does not contain the fused kernels yet"


CAPABILITIES: dict[str, Capability] = {
    "reference": Capability(
        summary="materialised closed formulas, differentiable to any order",
        devices=None,
        dtypes=FLOATS,
        max_head_dim=None,
        max_order=None,
        mask_gradient=True,
        missing=_nothing,
    ),
    "custom": Capability(
        summary="explicit forward, vjp, jvp, hvp and jvp_jvp rules in PyTorch, linear memory",
        devices=None,
        dtypes=FLOATS,
        max_head_dim=None,
        max_order=2,
        mask_gradient=True,
        missing=_nothing,
    ),
    "triton": Capability(
        summary="fused kernels",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        max_head_dim=256,
        max_order=2,
        mask_gradient=False,
        missing=_kernels_missing,
    ),
}

# Best first: what "auto" tries in turn.
PREFERENCE = ("triton", "custom", "reference")
ALIASES = {"triton_full_fused": "triton"}
