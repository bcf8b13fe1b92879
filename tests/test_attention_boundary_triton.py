"""The fused backend is present as a name, and using it says what is missing: it never becomes another backend."""

import pytest

from tests.boundary import SAMPLES
from theria.ops import UnsupportedError, explain, sdpa, triton_sdpa_fused


@pytest.mark.parametrize("name", ["triton", "triton_full_fused"])
def test_use_says_what_is_missing(name: str) -> None:
    for sample in SAMPLES[:3]:
        with pytest.raises(UnsupportedError, match=r"'triton' cannot .*kernels.*backend='custom' can"):
            sdpa(*sample.x, **sample.options, backend=name)
        explanation = explain(*sample.x, **sample.options, backend=name)
        assert explanation.backend is None
        assert "kernels" in explanation.reason


def test_fused_forward_says_what_is_missing() -> None:
    with pytest.raises(UnsupportedError, match="kernels"):
        triton_sdpa_fused(*SAMPLES[0].x, return_stats=True)
