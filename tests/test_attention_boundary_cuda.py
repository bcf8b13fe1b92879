"""The contract of the operator on a CUDA device: the same values as on the CPU, the same dropout mask."""

from functools import partial

import pytest
import torch

from tests.boundary import SAMPLES
from tests.tolerances import CUSTOM_F64
from theria.ops import sdpa
from theria.testing import COMPOSITIONS, DIRECTIONAL, compare, difference, make_sample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
backends = pytest.mark.parametrize("backend", ["reference", "custom", "auto"])
truth = partial(sdpa, backend="reference")


@backends
@pytest.mark.parametrize("composition", DIRECTIONAL)
def test_composition_equals_the_reference_on_the_cpu(composition: str, backend: str) -> None:
    compose = COMPOSITIONS[composition]
    for sample in SAMPLES:
        results = compose(partial(sdpa, backend=backend), sample.to(device="cuda"))
        assert all(x.is_cuda for x in results)
        assert difference([x.cpu() for x in results], compose(truth, sample)) <= CUSTOM_F64, sample.name


def test_auto_runs_on_the_kernels_where_they_can() -> None:
    x = make_sample((2, 4), 130, 130, 64, 64).to(torch.bfloat16, "cuda").x
    assert sdpa(*x).equal(sdpa(*x, backend="triton"))


@pytest.mark.parametrize("backend", ["reference", "custom", "triton", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_plain_pytorch(backend: str, dtype: torch.dtype) -> None:
    for causal in (False, True):
        sample = make_sample((2, 4), 130, 130, 64, 64, options={"is_causal": causal}).to(device="cuda")
        for composition in ("forward", "backward", "func_jvp", "double_backward", "forward_over_reverse"):
            result = compare(partial(sdpa, backend=backend), sample, composition, dtype)
            assert result.accurate, result
