"""PyTorch's compiler, as it is asked to compile the pieces of an outer step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

CONVOLUTIONS = {torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default}

# What is asked of PyTorch's compiler beyond its defaults, for pieces without a convolution (those with one were only
# measured with the defaults). On a CPU nothing changes; the outer step of `scripts/bench_outer.py` took an H200 23.3 ms
# with both and 25.2 at best without.
OPTIONS: dict[str, Any] = {
    "combo_kernels": True,  # independent small operations, such as the sums for many biases, share a kernel
    # what theria's operators return is allocated by PyTorch, so that it is aligned; asserted where it is used
    "assume_unaligned_fallback_output": False,
}


def inductor(piece: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """PyTorch's compiler."""
    import torch._inductor  # takes longer than to import torch

    options = {} if convolves(piece) else OPTIONS
    return torch._inductor.compile(piece, list(inputs), options=options)  # type: ignore[return-value]


def convolves(piece: fx.GraphModule) -> bool:
    """Whether a convolution, or the gradient of one, is among the operations."""
    return any(node.target in CONVOLUTIONS for node in piece.graph.nodes)
