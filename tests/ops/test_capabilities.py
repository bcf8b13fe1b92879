"""Each claim of the capability table, tested both ways: what is claimed works, what is not raises."""

import itertools
from functools import partial

import pytest
import torch

from theria.ops import CAPABILITIES, UnsupportedError, explain, sdpa
from theria.ops.capabilities import ALIASES, FLOATS, PREFERENCE
from theria.testing import make_sample, third_order

DTYPES = [*FLOATS, torch.float8_e4m3fn]
WIDTHS = [1, 64, 300]


def test_the_table_names_every_backend_once() -> None:
    assert set(PREFERENCE) == set(CAPABILITIES)
    assert set(ALIASES.values()) <= set(CAPABILITIES)


@pytest.mark.parametrize("backend", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "width"), list(itertools.product(DTYPES, WIDTHS)), ids=str)
def test_dtypes_and_widths(backend: str, dtype: torch.dtype, width: int) -> None:
    can = CAPABILITIES[backend]
    x = make_sample((1, 2), 3, 3, width, width).to(dtype).x
    claimed = (
        can.missing() is None
        and (can.devices is None or "cpu" in can.devices)
        and dtype in can.dtypes
        and (can.max_head_dim is None or width <= can.max_head_dim)
    )
    assert (explain(*x, backend=backend).backend == backend) == claimed
    if claimed:
        out = sdpa(*x, backend=backend)
        assert out.dtype == dtype
        assert out.isfinite().all()
    else:
        with pytest.raises(UnsupportedError, match=rf"backend '{backend}' cannot compute this call: .*; .* can\b"):
            sdpa(*x, backend=backend)


@pytest.mark.parametrize("backend", [b for b in CAPABILITIES if CAPABILITIES[b].missing() is None])
def test_orders_and_mask_gradients(backend: str) -> None:
    can, sample = CAPABILITIES[backend], make_sample()

    attend = partial(sdpa, backend=backend)
    if can.max_order is None:
        assert third_order(attend, sample)[0].isfinite().all()
    else:
        assert can.max_order == 2
        with pytest.raises(NotImplementedError, match="third-order"):
            third_order(attend, sample)
    bias = torch.zeros(5, 7, dtype=torch.float64, requires_grad=True)
    if can.mask_gradient:
        assert torch.autograd.grad(sdpa(*sample.x, bias, backend=backend).sum(), bias)[0].shape == bias.shape


def test_explain_names_the_choice_and_the_reasons() -> None:
    x = make_sample().x
    auto = explain(*x)
    assert auto.backend == "custom"
    assert "order 2" in auto.reason
    assert set(auto.rejected) == {"triton", "reference"}
    assert "kernels" in auto.rejected["triton"]
    named = explain(*x, backend="reference")
    assert named.backend == "reference"
    assert "every order" in named.reason
    assert "never becomes another" in named.rejected["custom"]
    assert str(auto).splitlines()[0].startswith("custom: ")


def test_explain_computes_nothing() -> None:
    assert explain(*make_sample().to(device="meta").x).backend == "custom"
