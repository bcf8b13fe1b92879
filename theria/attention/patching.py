"""Existing models, unchanged: route the attention they call to :func:`theria.ops.sdpa`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from theria.ops import sdpa

_NAME = "theria"


class higher_order(TorchFunctionMode):  # a context manager, named like a function as torch.no_grad is
    """Inside this context every ``F.scaled_dot_product_attention`` is :func:`theria.ops.sdpa`.

    That covers ``nn.MultiheadAttention``, ``nn.TransformerEncoder``, timm, and Hugging Face models with
    ``attn_implementation="sdpa"``. It acts on the calls made inside it; derivatives may be taken later, outside.
    PyTorch's fused inference path of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` (modules in eval
    mode, without gradients) does not call ``F.scaled_dot_product_attention`` and is left alone.

    Args:
        backend: as in :func:`theria.ops.sdpa`.

    Example:
        >>> with theria.attention.higher_order():
        ...     loss = model(x).sum()
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            return sdpa(*args, **kwargs, backend=self.backend)
        return func(*args, **kwargs)


def _hf_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: (B, H, N, D) in, (B, N, H, E) out."""
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[-2] > 1
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    gqa = query.shape[-3] != key.shape[-3]
    out = sdpa(query, key, value, mask, dropout, causal, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2), None


def register_hf() -> str:
    """Add ``attn_implementation="theria"`` to Hugging Face transformers; returns that name.

    Raises:
        ImportError: transformers is not installed or older than 4.48, which introduced the interface.
    """
    try:
        from transformers import AttentionInterface  # type: ignore[import-not-found]
        from transformers.masking_utils import (  # type: ignore[import-not-found]
            ALL_MASK_ATTENTION_FUNCTIONS,
            sdpa_mask,
        )
    except ImportError as error:
        raise ImportError("register_hf needs transformers 4.53 or newer: pip install -U transformers") from error
    AttentionInterface.register(_NAME, _hf_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    return _NAME
