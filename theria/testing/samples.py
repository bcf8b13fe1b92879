"""Seeded attention calls to test with: operands, directions and cotangents of one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Attend = Callable[..., Tensor]  # (query, key, value, **options) -> output, like theria.ops.sdpa


@dataclass(frozen=True)
class Sample:
    """One attention call and what its derivatives need.

    Attributes:
        x: query (..., N, D), key (..., M, D), value (..., M, E).
        t, u: two directions, shaped like ``x``.
        do: a cotangent of the output.
        options: keyword arguments of the call (mask, is_causal, scale, enable_gqa, dropout).
        name: for test ids.
    """

    x: tuple[Tensor, Tensor, Tensor]
    t: tuple[Tensor, Tensor, Tensor]
    u: tuple[Tensor, Tensor, Tensor]
    do: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of ``x`` that require grad."""
        q, k, v = (a.detach().clone().requires_grad_() for a in self.x)
        return q, k, v

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Sample:
        """The same call with floating tensors in another dtype, or on another device."""

        def cast(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(device=device, dtype=dtype if x.dtype.is_floating_point else None)

        move = {name: cast(value) for name, value in self.options.items()}
        x, t, u = (tuple(cast(a) for a in group) for group in (self.x, self.t, self.u))
        return replace(self, x=x, t=t, u=u, do=cast(self.do), options=move)


def make_sample(
    batch: tuple[int, ...] = (2, 2),
    N: int = 5,
    M: int = 7,
    D: int = 4,
    E: int = 3,
    *,
    key_batch: tuple[int, ...] | None = None,
    options: dict[str, Any] | None = None,
    magnitude: float = 1.0,
    seed: int = 0,
    name: str = "",
) -> Sample:
    """A float64 sample with normal entries; ``magnitude`` scales query and key."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    key_batch = batch if key_batch is None else key_batch

    def operands() -> tuple[Tensor, Tensor, Tensor]:
        return normal(*batch, N, D), normal(*key_batch, M, D), normal(*key_batch, M, E)

    q, k, v = operands()
    return Sample((q * magnitude, k * magnitude, v), operands(), operands(), normal(*batch, N, E), options or {}, name)


def masks(N: int, M: int, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Options of every kind of mask; each row keeps at least one visible key, except in ``hidden_rows``."""
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(N, M, generator=generator) < 0.6
    visible[:, 0] = True
    hidden = visible.clone()
    hidden[0] = False
    padding = torch.ones(2, 1, 1, M, dtype=torch.bool)
    padding[0, ..., M // 2 :] = False
    bias = torch.randn(N, M, generator=generator, dtype=torch.float64)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": visible},
        "hidden_rows": {"attn_mask": hidden},
        "key_padding": {"attn_mask": padding},
        "bias": {"attn_mask": bias},
        "bias_per_head": {"attn_mask": torch.randn(1, 2, N, M, generator=generator, dtype=torch.float64)},
        "bias_with_inf": {"attn_mask": bias.masked_fill(~visible, float("-inf"))},
        "causal_and_bias": {"attn_mask": bias, "is_causal": True},
        "scale": {"scale": 0.3},
        "dropout": {"dropout_p": 0.4, "seed": 7},
        "dropout_causal": {"dropout_p": 0.25, "seed": 2**40 + 3, "is_causal": True},
    }


def standard_samples() -> Iterator[Sample]:
    """The calls that every backend is tested on: N ≠ M, E ≠ D, every mask, groups, broadcast, odd sizes."""
    for name, options in masks(5, 7).items():
        yield make_sample(options=options, name=name)
    for name, options in masks(6, 6, seed=1).items():
        if name in ("plain", "causal", "bias"):
            yield make_sample(N=6, M=6, D=3, E=5, options=options, seed=1, name=f"square_{name}")
    for heads, key_heads in ((6, 2), (4, 1)):
        for name, options in itertools.islice(masks(5, 7, seed=2).items(), 2):
            options = options | {"enable_gqa": True}
            yield make_sample((2, heads), key_batch=(2, key_heads), options=options, seed=2, name=f"gqa{heads}_{name}")
    yield make_sample((), N=1, M=1, D=1, E=1, seed=3, name="single_entry")
    yield make_sample((3,), N=9, M=2, D=8, E=2, options={"is_causal": True}, seed=4, name="causal_more_queries")
    yield make_sample((3,), N=2, M=9, D=8, E=2, options={"is_causal": True}, seed=5, name="causal_more_keys")
    yield make_sample((2, 3), key_batch=(1, 3), seed=6, name="broadcast_batch")


def chained(attend: Attend) -> Attend:
    """Two calls, the second on what the first gives: derivatives pass from one into the other, as between layers.

    Some of PyTorch's nested transforms are right through one ``autograd.Function`` and wrong through two. For samples
    with N = M and D = E.
    """

    def twice(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        x = attend(1.5 * query, key.sin(), value, **options)
        return attend(x, 0.5 * x + key, x * value, **options)

    return twice


def naive_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attention as one would first write it, with autograd for every derivative: the truth of the chain.

    Takes the options of :func:`theria.ops.sdpa` but ``seed``, ``backend`` and dropout. A row that sees no key is 0.
    """
    mask, scale = options.get("attn_mask"), options.get("scale")
    if options.get("enable_gqa"):
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    S = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    visible = torch.ones(S.shape[-2:], dtype=torch.bool, device=S.device)
    if options.get("is_causal"):
        visible = visible.tril()
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > float("-inf"))
        S = S + mask.masked_fill(mask == float("-inf"), 0.0)
    row = visible.any(-1, keepdim=True)
    P = S.masked_fill(~(visible | ~row), float("-inf")).softmax(-1)
    return P.masked_fill(~row, 0.0) @ value
