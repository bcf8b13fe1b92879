"""The public operator: argument checks, choice of the backend, and the way into and out of canonical form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from theria.ops import checks, reference
from theria.ops.autograd import Forward
from theria.ops.capabilities import CAPABILITIES, PREFERENCE
from theria.ops.duals import dual_output
from theria.ops.operands import AttentionSpec, Layout, Operands, canonical, default_scale, with_dropout
from theria.ops.transforms import autocasts, in_graph


class Prepared(NamedTuple):
    """A checked call in canonical form."""

    layout: Layout
    ops: Operands
    spec: AttentionSpec


@dataclass(frozen=True)
class Explanation:
    """Which backend a call gets and why.

    Attributes:
        backend: the backend that computes the call; None when the named one cannot.
        reason: why.
        rejected: for every other backend, what it lacks for this call (or that a better one was taken).
    """

    backend: str | None
    reason: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend or 'no backend'}: {self.reason}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.rejected.items()])


def choose(backend: str, query: Tensor, value: Tensor, attn_mask: Tensor | None, mask_gradient: bool = False) -> str:
    """The backend that computes a call: the named one or an error, for "auto" the best that can."""
    name = checks.resolve(backend)
    if name == "auto":
        for x in PREFERENCE:
            if checks.obstacle(x, query, value, attn_mask, named=False, mask_gradient=mask_gradient) is None:
                return x
        name = PREFERENCE[-1]
    checks.check_backend(name, query, value, attn_mask, mask_gradient=mask_gradient)
    return name


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    seed: int | Tensor | None = None,
    backend: str = "auto",
    mask_gradient: bool = False,
    **unknown: Any,
) -> Prepared:
    """Check a call, choose its backend and bring it into canonical form.

    ``mask_gradient``: a cotangent or a tangent of ``attn_mask`` is part of the call. ``unknown``: refused.
    """
    if unknown:
        raise checks.unknown_option(next(iter(unknown)), OPTIONS)
    known = None
    if attn_mask is None and seed is None and type(dropout_p) in (float, int) and dropout_p == 0.0:
        known = _signature(query, key, value, is_causal, scale, enable_gqa, backend)
        if known is not None and (decided := _prepared.get(known)) is not None:  # one look: other threads clear it
            layout, spec = decided
            q, k, v = layout.enter(query, grouped=True), *(layout.enter(x, grouped=False) for x in (key, value))
            return Prepared(layout, Operands(q, k, v, None, None), spec)  # type: ignore[arg-type]
    checks.check_options(dropout_p, is_causal, scale, enable_gqa, seed)
    checks.check_inputs(query, key, value, attn_mask, enable_gqa)
    name = choose(backend, query, value, attn_mask, mask_gradient)
    layout, ops = canonical(query, key, value, attn_mask, enable_gqa)
    # in a graph a scale that varies stays a SymFloat, for the backends whose products take one
    number: Any = default_scale(query.shape[-1]) if scale is None else torch.sym_float(scale)
    spec = AttentionSpec(name, number, bool(is_causal), float(dropout_p))
    if dropout_p > 0.0:
        ops, spec = with_dropout(ops, spec, seed)
    if known is not None:
        if len(_prepared) >= MAXIMUM:
            _prepared.clear()
        _prepared[known] = layout, spec
    return Prepared(layout, ops, spec)


# What may be passed by name besides the operands.
OPTIONS = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "seed", "backend")
# What was decided about calls on a GPU, where microseconds count, by all that the checks and the choice look at.
MAXIMUM = 4096
_prepared: dict[Any, tuple[Layout, AttentionSpec]] = {}


def _signature(query: Any, key: Any, value: Any, is_causal: Any, scale: Any, enable_gqa: Any, backend: Any) -> Any:
    """All that decides a call without a mask and dropout; None for one that is not on a GPU or out of the ordinary."""
    for x in (query, key, value):
        if type(x) not in (Tensor, torch.nn.Parameter) or not x.is_cuda:
            return None
        if x._has_symbolic_sizes_strides:  # while a graph is traced
            return None
    if type(is_causal) is not bool or (scale is not None and type(scale) is not float):
        return None
    if type(enable_gqa) is not bool or type(backend) is not str:
        return None
    if enable_gqa and key.shape != value.shape:
        return None
    shapes, dtypes = (query.shape, key.shape, value.shape), (query.dtype, key.dtype, value.dtype)
    return *shapes, *dtypes, query.device, key.device, value.device, is_causal, scale, enable_gqa, backend


def _autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, cast: Any = Tensor.to
) -> Iterator[Any]:
    """What autocast does to F.scaled_dot_product_attention: operands of at most 32 bits are cast to its dtype.

    A mask of the other half dtype becomes float32 instead, which every backend takes and which rounds nothing.
    """
    dtype = torch.get_autocast_dtype(query.device.type)
    half = (torch.bfloat16, torch.float16)
    for x in (query, key, value):
        yield cast(x, dtype) if isinstance(x, Tensor) and x.dtype in (torch.float32, *half) else x
    other = isinstance(attn_mask, Tensor) and attn_mask.dtype in half and attn_mask.dtype != dtype
    yield cast(attn_mask, torch.float32) if other else attn_mask


def _stand_in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """For the checks what ``x.to(dtype)`` is, without its numbers."""
    return x.new_empty((), dtype=dtype).expand(x.shape)


@in_graph
def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention with exact first and second derivatives.

    Signature and semantics of ``torch.nn.functional.scaled_dot_product_attention``, plus ``seed`` and ``backend``.
    Composes with ``torch.autograd`` (``create_graph=True``, forward mode) and with every ``torch.func`` transform.

    Args:
        query: (..., N, D), usually (B, H, N, D). Leading dimensions of the operands broadcast.
        key: (..., M, D).
        value: (..., M, E).
        attn_mask: broadcastable to (..., N, M). Boolean (True attends) or added to the scores (dtype of ``query`` or
            float32; its gradient is exact to second order too, on the backends that give it: not "triton"). A key that
            is not to be seen is −inf there. A large finite number instead is the same, but for rows that have it on
            every key they see: as in PyTorch these attend to all of them alike.
        dropout_p: probability with which an entry of the attention weights is dropped. As in PyTorch it always
            applies: pass 0.0 in evaluation.
        is_causal: row n attends to the keys m ≤ n (top-left alignment); combines with ``attn_mask``.
        scale: factor of QKᵀ; 1/√D by default.
        enable_gqa: ``key`` and ``value`` may have fewer heads (dimension -3) than ``query``.
        seed: makes dropout a pure function: the mask depends on the seed and the position only, is replayed in every
            derivative and is the same on every backend. An int or an int64 tensor of one element. Drawn from torch's
            global generator when None; a recorded graph (``make_fx``, ``torch.func.linearize``) draws at each call.
        backend: "reference", "custom", "triton" or "auto" (the best that supports the call; see :func:`explain`).
            A named backend never becomes another one.

    Returns:
        (..., N, E). A row that sees no key is 0 and has zero derivatives.

    Raises:
        checks.ArgumentError: shapes, devices or values that do not fit (a ValueError and a RuntimeError).
        checks.DtypeError: types or dtypes that do not fit (a TypeError and a RuntimeError).
        checks.UnsupportedError: the named backend cannot compute the call, before it does any work.
        NotImplementedError: at a third derivative, except with ``backend="reference"``, which has every order.
    """
    if isinstance(query, Tensor) and autocasts(query.device.type):
        query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    call = prepare(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        seed=seed,
        backend=backend,
    )
    if call.spec.backend == "reference":
        o, _ = reference.forward(call.ops, call.spec)
    elif (o := dual_output(call.ops, call.spec)) is None:
        o, _ = Forward.apply(*call.ops, call.spec)
    return call.layout.leave(o)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Explanation:
    """Which backend :func:`sdpa` with these arguments would use here and why, without computing anything.

    Under autocast that is said of the operands as it casts them.

    Raises:
        checks.ArgumentError, checks.DtypeError: as :func:`sdpa`, for arguments that no backend can take.
    """
    mask = attn_mask
    if isinstance(query, Tensor) and autocasts(query.device.type):
        query, key, value, mask = _autocast(query, key, value, attn_mask, cast=_stand_in)
    checks.check_options(dropout_p, is_causal, scale, enable_gqa, seed)
    checks.check_inputs(query, key, value, mask, enable_gqa)
    name = checks.resolve(backend)
    obstacles = {x: checks.obstacle(x, query, value, attn_mask, named=x == name) for x in PREFERENCE}
    able = [x for x in PREFERENCE if obstacles[x] is None]
    chosen = (able[0] if able else None) if name == "auto" else (name if name in able else None)
    rejected = {x: why for x, why in obstacles.items() if why is not None}
    rejected |= {x: _not_taken(x, name, chosen) for x in able if x != chosen}
    return Explanation(chosen, _reason(name, chosen, obstacles), rejected)


def _not_taken(candidate: str, asked: str, chosen: str | None) -> str:
    if asked != "auto":
        return f"'{asked}' was asked for, and a named backend never becomes another one"
    return f"it could, but '{chosen}' comes first: {CAPABILITIES[candidate].summary}"


def _reason(asked: str, chosen: str | None, obstacles: dict[str, str | None]) -> str:
    if chosen is None:
        return f"'{asked}' was asked for and cannot: {obstacles.get(asked)}" if asked != "auto" else "none can"
    how = "asked for" if asked != "auto" else "the best that supports the call"
    order = CAPABILITIES[chosen].max_order
    orders = "derivatives of every order" if order is None else f"derivatives up to order {order}"
    return f"{how}; {CAPABILITIES[chosen].summary}; {orders}"
