"""Names that earlier users of the operator know, kept with their signatures.

They are thin: each calls :mod:`theria.ops.explicit`. Row statistics come as the pair ``m`` (pivot) and ``l`` (sum of
exponentials relative to it), both (..., N), with lse = m + log l.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from theria.ops.explicit import sdpa_forward, sdpa_vjp


def _vjp(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, m: Tensor, l: Tensor, scale: float, **options: Any) -> Any:
    out, _ = sdpa_forward(q, k, v, scale=scale, **options)
    return sdpa_vjp(q, k, v, dout, out=out, lse=m + l.log(), scale=scale, **options)


def sdpa_bwd_dq(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, m: Tensor, l: Tensor, scale: float, **options: Any
) -> Tensor:
    """Cotangent of ``q`` (README (8)); ``m`` and ``l`` (..., N) are the row statistics of the forward."""
    return _vjp(q, k, v, dout, m, l, scale, **options)[0]


def sdpa_bwd_dk(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, m: Tensor, l: Tensor, scale: float, **options: Any
) -> Tensor:
    """Cotangent of ``k`` (README (8)); ``m`` and ``l`` (..., N) are the row statistics of the forward."""
    return _vjp(q, k, v, dout, m, l, scale, **options)[1]


def sdpa_bwd_dv(q: Tensor, k: Tensor, dout: Tensor, m: Tensor, l: Tensor, scale: float, **options: Any) -> Tensor:
    """Cotangent of v (README (7)), which does not depend on v itself; ``m`` and ``l`` (..., N) as in the forward."""
    v = dout.new_zeros(*k.shape[:-1], dout.shape[-1])
    return _vjp(q, k, v, dout, m, l, scale, **options)[2]


def triton_sdpa_fused(q: Tensor, k: Tensor, v: Tensor, return_stats: bool = False) -> Any:
    """The fused forward, without a mask; with ``return_stats`` also ``m`` and ``l`` (..., N).

    Raises:
        theria.ops.UnsupportedError: the fused kernels cannot run this call here.
    """
    out, lse = sdpa_forward(q, k, v, backend="triton")
    return (out, lse, torch.ones_like(lse)) if return_stats else out
