"""The float32 products of a compiled step by parts: where they gain, nowhere else, and with float32's accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

from theria.meta import MAML, SGD, CapturedStep, MixedMode, Unrolled, compiled, inductor, products
from theria.meta.compiled import surroundings
from theria.meta.fused import Fused
from theria.nn import MLP
from theria.testing import difference

pytest.importorskip("triton")

import theria.ops.triton.matmul  # noqa: F401  # the operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where it is a CPU, kernels are interpreted
WAYS = 3
# float32 through two inner steps, relative to float64; PyTorch's own products are as far from it.
ROUNDING = 2e-6


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batched product gains, on a CPU too."""
    monkeypatch.setattr(products, "has_units", lambda device: True)
    monkeypatch.setattr(products, "SIDE", 1)
    monkeypatch.setattr(products, "TILES", 1)


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"  # what the older name knows
    torch.set_float32_matmul_precision(before)


def by_parts(*shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[bool]:
    """Which of these products are by parts in a graph of all of them."""

    def function(*operands: Tensor) -> list[Tensor]:
        return [a @ b for a, b in zip(operands[::2], operands[1::2], strict=True)]

    operands = [torch.zeros(shape, dtype=dtype) for pair in shapes for shape in pair]
    graph = products.by_parts(make_fx(function, tracing_mode="fake")(*operands))
    found = [node.target for node in graph.graph.nodes if "mm" in str(node.target) or "matmul" in str(node.target)]
    assert len(found) == len(shapes)
    return [target is torch.ops.theria.matmul.default for target in found]


@pytest.mark.parametrize(
    ("shape", "gains"),
    [
        ((16, 320, 128, 512), True),  # all of these were measured
        ((16, 320, 512, 128), True),
        ((16, 128, 320, 512), True),
        ((16, 320, 384, 128), True),
        ((16, 1600, 128, 512), True),
        ((16, 320, 128, 128), True),
        ((16, 128, 1600, 512), True),
        ((1, 5120, 128, 512), False),  # one
        ((16, 320, 128, 20), False),  # narrow
        ((512, 320, 16, 320), False),  # hardly a sum
        ((16, 64, 1600, 128), False),  # few programs for long sums
    ],
)
def test_the_rule(shape: tuple[int, int, int, int], gains: bool) -> None:
    assert products.gains(*shape) == gains


def test_only_what_gains_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    large, small = ((16, 320, 128), (16, 128, 512)), ((16, 320, 128), (16, 128, 16))
    assert by_parts(large) == [False]  # a CPU has no such units
    monkeypatch.setattr(products, "has_units", lambda device: True)
    assert by_parts(large, small, ((5120, 128), (128, 512)), large) == [True, False, False, True]
    for dtype in (torch.float64, torch.bfloat16):
        assert by_parts(large, dtype=dtype) == [False]
    monkeypatch.setattr(products, "PARTS", False)
    assert by_parts(large) == [False]


@pytest.mark.usefixtures("precision")
def test_lower_precision_is_left_as_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_units", lambda device: True)
    large = ((16, 320, 128), (16, 128, 512))
    for lower in ("high", "medium"):
        torch.set_float32_matmul_precision(lower)
        assert by_parts(large) == [False]
    torch.set_float32_matmul_precision("highest")
    assert by_parts(large) == [True]
    torch.backends.cuda.matmul.allow_tf32 = True
    assert by_parts(large) == [False]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # torch.get_float32_matmul_precision() raises now
    assert by_parts(large) == [False]


@pytest.mark.usefixtures("precision")
def test_another_precision_is_another_step() -> None:
    learner, seen = torch.nn.Linear(2, 2), []
    for precision in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(precision)
        seen.append(surroundings(learner))
    torch.set_float32_matmul_precision("highest")
    assert len(set(seen)) == 3
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert surroundings(learner) != seen[0]


@pytest.mark.parametrize(
    ("device", "capability", "missing", "has"),
    [
        ("cuda", (9, 0), None, True),
        ("cuda", (8, 0), None, True),
        ("cuda", (7, 5), None, False),
        ("cuda", (9, 0), "it needs Triton", False),
        ("cpu", (9, 0), None, False),
    ],
)
def test_which_devices_have_them(
    device: str, capability: tuple[int, int], missing: str | None, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = SimpleNamespace(missing=lambda: missing, min_compute_capability=(8, 0))
    monkeypatch.setattr(products, "compute_capability", lambda device: capability)
    monkeypatch.setattr(products, "CAPABILITIES", {"triton": limits})
    assert products.has_units(torch.device(device)) == has


def episode(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x = torch.rand(2, 3, 2 * WAYS, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    y = torch.arange(WAYS, device=DEVICE).repeat(3, 2)
    return x[0], y, x[1], y


def learner(adjoint: Any, dtype: torch.dtype) -> MAML:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(-3), MLP([64, 8, WAYS], activation=nn.Tanh))
    return MAML(model, cross_entropy, SGD(0.1), 2, adjoint).to(DEVICE, dtype)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("adjoint", [Unrolled(), MixedMode()], ids=lambda x: type(x).__name__)
def test_a_step_by_parts_is_the_step(adjoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[Any] = []

    def as_traced(piece: fx.GraphModule, inputs: Any) -> Any:
        met.extend(node.target for node in piece.graph.nodes)
        return piece

    monkeypatch.setattr(compiled, "Fused", partial(Fused, compiler=as_traced))
    own, exact = learner(adjoint, torch.float32), learner(adjoint, torch.float64)
    step = CapturedStep(own, record=False, compile=True)
    found = [step(episode(torch.float32)), *(p.grad for p in own.parameters())]
    loss = exact(episode(torch.float64))
    loss.backward()
    wanted = [loss.detach(), *(p.grad for p in exact.parameters())]
    assert difference([x.double() for x in found], wanted) <= ROUNDING
    assert met.count(torch.ops.theria.matmul.default) > 20
    assert torch.ops.aten.bmm.default not in met


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("options", [{}, inductor.OPTIONS], ids=str)
def test_a_compiled_piece(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's compiler, with each of the options that may be asked of it."""
    monkeypatch.setattr(inductor, "OPTIONS", options)

    def function(inputs: list[Tensor]) -> list[Tensor]:
        x, w, *others = inputs
        y = (x @ w.mT).tanh()
        return [y.mT @ x, *(other.sum(0) for other in others)]

    inputs = [x.to(DEVICE) for x in (torch.randn(2, 20, 12), torch.randn(2, 9, 12), *torch.randn(12, 16, 128))]
    run = Fused(function, inputs)
    assert [node.target for node in run.pieces[0].graph.nodes].count(torch.ops.theria.matmul.default) == 2
    assert difference([x.double() for x in run(inputs)], function([x.double() for x in inputs])) <= 1e-6
