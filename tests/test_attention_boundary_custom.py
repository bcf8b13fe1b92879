"""The contract of the operator, on the custom backend (see docs/design/operator_contracts.md)."""

from functools import partial

import pytest
import torch

from tests.boundary import LAW_CASES, SAMPLES, ids
from tests.tolerances import CUSTOM_F64, LAW_F64
from theria.ops import sdpa, sweep
from theria.testing import (
    COMPOSITIONS,
    DIRECTIONAL,
    LAWS,
    Sample,
    chained,
    compare,
    difference,
    make_sample,
    third_order,
)

attend = partial(sdpa, backend="custom")
truth = partial(sdpa, backend="reference")

LOW_PRECISION = [
    make_sample((2, 2), 33, 40, 16, 12, name="random"),
    make_sample((2, 2), 33, 40, 16, 12, magnitude=6.0, name="large_logits"),
    make_sample((1,), 8, 600, 16, 16, name="long"),
    make_sample((2, 2), 33, 33, 16, 12, options={"is_causal": True}, name="causal"),
]


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_composition_equals_the_reference(composition: str) -> None:
    for sample in SAMPLES if composition in DIRECTIONAL else SAMPLES[:2]:
        compose = COMPOSITIONS[composition]
        assert difference(compose(attend, sample), compose(truth, sample)) <= CUSTOM_F64, sample.name


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_composition_through_two_calls(composition: str) -> None:
    sample = make_sample((2, 2), 5, 5, 4, 4, options={"is_causal": True})
    compose = COMPOSITIONS[composition]
    assert difference(compose(chained(attend), sample), compose(chained(truth), sample)) <= CUSTOM_F64


@pytest.mark.parametrize("composition", ["double_backward", "forward_over_reverse", "forward_over_forward"])
def test_many_blocks_equal_one(composition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny tiles every sample is swept in several blocks of rows."""
    monkeypatch.setattr(sweep, "MIN_ROWS", 2)
    monkeypatch.setitem(sweep.TILE_ELEMENTS, "cpu", 1)
    compose = COMPOSITIONS[composition]
    for sample in SAMPLES:
        assert difference(compose(attend, sample), compose(truth, sample)) <= CUSTOM_F64, sample.name


@pytest.mark.parametrize(("law", "sample"), LAW_CASES, ids=ids)
def test_law(law: str, sample: Sample) -> None:
    assert LAWS[law](attend, sample) <= LAW_F64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sample", LOW_PRECISION, ids=ids)
def test_as_accurate_as_plain_pytorch(sample: Sample, dtype: torch.dtype) -> None:
    for composition in ("forward", "backward", "func_jvp", "double_backward", "forward_over_reverse"):
        result = compare(attend, sample, composition, dtype)
        assert result.accurate, result


def test_third_order_raises() -> None:
    for sample in SAMPLES[:3]:
        with pytest.raises(NotImplementedError, match=r"third-order .*backend='reference'"):
            third_order(attend, sample)


def test_nothing_is_left_unwritten(poisoned: None) -> None:
    for sample in SAMPLES:
        for composition in ("forward", "double_backward", "forward_over_reverse", "forward_over_forward"):
            results = COMPOSITIONS[composition](attend, sample)
            assert all(x.isfinite().all() for x in results), (sample.name, composition)
