"""Public entry points of the operator."""

import torch
from torch import Tensor


def sdpa(query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
         enable_gqa=False, seed=None, backend="auto") -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    S = query @ key.mT * scale
    if is_causal:
        S = S.masked_fill(torch.ones_like(S, dtype=torch.bool).triu(1), float("-inf"))
    return S.softmax(-1) @ value
