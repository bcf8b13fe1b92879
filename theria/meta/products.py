"""The float32 products of a compiled step by parts of half precision, with float32's accuracy.

At "highest" precision cuBLAS computes float32 products outside of a GPU's matrix units, and in a compiled outer step
they are half of the time. `theria::matmul` (`theria.ops.triton.matmul`) computes them inside, as three products of fp16
parts, and in a graph it takes the place of PyTorch's operators. Lower precisions are left as they were asked for.
"""

from typing import Any

import torch
from torch import Tensor, fx

from theria.ops.capabilities import CAPABILITIES, compute_capability
from theria.ops.precision import matmul_precision

PARTS = True  # False: the products are PyTorch's; read when a step is compiled for the first time with its shapes

SIDE = 32  # the kernel's tiles are 64 by 64: below this, three quarters of the work would be on nothing
# Tiles of one product by their number: there ought to be one for each of a GPU's multiprocessors (an H200 has 132),
# because sums are not split among programs as cuBLAS splits them. The smallest measured gain is that of 160.
TILE, TILES = 64, 128

BATCHED = torch.ops.aten.bmm.default


def gains(batch: int, M: int, K: int, N: int) -> bool:
    """Whether `batch` products (M, K) (K, N) are faster by parts.

    Measured on an H200, 16 products with sides from 128 to 1600 take 0.62 to 0.78 of the time. A single one is left to
    cuBLAS, and so is what is no batch (`aten.mm`): large ones of a step (all tasks in one batch of rows) are few, and
    were not measured.
    """
    tiles = batch * -(-M // TILE) * -(-N // TILE)
    return batch > 1 and min(M, K, N) >= SIDE and tiles >= TILES


def has_units(device: torch.device) -> bool:
    """Whether the kernel runs on a device, and on its matrix units: where those of attention do."""
    kernels = CAPABILITIES["triton"]
    on_gpu = device.type == "cuda" and kernels.missing() is None
    return on_gpu and compute_capability(device) >= (kernels.min_compute_capability or (0, 0))


def by_parts(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with `theria::matmul` in the place of the products that gain by it, changed in place.

    Args:
        graph: of PyTorch's own operators, with example values (`meta["val"]`).
    """
    if not PARTS or matmul_precision() != "highest":
        return graph
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is BATCHED and _gains(*node.args):
            import theria.ops.triton.matmul  # noqa: F401  # where has_units is true, Triton is there

            node.target = torch.ops.theria.matmul.default
    graph.recompile()
    return graph


def _gains(a: Any, b: Any) -> bool:
    a, b = a.meta.get("val"), b.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.dtype == b.dtype == torch.float32:
        return False
    batch, M, K = a.shape
    return has_units(a.device) and gains(batch, M, K, b.shape[-1])
