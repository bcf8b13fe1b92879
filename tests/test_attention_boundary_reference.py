"""The contract of the operator, on the reference backend (see docs/design/operator_contracts.md)."""

from functools import partial

import pytest

from tests.boundary import LAW_CASES, SAMPLES, WITH_TRUTH, ids
from tests.tolerances import LAW_F64, REFERENCE_F64
from theria.ops import sdpa
from theria.testing import (
    COMPOSITIONS,
    DIRECTIONAL,
    LAWS,
    Sample,
    chained,
    difference,
    make_sample,
    naive_attention,
    third_order,
)

attend = partial(sdpa, backend="reference")


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_composition_equals_autograd_of_the_naive_formula(composition: str) -> None:
    for sample in WITH_TRUTH if composition in DIRECTIONAL else WITH_TRUTH[:2]:
        compose = COMPOSITIONS[composition]
        error = difference(compose(attend, sample), compose(naive_attention, sample))
        assert error <= REFERENCE_F64, sample.name


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_composition_through_two_calls(composition: str) -> None:
    sample = make_sample((2, 2), 5, 5, 4, 4, options={"is_causal": True})
    compose = COMPOSITIONS[composition]
    assert difference(compose(chained(attend), sample), compose(chained(naive_attention), sample)) <= REFERENCE_F64


@pytest.mark.parametrize(("law", "sample"), LAW_CASES, ids=ids)
def test_law(law: str, sample: Sample) -> None:
    assert LAWS[law](attend, sample) <= LAW_F64


def test_third_order_is_exact() -> None:
    for sample in SAMPLES[:3]:
        assert difference(third_order(attend, sample), third_order(naive_attention, sample)) <= REFERENCE_F64
