"""The rules as operators of ``torch.library``: ``theria::sdpa_forward``, ``sdpa_vjp``, ``sdpa_jvp``, ``sdpa_hvp``,
``sdpa_jvp_jvp``, ``sdpa_jvp_hvp`` and ``sdpa_forward_jvp``, whole to a compiler, with fakes.

Their schemas are flat: operands, tangents, the call and the wanted shapes are spelled out (:data:`FLAT`); a cotangent
that is not wanted is a tensor of shape (0,). On plain tensors a rule is called without the dispatcher, which would cost
more than a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from theria.ops.operands import AttentionSpec, Operands, Tangents
from theria.ops.transforms import traced
from theria.ops.triton.plans import described, replayed

Rule = TypeVar("Rule", bound=Callable[..., Any])
LIBRARY = torch.library.Library("theria", "DEF")
# Kernels read any strides, but the strides of what they write follow from those that the fake saw.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

FLAT = {
    "ops": "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? seed",
    "t": "Tensor? tq, Tensor? tk, Tensor? tv",
    "t2": "Tensor? tq2, Tensor? tk2, Tensor? tv2",
    "t12": "Tensor? ttq, Tensor? ttk, Tensor? ttv",
    "dq": "Tensor? dq",
    "tdo": "Tensor? tdo",
    "spec": "float scale, bool is_causal, float dropout_p, SymInt[] heads",
    "shapes": "SymInt[]? dq_shape, SymInt[]? dk_shape, SymInt[]? dv_shape",
}
# The arguments of each rule in order, and the number of its results besides cotangents.
RULES = {
    "forward": ("ops spec", 2),
    "forward_jvp": ("ops t spec", 4),
    "vjp": ("ops o lse do spec shapes", 0),
    "jvp": ("ops o lse t spec", 2),
    "hvp": ("ops o lse do t tdo to tau spec shapes", 0),
    "jvp_jvp": ("ops o lse t t2 t12 tau tau2 spec", 1),
    "jvp_hvp": ("ops o lse do dq t tdo spec shapes", 2),
}


def schema(name: str) -> str:
    """The schema of the operator of a rule."""
    names, results = RULES[name][0].split(), RULES[name][1]
    results += 3 if "shapes" in names else 0
    arguments = ", ".join(FLAT.get(part, f"Tensor {part}") for part in names)
    return f"sdpa_{name}({arguments}) -> ({', '.join(['Tensor'] * results)})"


def flatten(args: Sequence[Any]) -> Iterator[Any]:
    """The arguments of an operator from those of its rule."""
    for x in args:
        if isinstance(x, Operands):
            yield from x
        elif isinstance(x, AttentionSpec):
            yield from (x.scale, x.is_causal, x.dropout_p, list(x.heads))
        elif isinstance(x, tuple):  # tangents, wanted shapes: those of q, k and v
            yield from x[:3]
        else:
            yield x


def unflatten(name: str, flat: Sequence[Any]) -> Iterator[Any]:
    """The arguments of a rule from those of its operator."""
    rest = iter(flat)
    for part in RULES[name][0].split():
        taken = [next(rest) for _ in FLAT.get(part, part).split(",")]
        if part == "ops":
            yield Operands(*taken)
        elif part in ("t", "t2", "t12"):
            yield Tangents(*taken)
        elif part == "spec":
            scale, is_causal, dropout_p, heads = taken
            yield AttentionSpec("triton", scale, is_causal, dropout_p, tuple(heads))
        elif part == "shapes":
            yield (*(None if shape is None else torch.Size(shape) for shape in taken), None)
        else:
            yield taken[0]


def operator(new: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Make a rule the operator ``theria::sdpa_<its name>``; ``new`` gives its results with nothing written to them."""

    def decorate(rule: Rule) -> Rule:
        name = f"sdpa_{rule.__name__}"
        LIBRARY.define(schema(rule.__name__), tags=TAGS)
        for device in ("CUDA", "CPU"):  # the CPU in Triton's interpreter
            LIBRARY.impl(name, _flat(rule.__name__, rule), device)
        torch.library.register_fake(f"theria::{name}", _flat(rule.__name__, new), lib=LIBRARY)
        dispatched = getattr(torch.ops.theria, name).default

        @wraps(rule)
        def call(*args: Any) -> Any:
            given = None if traced() else described(rule, args)
            if given is None:
                return _results(rule.__name__, dispatched(*flatten(args)), args[-1])
            return replayed(rule, args, given)

        return call  # type: ignore[return-value]

    return decorate


def _flat(name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
    """A rule under its flat schema."""

    def run(*flat: Any) -> Any:
        results = rule(*unflatten(name, flat))
        if isinstance(results, Tensor):
            return results
        kept = results[:-1] if "shapes" in RULES[name][0] else results  # there is no cotangent of a mask
        return tuple(flat[0].new_empty(0) if x is None else x for x in kept)

    return run


def _results(name: str, results: Any, shapes: Any) -> Any:
    """The results of a rule from those of its operator."""
    if "shapes" not in RULES[name][0]:
        return results
    cotangents = (None if shape is None else x for x, shape in zip(results[-3:], shapes, strict=False))
    return (*results[:-3], *cotangents, None)
