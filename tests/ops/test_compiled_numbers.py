"""Numbers that vary between the calls of a compiled function: there they are symbols of the graph, not Python's."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad

from theria.ops import CAPABILITIES, sdpa
from theria.testing import difference, make_sample, naive_attention

backends = pytest.mark.parametrize("backend", [name for name, can in CAPABILITIES.items() if can.missing() is None])
dynamic = pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLE = make_sample((2,), 3, 4, 2, 3).to(torch.float32, DEVICE)
# float32 against float64: scores of at most a few units, in each of two or three products.
F32 = 4e-6


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Any, dynamic: bool | None) -> Any:
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@backends
@dynamic
def test_a_scale_that_varies(backend: str, dynamic: bool | None) -> None:
    """Output and gradient; the truth is naive attention in float64."""

    def both(attend: Any) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            def loss(q: Tensor) -> Tensor:
                return attend(q, k, v, scale=scale).sin().sum()

            return attend(q, k, v, scale=scale), grad(loss)(q)

        return run

    function = compiled(both(lambda *x, **options: sdpa(*x, backend=backend, **options)), dynamic)
    for scale in (0.5, 0.6, -0.7, 0.0):
        expected = both(naive_attention)(*SAMPLE.to(torch.float64).x, scale)
        assert difference(function(*SAMPLE.x, scale), expected) <= F32


@backends
@dynamic
def test_an_integer_scale_that_varies(backend: str, dynamic: bool | None) -> None:
    function = compiled(lambda q, k, v, c: sdpa(q, k, v, scale=c, backend=backend), dynamic)
    for scale in (1, 2, 3):
        expected = naive_attention(*SAMPLE.to(torch.float64).x, scale=scale)
        assert difference([function(*SAMPLE.x, scale)], [expected]) <= F32


@backends
def test_a_scale_computed_from_a_shape_that_varies(backend: str) -> None:
    function = compiled(lambda q, k, v: sdpa(q, k, v, scale=q.shape[-1] ** -0.5, backend=backend), True)
    for width in (4, 6, 5):
        sample = make_sample((2,), 3, 4, width, 3).to(torch.float32, DEVICE)
        expected = naive_attention(*sample.to(torch.float64).x)
        assert difference([function(*sample.x)], [expected]) <= F32


@backends
@dynamic
def test_a_seed_that_varies(backend: str, dynamic: bool | None) -> None:
    """All 64 bits of it, in one graph."""

    def attend(q: Tensor, k: Tensor, v: Tensor, seed: int) -> Tensor:
        return sdpa(q, k, v, dropout_p=0.3, seed=seed, backend=backend)

    function = compiled(attend, dynamic)
    outputs = [function(*SAMPLE.x, seed) for seed in (3, 5)]
    with torch.compiler.set_stance("fail_on_recompile"):
        outputs += [function(*SAMPLE.x, seed) for seed in (2**40, -7, 2**63 - 1)]
    for found, seed in zip(outputs, (3, 5, 2**40, -7, 2**63 - 1), strict=True):
        assert difference([found], [attend(*SAMPLE.x, seed)]) <= F32
    assert not any(a.equal(b) for a, b in itertools.combinations(outputs, 2))
