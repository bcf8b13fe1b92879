"""Float32 products by parts: float32's accuracy in float64's eyes, for any strides and sizes of entries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton")

from theria.ops.triton import matmul as module
from theria.ops.triton.matmul import DEEP, ROUGH, SHALLOW, matmul, tile_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the norms of row and column. Two parts miss an entry by 2^-23 of itself, and what sums round is of that size.
ACCURACY = 1e-6
SHAPES = [(1, 1, 1), (3, 2, 5), (64, 64, 64), (64, 128, 128), (80, 144, 48), (70, 200, 33), (128, 320, 64), (1, 300, 1)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "batch last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every other": lambda x: torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0],
    "off by one": lambda x: torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape),
}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def error(found: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest, in units of the norms of an entry's row and column."""
    a, b = a.double(), b.double()
    scale = a.norm(dim=-1, keepdim=True) * b.norm(dim=-2, keepdim=True)
    return float(((found - a @ b).abs() / scale.clamp(min=1e-300)).max())


@pytest.fixture(params=[0, 90], ids=["any chip", "sm_90"])
def chip(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tiles of a chip, in the interpreter."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "architecture", lambda device: request.param)
    return request.param


@pytest.mark.usefixtures("poisoned", "chip")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32s_accuracy(shape: tuple[int, int, int]) -> None:
    M, K, N = shape
    a, b = rand(2, M, K), rand(2, K, N)
    assert error(matmul(a, b), a, b) <= ACCURACY
    assert error(matmul(a[0], b[1]), a[0], b[1]) <= ACCURACY
    assert matmul(a, b).shape == (2, M, N)
    assert matmul(a, b).is_contiguous()


@pytest.mark.usefixtures("poisoned", "chip")
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_strides_are_read_in_place(left: str, right: str) -> None:
    x, y = rand(2, 64, 80), rand(2, 80, 48)
    a, b = LAYOUTS[left](x), LAYOUTS[right](y)
    found = matmul(a, b)
    assert error(found, x, y) <= ACCURACY
    assert torch.equal(found, matmul(a, b))  # the same bits
    shared = LAYOUTS[right](y)[:1].expand(2, -1, -1)
    assert error(matmul(a, shared), x, y[:1]) <= ACCURACY


@pytest.mark.usefixtures("chip")
def test_strides_past_32_bits_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STRIDE", 128)
    x = rand(2, 64, 256)
    a, b = x[..., :112], x[:, :, 112:224].mT
    assert tile_for(a, b, 90) == ROUGH
    assert error(matmul(a, b), a, b) <= ACCURACY


@pytest.mark.usefixtures("chip")
def test_every_row_and_column_has_its_own_size() -> None:
    a, b = rand(2, 70, 150), rand(2, 150, 40)
    sizes = 10 ** torch.linspace(-20, 20, 70, device=DEVICE)
    a = a * sizes[:, None]
    b = b * 10 ** torch.linspace(17, -17, 40, device=DEVICE)
    assert error(matmul(a, b), a, b) <= ACCURACY


@pytest.mark.usefixtures("chip")
def test_a_large_entry_hides_nothing_but_its_row() -> None:
    a, b = rand(1, 64, 256), rand(1, 256, 64)
    a[0, 3, 7] = 1e30
    found, rest = matmul(a, b), torch.arange(64, device=DEVICE) != 3
    assert error(found, a, b) <= ACCURACY
    assert error(found[:, rest], a[:, rest], b) <= ACCURACY
    b[0, 7] = 0.0  # and of its row nothing in the blocks of the sum that it is not in
    a[0, 3, :7] = a[0, 3, 8:128] = 0.0
    found, a[0, 3, 7] = matmul(a, b), 0.0
    assert error(found, a, b) <= ACCURACY


@pytest.mark.usefixtures("chip")
def test_a_product_is_finite_where_its_factors_nearly_are_not() -> None:
    a, b = 1e37 * rand(1, 64, 64).clamp(-3, 3), 1e-34 * rand(1, 64, 64)
    for x, y in ((a, b), (b.mT, a.mT)):
        assert error(matmul(x, y) * 1e-3, x * 1e-3, y) <= ACCURACY
    assert error(matmul(a * 1e-37, 1e-38 * b * 1e34), a * 1e-37, 1e-38 * b * 1e34) <= 1e-5  # denormal entries


@pytest.mark.usefixtures("chip")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's of the interpreter
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_lost(value: float) -> None:
    a, b = rand(2, 70, 80), rand(2, 80, 40)
    a[0, 3, 5] = b[1, 7, 9] = value
    wrong = ~matmul(a, b).isfinite()
    assert torch.equal(wrong, ~torch.bmm(a, b).isfinite())
    assert wrong.sum() == 40 + 70


@pytest.mark.usefixtures("poisoned", "chip")
def test_zeros_are_zeros() -> None:
    a, b = rand(2, 70, 80), rand(2, 80, 40)
    a[0], b[:, :, 3] = 0.0, 0.0
    found = matmul(a, b)
    assert not found[0].any()
    assert not found[:, :, 3].any()
    assert not matmul(a[:, :, :0], b[:, :0]).any()  # a sum of nothing
    assert matmul(a[:0], b[:0]).shape == (0, 70, 40)


def test_tiles() -> None:
    a, b = rand(2, 64, 128), rand(2, 128, 64)
    assert tile_for(a, b, 90) == DEEP
    assert tile_for(a, b, 80) == SHALLOW
    assert tile_for(a[..., :64], b[:, :64], 90) == SHALLOW
    assert tile_for(a[:, :63], b, 90) == tile_for(a[..., 1:65], b[:, :64], 90) == tile_for(a[..., ::2], b[:, ::2], 90)
    assert tile_for(a[:, :63], b, 90) == ROUGH


def test_what_is_no_product_is_refused() -> None:
    a = rand(2, 3, 4)
    for x, y in ((a, a), (a, a[0].T), (a[0], a), (a[None], a[None].mT), (a[:1], a.mT)):
        with pytest.raises(ValueError, match="no matrix product"):
            matmul(x, y)
    with pytest.raises(TypeError, match="float32 operands are wanted"):
        matmul(a.double(), a.double().mT)
    with pytest.raises(ValueError, match="cannot hold the product"):
        torch.ops.theria.matmul.out(a, a.mT, out=rand(2, 3, 4))


def test_a_derivative_is_refused() -> None:
    a, b = rand(2, 3, 4), rand(2, 4, 5)
    required = b.clone().requires_grad_()
    for derive in (
        lambda: matmul(a, required),
        lambda: torch.func.grad(lambda a: matmul(a, b).sum())(a),
        lambda: torch.func.jvp(lambda b: matmul(a, b), (b,), (b,)),
    ):
        with pytest.raises(NotImplementedError, match="no derivative"):
            derive()
    with torch.no_grad():
        assert torch.equal(matmul(a, required), matmul(a, b))


def test_opcheck() -> None:
    a, b = rand(2, 64, 20), rand(2, 30, 20).mT
    for args in ((a, b), (a[0], b[0])):
        assert set(torch.library.opcheck(torch.ops.theria.matmul.default, args).values()) == {"SUCCESS"}


def test_it_writes_where_it_is_told() -> None:
    a, b = rand(2, 64, 20), rand(2, 20, 30)
    for out in (rand(2, 64, 30), rand(2, 30, 64).mT):
        assert torch.ops.theria.matmul.out(a, b, out=out) is out
        assert torch.equal(out, matmul(a, b))


@pytest.mark.skipif(not hasattr(torch.Tag, "out"), reason="an older compiler calls what returns a new tensor")
def test_compiled_it_reads_views_and_writes_planned_memory() -> None:
    """The code is that of `torch.bmm`: no copy of an operand, and a result that is known to be aligned."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tanh(matmul(x, w.mT))
        heads = y.view(2, 64, 2, 16).transpose(1, 2)
        return matmul(y.mT, x), matmul(heads[:, 1], w[:1, :16].expand(2, -1, -1))

    x, w = rand(2, 64, 48), rand(2, 32, 48)
    found, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), x, w)
    for result, wanted in zip(found, function(x, w), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-4)
    body = code[code.index("def call") : code.index("return (")]
    assert body.count("theria.matmul.out(") == 3
    assert body.count("empty_strided") == 3  # tanh is written over its argument
    assert "not aligned" not in body


COMPILED = """
import sys
from itertools import product
import torch
from theria.ops.triton import matmul as module
from theria.ops.triton.tiles import Tile
from theria.testing.compile import compile_launch
from theria.testing.kernels import Launch

arch = int(sys.argv[1])
SHAPES = [(320, 128, 512), (320, 64, 128), (336, 320, 528), (317, 131, 509), (320, 20, 512)]
WAYS = [
    lambda B, rows, columns: torch.empty(B, rows, columns, device="meta"),
    lambda B, rows, columns: torch.empty(B, columns, rows, device="meta").mT,
    lambda B, rows, columns: torch.empty(rows, columns, B, device="meta").permute(2, 0, 1),
]
PAIRS = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)]
for most, (M, K, N), (left, right) in [*product([2**23], SHAPES, PAIRS), (128, SHAPES[3], PAIRS[1])]:
    module.MAX_STRIDE = most
    a, b, c = WAYS[left](16, M, K), WAYS[right](16, K, N), WAYS[0](16, M, N)
    programs, args, static, tile = module.described(a, b, c, arch)
    launch = Launch(module.matmul_kernel, programs, None, args, static, Tile(64, 64, tile.warps, tile.stages))
    made = compile_launch(launch, arch)
    faults = "; ".join(made.faults(wgmma=arch == 90)) or "ok"
    print(most, (M, K, N), left, right, tuple(tile), made.registers, made.shared, faults)
"""


@pytest.mark.parametrize("arch", [90, 80])
def test_it_compiles_without_spills(arch: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 26, done.stderr
    assert all(line.endswith(" ok") for line in lines), done.stdout
