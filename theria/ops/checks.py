"""Every check of the operator's arguments: each message says what was given, what is needed and what to do.

The exceptions are the built-in ones that fit (``ValueError``, ``TypeError``, ``NotImplementedError``) and also
``RuntimeError``, which is what ``F.scaled_dot_product_attention`` raises: code that caught that keeps working.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from theria.ops.capabilities import (
    ALIASES,
    CAPABILITIES,
    PREFERENCE,
    Capability,
    compute_capability,
    interpreted,
)
from theria.ops.transforms import differentiated

# Numbers of Python, of NumPy (by their abstract classes) and of a traced graph in which they may vary.
INTEGER = (int, Integral, torch.SymInt)
NUMBER = (float, *INTEGER, Real, torch.SymFloat)


class ArgumentError(ValueError, RuntimeError):
    """A shape, device or value that the operator cannot take."""


class DtypeError(TypeError, RuntimeError):
    """A type or dtype that the operator cannot take."""


class UnsupportedError(NotImplementedError):
    """A valid call that the named backend cannot compute."""


def check_inputs(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> None:
    """Raise unless the operands fit each other."""
    if attn_mask is None and _plainly_fit(query, key, value):
        return
    operands = {"query": query, "key": key, "value": value}
    check_tensors(operands if attn_mask is None else operands | {"attn_mask": attn_mask})
    check_dtypes(operands)
    check_devices(operands if attn_mask is None else operands | {"attn_mask": attn_mask})
    check_ranks(operands)
    check_lengths(query, key, value)
    if enable_gqa:
        check_groups(query, key, value)
    else:
        check_batch(query, key, value)
    if attn_mask is not None:
        check_mask(attn_mask, query, key, value, enable_gqa)


def _plainly_fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the operands pass all checks in the plainest way: one batch shape, one dtype, one device."""
    tensors = isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
    return (
        tensors
        and query.dtype is key.dtype is value.dtype
        and query.dtype.is_floating_point
        and query.device == key.device == value.device
        and query.ndim == key.ndim == value.ndim >= 3
        and query.shape[-1] == key.shape[-1]
        and query.shape[:-2] == key.shape[:-2]
        and key.shape[:-1] == value.shape[:-1]
    )


def check_tensors(operands: dict[str, Tensor]) -> None:
    for name, x in operands.items():
        if not isinstance(x, Tensor):
            raise DtypeError(f"{name} is a {type(x).__name__}; a torch.Tensor is needed.")


def check_dtypes(operands: dict[str, Tensor]) -> None:
    for name, x in operands.items():
        if not x.dtype.is_floating_point:
            raise DtypeError(
                f"{name} has dtype {x.dtype}; attention needs a floating dtype. Convert it: {name}.float()."
            )
    if len({x.dtype for x in operands.values()}) > 1:
        given = ", ".join(f"{name} {x.dtype}" for name, x in operands.items())
        raise DtypeError(
            f"query, key and value must have one dtype; given {given}. Convert them with .to(query.dtype)."
        )


def check_devices(operands: dict[str, Tensor]) -> None:
    if len({x.device for x in operands.values()}) > 1:
        given = ", ".join(f"{name} on {x.device}" for name, x in operands.items())
        raise ArgumentError(f"all operands must be on one device; given {given}. Move them with .to(query.device).")


def check_ranks(operands: dict[str, Tensor]) -> None:
    for name, x in operands.items():
        if x.ndim < 2:
            raise ArgumentError(
                f"{name} has shape {tuple(x.shape)}; at least 2 dimensions (..., length, width) are needed. "
                f"Add the missing ones: {name}[None]."
            )


def check_lengths(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[-1] != key.shape[-1]:
        raise ArgumentError(
            f"query and key must have one width D (last dimension); given query {tuple(query.shape)} and key "
            f"{tuple(key.shape)}. Project them to the same width."
        )
    if key.shape[-2] != value.shape[-2]:
        raise ArgumentError(
            f"key and value must have one length M (dimension -2); given key {tuple(key.shape)} and value "
            f"{tuple(value.shape)}."
        )


def check_batch(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = [tuple(x.shape) for x in (query, key, value)]
    try:
        torch.broadcast_shapes(*(shape[:-2] for shape in shapes))
    except RuntimeError:
        hint = " For grouped-query attention pass enable_gqa=True." if query.ndim > 2 else ""
        raise ArgumentError(
            f"the leading dimensions of query {shapes[0]}, key {shapes[1]} and value {shapes[2]} do not "
            f"broadcast.{hint}"
        ) from None


def check_groups(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ArgumentError(
                f"enable_gqa=True needs a head dimension; {name} has shape {tuple(x.shape)}, and "
                f"(..., H, length, width) is needed."
            )
        heads, groups = query.shape[-3], x.shape[-3]
        if heads == 0 and groups > 1:
            raise ArgumentError(
                f"query has no heads and {name} {groups} (dimension -3); with enable_gqa=True give {name} none either: "
                f"{name}[..., :0, :, :]."
            )
        if heads % groups if groups else heads:
            raise ArgumentError(
                f"enable_gqa=True needs the number of query heads to be a multiple of {name}'s; given {heads} and "
                f"{groups} (dimension -3)."
            )
    try:
        torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise ArgumentError(
            f"the batch dimensions of query {tuple(query.shape)}, key {tuple(key.shape)} and value "
            f"{tuple(value.shape)} do not broadcast."
        ) from None


def batch_of_scores(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """Leading dimensions of the scores of checked operands."""
    if enable_gqa:
        return (*torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value))), query.shape[-3])
    return torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))


