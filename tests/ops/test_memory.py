"""Linear memory of the custom backend: no array of all rows by all keys at any order, and a peak linear in length."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from theria.ops import sdpa, sweep
from theria.testing import COMPOSITIONS, make_sample
from theria.testing.memory import PeakMemory

ORDERS = ["forward", "backward", "func_jvp", "double_backward", "forward_over_reverse", "forward_over_forward"]


class Largest(TorchDispatchMode):
    """Most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweep.TILE_ELEMENTS, "cpu", 2**13)
    monkeypatch.setattr(sweep, "MIN_ROWS", 8)


def run(order: str, length: int, mode: Any, **options: Any) -> Any:
    sample = make_sample((1, 2), length, length, 8, 8, options=options)
    with mode:
        COMPOSITIONS[order](partial(sdpa, backend="custom"), sample)
    return mode


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3, "seed": 1}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_no_array_of_rows_by_keys(order: str, options: dict[str, Any]) -> None:
    length = 512
    assert run(order, length, Largest(), **options).elements <= 2 * 32 * length  # a tile, far below length²


@pytest.mark.parametrize("order", ORDERS)
def test_peak_is_linear_in_length(order: str) -> None:
    """Doubling the length at most doubles the peak; a quadratic one would quadruple it."""
    short, long = (run(order, length, PeakMemory()).peak for length in (512, 1024))
    assert long <= 2.2 * short


def test_the_reference_is_not_linear() -> None:
    """The measurements can tell: the materialised backend fails them."""
    sample = make_sample((1, 2), 512, 512, 8, 8)
    with Largest() as largest:
        sdpa(*sample.x, backend="reference")
    assert largest.elements >= 512 * 512
