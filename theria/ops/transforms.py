"""What PyTorch has wrapped around a tensor: the one place that asks ``torch.func`` and the dispatcher about it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, wraps
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_level,
    peek_interpreter_stack,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

Call = TypeVar("Call", bound=Callable[..., Any])
Found = TypeVar("Found")


def in_graph(function: Call) -> Call:
    """Keep a function whole under ``torch.compile``: its derivatives are taken by what it calls, not traced into.

    What it calls then runs under the tracing of AOTAutograd, which records the operators that compute. This is
    ``torch.compiler.allow_in_graph``, called when it is first needed: to call it imports the compiler, which takes
    longer than to import torch.
    """

    def allow() -> None:
        torch.compiler.allow_in_graph(function)

    # what torch.compiler.assume_constant_result sets: run while tracing, not traced
    allow._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            allow()
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def at_some_level(look: Callable[[Tensor], Found | None], x: Tensor) -> Found | None:
    """What ``look`` finds in a tensor first, from the level of ``torch.func`` that it belongs to down to the plain one.

    A tangent is seen from its own level only, so that the levels above it are left on the way.
    """
    with ExitStack() as left:
        while True:
            top = peek_interpreter_stack()
            if top is not None and top.level() > maybe_get_level(x):
                left.enter_context(retrieve_current_functorch_interpreter().lower())
                continue
            if (found := look(x)) is not None or not is_functorch_wrapped_tensor(x):
                return found
            x = get_unwrapped(x)


def tangent(x: Tensor) -> Tensor | None:
    """That of forward mode at the level of x; one of ``vmap`` has none of its own."""
    return None if fwad._current_level < 0 or is_batchedtensor(x) else fwad.unpack_dual(x).tangent


def differentiated(x: Tensor) -> str | None:
    """How a tensor takes part in a derivative, at whatever level of ``torch.func``; None when it is a constant."""

    def look(x: Tensor) -> str | None:
        return "requires grad" if x.requires_grad else "carries a tangent" if tangent(x) is not None else None

    return at_some_level(look, x)


_knows_autocast = cache(torch.amp.is_autocast_available)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device (some, such as meta, do not know it)."""
    return _knows_autocast(device) and torch.is_autocast_enabled(device)


def without_autocast(rule: Callable[..., Any], ops: Any, *args: Any) -> Any:
    """Run a rule on canonical operands. Its dtypes are its own business: autocast must not reach into it."""
    device = ops.q.device.type
    if autocasts(device):
        with torch.autocast(device, enabled=False):
            return rule(ops, *args)
    return rule(ops, *args)


def recorded() -> bool:
    """Whether every operation is recorded into a graph as it is, what it writes in place included (``make_fx``)."""
    if not traced():
        return False
    modes = torch._C._TorchDispatchModeKey
    dispatched = torch._C._get_dispatch_mode
    return dispatched(modes.PROXY) is not None and dispatched(modes.FUNCTIONAL) is None


def traced() -> bool:
    """Whether a mode watches or replaces every operation (tracing, fake tensors, counters of memory)."""
    return torch._C._len_torch_dispatch_stack() > 0
