"""Existing models, unchanged: route the attention they call to :func:`theria.ops.sdpa`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from theria.ops import sdpa
from theria.ops.checks import resolve

_NAME = "theria"
# What Hugging Face's models pass to their attention that makes it another function, or asks for its weights.
_CHANGES = ("softcap", "s_aux", "head_mask", "output_attentions")
_backend: ContextVar[str | None] = ContextVar("higher_order_backend", default=None)


@contextmanager
def higher_order(backend: str = "auto") -> Iterator[None]:
    """Inside this context every ``F.scaled_dot_product_attention`` is :func:`theria.ops.sdpa`.

    That covers ``nn.MultiheadAttention``, ``nn.TransformerEncoder``, timm, and Hugging Face models with
    ``attn_implementation="sdpa"``. It acts on the calls made inside it, in this thread; derivatives may be taken later,
    outside. Not covered: code that took the function itself out of its module before (``from torch.nn.functional import
    scaled_dot_product_attention``), and PyTorch's fused inference path of ``nn.TransformerEncoderLayer`` (eval mode,
    no gradients), which does not call it.

    Args:
        backend: as in :func:`theria.ops.sdpa`.

    Raises:
        theria.ops.ArgumentError: an unknown backend.

    Example:
        >>> with theria.attention.higher_order():
        ...     loss = model(x).sum()
    """
    resolve(backend)
    with _router:
        token = _backend.set(backend)
        try:
            yield
        finally:
            _backend.reset(token)


class _Router:
    """Stands in the place of the function while any thread is inside a context, and passes other threads' calls on."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._original = F.scaled_dot_product_attention

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._original = F.scaled_dot_product_attention
                F.scaled_dot_product_attention = self._route(self._original)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                F.scaled_dot_product_attention = self._original

    @staticmethod
    def _route(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
            backend = _backend.get()
            return original(*args, **kwargs) if backend is None else sdpa(*args, **kwargs, backend=backend)

        return scaled_dot_product_attention


_router = _Router()


def _hf_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Hugging Face's attention interface: (B, H, N, D) in, (B, N, H, E) out.

    ``position_bias`` (T5) is added to the scores, as the mask is.

    Raises:
        NotImplementedError: an argument that makes it another function (``softcap``) or asks for its weights.
    """
    changed = [name for name in _CHANGES if others.get(name) is not None and others[name] is not False]
    if changed:
        raise NotImplementedError(
            f"attn_implementation='{_NAME}' has no {', '.join(changed)}, which {type(module).__name__} asks for: "
            "load the model with attn_implementation='eager', or set it to None where the model allows it"
        )
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    causal = causal and attention_mask is None and query.shape[-2] > 1
    mask = None if attention_mask is None else attention_mask[..., : key.shape[-2]]
    gqa = query.shape[-3] != key.shape[-3]
    if position_bias is not None:
        mask = _with_bias(position_bias[..., : key.shape[-2]], mask)
    out = sdpa(query, key, value, mask, dropout, causal, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2), None


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """An additive mask of a bias and a mask."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask


def register_hf() -> str:
    """Add ``attn_implementation="theria"`` to Hugging Face transformers; returns that name.

    Raises:
        ImportError: transformers is not installed or older than 4.53, which introduced the masks of the interface.
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