def check_mask(mask: Tensor, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise DtypeError(
            f"attn_mask has dtype {mask.dtype}; torch.bool (True attends), {query.dtype} (as query) or torch.float32 "
            f"is needed. Convert it: attn_mask.to(query.dtype) or attn_mask.bool()."
        )
    scores = (*batch_of_scores(query, key, value, enable_gqa), query.shape[-2], key.shape[-2])
    try:
        fits = torch.broadcast_shapes(mask.shape, scores) == torch.Size(scores)
    except RuntimeError:
        fits = False
    if not fits:
        raise ArgumentError(
            f"attn_mask of shape {tuple(mask.shape)} does not broadcast to the scores' shape {scores} (..., N, M)."
        )


def check_options(
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool, seed: int | Tensor | None
) -> None:
    """Raise unless what a call is given besides its operands has the right types and ranges."""
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, (bool, torch.SymBool)):
            raise DtypeError(f"{name} is a {_type_of(flag)}; a bool is needed.")
    check_scale(scale)
    check_dropout(dropout_p, seed)


def _type_of(x: object) -> str:
    """The name of its type, with the module's where it is not Python's own: NumPy has a bool, too."""
    kind = type(x)
    return kind.__name__ if kind.__module__ in ("builtins", "torch") else f"{kind.__module__}.{kind.__name__}"


def check_dropout(dropout_p: float, seed: int | Tensor | None) -> None:
    if not isinstance(dropout_p, NUMBER):
        raise DtypeError(
            f"dropout_p is a {_type_of(dropout_p)}; a float is needed, 0.0 for no dropout. Nothing is differentiated "
            f"with respect to it: of a tensor or an array pass dropout_p.item()."
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise ArgumentError(f"dropout_p is {dropout_p}; a probability between 0 and 1 is needed.")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise DtypeError(
            f"seed is a tensor of shape {tuple(seed.shape)} and dtype {seed.dtype}; an int or one torch.int64 element "
            f"is needed."
        )
    if seed is not None and not isinstance(seed, (*INTEGER, Tensor)):
        raise DtypeError(f"seed is a {type(seed).__name__}; an int or an int64 tensor of one element is needed.")
    if isinstance(seed, (int, Integral)) and not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"seed is {seed}; an integer that fits 64 bits is needed.")


def check_replayed(dropout_p: float, seed: int | Tensor | None) -> None:
    """Raise unless a derivative that is asked for by itself can have the dropout of its forward."""
    check_dropout(dropout_p, seed)
    if dropout_p > 0.0 and seed is None:
        raise ArgumentError(
            f"dropout_p is {dropout_p} and seed is None; an explicit derivative must replay the mask of its forward. "
            f"Pass the same seed to every function."
        )


def check_direction(name: str, direction: Sequence[Tensor | None]) -> None:
    if not isinstance(direction, Sequence):
        raise DtypeError(
            f"{name} is a {type(direction).__name__}; a tuple (query, key, value) or (query, key, value, attn_mask) of "
            f"tangents is needed, None for each that is zero."
        )
    if len(direction) > 4:
        raise ArgumentError(f"{name} has {len(direction)} entries; 3 (query, key, value) or 4 (attn_mask) fit.")


def check_scale(scale: float | None) -> None:
    if scale is not None and not isinstance(scale, NUMBER):
        raise DtypeError(
            f"scale is a {_type_of(scale)}; a float is needed. To differentiate with respect to a scale, multiply "
            f"query by it and pass scale=1.0."
        )
    if isinstance(scale, int) and abs(scale) > sys.float_info.max:
        raise ArgumentError(
            f"scale is an int of {scale.bit_length()} bits; a number of at most {sys.float_info.max:.1e}, the largest "
            f"float, is needed."
        )


