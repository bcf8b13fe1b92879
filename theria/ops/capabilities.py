"""What each backend supports, as data. The checks, ``explain`` and the tests all read this one table."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIN_TRITON = (3, 6)  # named tuples and tuples that hold None as arguments of kernels


@dataclass(frozen=True)
class Capability:
    """The limits of one backend.

    Attributes:
        summary: one line for people.
        devices: device types it runs on; None for every one.
        dtypes: dtypes of query, key and value.
        min_head_dim, max_head_dim: smallest and largest D and E; None for no limit.
        max_order: highest order of derivative; None for any.
        mask_gradient: whether an additive mask may require grad or carry a tangent.
        missing: a function that says what is missing on this machine, or None when the backend can run.
        min_compute_capability: of a CUDA device; None for any.
        interpreted_dtypes: dtypes under Triton's interpreter, with which a backend of kernels runs on the CPU too, for
            tests: slowly, and only when it is named.
    """

    summary: str
    devices: tuple[str, ...] | None
    dtypes: tuple[torch.dtype, ...]
    min_head_dim: int
    max_head_dim: int | None
    max_order: int | None
    mask_gradient: bool
    missing: Callable[[], str | None]
    min_compute_capability: tuple[int, int] | None = None
    interpreted_dtypes: tuple[torch.dtype, ...] | None = None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1, read when Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def triton_version() -> str | None:
    """The version of Triton; None where it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _nothing() -> str | None:
    return None


def _needs_triton() -> str | None:
    """What the kernels miss on this machine."""
    compiled = not interpreted()
    if compiled and torch.version.cuda is None:
        return "it needs a CUDA build of PyTorch, and this one has no CUDA"
    if (why := _triton_missing(triton_version())) is not None:
        return why
    if compiled and not _cuda_available():
        return "it needs a CUDA device, and PyTorch finds none"
    return None


_cuda_available = cache(torch.cuda.is_available)


@cache
def _triton_missing(version: str | None) -> str | None:
    needed = ".".join(map(str, MIN_TRITON))
    if version is None:
        return f"it needs Triton {needed} or later, which is not installed (pip install 'triton>={needed}')"
    if tuple(int(x) for x in version.split(".")[:2]) < MIN_TRITON:
        return f"it needs Triton {needed} or later, and {version} is installed (pip install 'triton>={needed}')"
    return None


@cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of a CUDA device."""
    return torch.cuda.get_device_capability(device)


CAPABILITIES: dict[str, Capability] = {
    "reference": Capability(
        summary="materialised closed formulas, differentiable to any order",
        devices=None,
        dtypes=FLOATS,
        min_head_dim=0,
        max_head_dim=None,
        max_order=None,
        mask_gradient=True,
        missing=_nothing,
    ),
    "custom": Capability(
        summary="explicit forward, vjp, jvp, hvp and jvp_jvp rules in PyTorch, linear memory",
        devices=None,
        dtypes=FLOATS,
        min_head_dim=0,
        max_head_dim=None,
        max_order=2,
        mask_gradient=True,
        missing=_nothing,
    ),
    "triton": Capability(
        summary="fused kernels for forward, vjp, jvp, hvp and jvp_jvp, linear memory, bitwise deterministic",
        devices=("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        min_head_dim=1,
        max_head_dim=256,
        max_order=2,
        mask_gradient=False,
        missing=_needs_triton,
        min_compute_capability=(8, 0),
        # with Triton 3.6 to 3.9 the interpreter's bfloat16 products are silently wrong
        interpreted_dtypes=(torch.float32, torch.float16),
    ),
}

# Best first: what "auto" tries in turn.
PREFERENCE = ("triton", "custom", "reference")
ALIASES = {"triton_full_fused": "triton"}
