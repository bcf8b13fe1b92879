"""What half precision and autocast mean for operations that are written out here."""

from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, for what needs more digits; anything else as it is."""
    return x.float() if x.dtype in HALF else x


def float32_under_autocast(first: Tensor, *others: Tensor | None) -> list[Any]:
    """The arguments of an operation on autocast's float32 list as autocast gives them; without it as they are."""
    kind, given = first.device.type, [first, *others]
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return [at_least_float32(x) if on and x is not None else x for x in given]