def check_like(
    name: str, x: Tensor | None, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """A tangent or cotangent, where there is one, must look like what it belongs to."""
    if x is not None:
        require_like(name, x, shape, dtype, device)


def require_like(
    name: str, x: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(x, Tensor):
        raise DtypeError(f"{name} is a {type(x).__name__}; a torch.Tensor of shape {tuple(shape)} is needed.")
    if x.shape != torch.Size(shape):
        raise ArgumentError(f"{name} has shape {tuple(x.shape)}; {tuple(shape)} is needed.")
    if x.dtype != dtype:
        raise DtypeError(f"{name} has dtype {x.dtype}; {dtype} is needed.")
    if x.device != device:
        raise ArgumentError(f"{name} is on {x.device} and the operands are on {device}. Move it: .to('{device}').")


def unknown_option(name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that a function of the operator does not have."""
    known = list(known)
    return TypeError(f"there is no argument '{name}'; {', '.join(known)} are known.{_near(name, known)}")


def _near(name: str, known: list[str]) -> str:
    """' Did you mean ...?' where one of the known names is near."""
    near = difflib.get_close_matches(name, known, 1)
    return f" Did you mean '{near[0]}'?" if near else ""


def resolve(backend: str) -> str:
    """The backend that a name or an alias stands for."""
    if not isinstance(backend, str):
        raise DtypeError(f"backend is a {type(backend).__name__}; a str such as 'auto' is needed.")
    name = ALIASES.get(backend, backend)
    if name not in CAPABILITIES and name != "auto":
        known = ["auto", *CAPABILITIES, *ALIASES]
        raise ArgumentError(
            f"backend '{backend}' is not known; needed is one of {', '.join(known)}.{_near(backend, known)}"
        )
    return name


def obstacle(
    backend: str,
    query: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *,
    named: bool = True,
    mask_gradient: bool = False,
) -> str | None:
    """Why ``backend`` cannot compute this call, or None when it can.

    Args:
        named: it was asked for by name; a backend is not chosen to run in an interpreter.
        mask_gradient: a cotangent or a tangent of ``attn_mask`` is part of the call.
    """
    can = CAPABILITIES[backend]
    why = _device_obstacle(can, query, named)
    if why is not None:
        return why
    if query.dtype not in can.dtypes:
        return f"it takes {', '.join(str(d) for d in can.dtypes)}, and the inputs are {query.dtype}"
    for width in (query.shape[-1], value.shape[-1]):
        if width < can.min_head_dim or (can.max_head_dim is not None and width > can.max_head_dim):
            return f"it takes head dimensions {can.min_head_dim} to {can.max_head_dim}, and the inputs have {width}"
    if not can.mask_gradient and attn_mask is not None:
        if mask_gradient:
            return "it gives no derivative with respect to attn_mask, and one is asked for"
        if attn_mask.dtype != torch.bool and (what := differentiated(attn_mask)) is not None:
            return f"it gives no derivative with respect to attn_mask, and the one given {what}"
    return None


def _device_obstacle(can: Capability, query: Tensor, named: bool) -> str | None:
    """Why a backend cannot run on the device of a call."""
    if can.devices is None:
        return can.missing()
    simulated = can.interpreted_dtypes if interpreted() else None
    if query.device.type not in can.devices and not (simulated and query.device.type == "cpu"):
        where = " and ".join(can.devices)
        also = ", on the CPU in Triton's interpreter (TRITON_INTERPRET=1)" if can.interpreted_dtypes else ""
        return f"it runs on {where}{also}, and the inputs are on {query.device}"
    if (missing := can.missing()) is not None:
        return missing
    if simulated:
        if not named:
            return "it would run in Triton's interpreter (TRITON_INTERPRET=1), which is for tests: ask for it by name"
        if query.dtype in can.dtypes and query.dtype not in simulated:
            return f"Triton's interpreter (TRITON_INTERPRET=1) computes {query.dtype} wrongly"
    elif can.min_compute_capability is not None:
        found, needed = (".".join(map(str, x)) for x in (compute_capability(query.device), can.min_compute_capability))
        if compute_capability(query.device) < can.min_compute_capability:
            return f"it needs a GPU of compute capability {needed} or newer, and {query.device} has {found}"
    return None


def check_backend(
    backend: str, query: Tensor, value: Tensor, attn_mask: Tensor | None, *, mask_gradient: bool = False
) -> None:
    """Raise when the named backend cannot compute this call, with the reason and the backend that can."""
    if (why := obstacle(backend, query, value, attn_mask, mask_gradient=mask_gradient)) is None:
        return
    able = [
        name
        for name in PREFERENCE
        if obstacle(name, query, value, attn_mask, named=False, mask_gradient=mask_gradient) is None
    ]
    instead = f"backend='{able[0]}' can" if able else "no backend of this version can"
    raise UnsupportedError(f"backend '{backend}' cannot compute this call: {why}; {instead}.")
