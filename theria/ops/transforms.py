"""What PyTorch has wrapped around a tensor: the one place that asks ``torch.func`` and the dispatcher for their state."""

from __future__ import annotations

from contextlib import ExitStack

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
    maybe_get_level,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter


def differentiated(x: Tensor) -> str | None:
    """How a tensor takes part in a derivative, at whatever level of ``torch.func``; None when it is a constant.

    A tangent is seen from the level that it belongs to, so that the levels above it are left on the way.
    """
    with ExitStack() as left:
        while True:
            if x.requires_grad:
                return "requires grad"
            top = peek_interpreter_stack()
            if top is not None and top.level() > maybe_get_level(x):
                left.enter_context(retrieve_current_functorch_interpreter().lower())
                continue
            if fwad._current_level >= 0 and not is_batchedtensor(x) and fwad.unpack_dual(x).tangent is not None:
                return "carries a tangent"
            if not is_functorch_wrapped_tensor(x):
                return None
            x = get_unwrapped(x)


def traced() -> bool:
    """Whether a mode watches or replaces every operation (tracing, fake tensors, counters of memory)."""
    return torch._C._len_torch_dispatch_stack() > 0


def plain(x: Tensor) -> bool:
    """Whether a tensor that has left ``torch.func`` has memory of its own: no subclass, not mapped by
    ``is_grads_batched``."""
    return type(x) in (Tensor, torch.nn.Parameter) and not is_legacy_batchedtensor(x)
