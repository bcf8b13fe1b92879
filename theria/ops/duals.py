"""Output and tangent of a call by one rule, where forward mode asks for both and nothing else is differentiated.

PyTorch asks a ``Function`` for its output, and then for the tangent; a backend that has ``forward_jvp`` computes the
scores of both once. What a further derivative may be taken of goes through the Functions of
:mod:`theria.ops.autograd`: more than one level of ``torch.func``, tensors that require grad.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    _unwrap_for_grad,
    _wrap_for_grad,
    get_interpreter_stack,
    unwrap_if_dead,
)
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from theria.ops import autograd
from theria.ops.operands import AttentionSpec, Operands, Tangents
from theria.ops.transforms import traced

RULE = "forward_jvp"


def output_and_tangent(ops: Operands, t: Tangents, spec: AttentionSpec) -> Any:
    """o, lse, to, tau: :func:`theria.ops.autograd.forward` and then ``jvp``, by one rule where there is one."""
    if fwad._current_level < 0 and get_interpreter_stack() is None and _fused(ops, t, spec):
        return autograd.call(RULE, spec, ops, t, spec)
    o, lse = autograd.forward(ops, spec)
    return (o, lse, *autograd.jvp(ops, o, lse, t, spec))


def dual_output(ops: Operands, spec: AttentionSpec) -> Tensor | None:
    """The output with its tangent, both of this level of forward mode; None where one rule cannot give them."""
    if fwad._current_level < 0:
        return None
    levels = get_interpreter_stack()
    if levels is None:
        duals = [(None, None) if x is None else fwad.unpack_dual(x) for x in ops]
        with fwad._set_fwd_grad_enabled(False):
            found = _computed(duals, spec, lambda x: x)
        return None if found is None else fwad.make_dual(*found)
    if len(levels) > 1 or levels[0].key() != TransformType.Jvp:
        return None
    interpreter: Any = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    duals = [(None, None) if x is None else fwad.unpack_dual(x) for x in ops]
    with interpreter.lower():
        found = _computed(duals, spec, lambda x: _unwrap_for_grad(unwrap_if_dead(x), level))
    return None if found is None else fwad.make_dual(_wrap_for_grad(found[0], level), found[1])


def _computed(duals: Any, spec: AttentionSpec, below: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
    """o and to of (operand, tangent) pairs; ``below`` gives a tensor as it is outside of ``torch.func``."""
    ops = Operands(*(None if x is None else below(x) for x, _ in duals))  # type: ignore[arg-type]
    # zeros of forward mode have no memory
    t = Tangents(*(None if x is None or x._is_zerotensor() else below(x) for _, x in duals[:4]))
    if t.mask is not None or not any(x is not None for x in t) or not _fused(ops, t, spec):
        return None
    o, _, to, _ = autograd.call(RULE, spec, ops, t, spec)
    return o, to


def _fused(ops: Operands, t: Tangents, spec: AttentionSpec) -> bool:
    """Whether the backend has the rule, and no gradient may be asked of what it gives."""
    if traced() or not hasattr(autograd.rules(spec.backend), RULE):
        return False
    return not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in (*ops, *t))
