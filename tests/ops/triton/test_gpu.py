"""What only a GPU shows: graphs, determinism across processes, very many heads, addresses past 2³¹ elements."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from theria.ops import reference, sdpa
from theria.ops.triton.tiles import DTYPES, Key, architecture, is_short
from theria.testing import difference, make_sample
from theria.testing.compile import configurations
from theria.testing.kernels import Problem, call, make_problem
from theria.testing.kernels import truth as exact_results

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BF16 = 1e-2  # of bfloat16 results, far above their rounding (3e-3) and far below anything wrong
RATIO = 3.0  # times the error of the same formulas in plain PyTorch and the same dtype
fused: Callable[..., Tensor] = partial(sdpa, backend="triton")
truth: Callable[..., Tensor] = partial(sdpa, backend="reference")
SHAPES = pytest.mark.parametrize(
    "shape", [(2, 3, 40, 16), (40, 8, 128, 64), (2, 3, 200, 64)], ids=["short", "two walks", "long"]
)

Everything = Callable[[list[Tensor]], list[Tensor]]


def everything(tensors: list[Tensor]) -> list[Tensor]:
    """Output, gradients and the whole double backward of (q, k, v, do, a, b, c)."""
    *leaves, a, b, c = tensors
    q, k, v, do = (x.detach().requires_grad_() for x in leaves)
    out = fused(q, k, v, is_causal=True)
    first = torch.autograd.grad(out, (q, k, v), do, create_graph=True)
    second = torch.autograd.grad(first, (q, k, v, do), (a, b, c))
    return [x.detach() for x in (out, *first, *second)]


def tensors(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(7)]


def test_a_profiler_is_told_of_replayed_launches() -> None:
    from triton import knobs

    q, k, v, *_ = tensors((1, 2, 16, 16), 0)
    expected = fused(q, k, v)
    told: list[str] = []

    def hook(metadata: Any) -> None:
        told.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        watched = fused(q, k, v)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert told == ["forward_kernel"]
    assert torch.equal(watched, expected)
    assert torch.equal(fused(q, k, v), expected)
    assert len(told) == 1


@SHAPES
def test_a_graph_replays_forward_backward_and_double_backward(shape: tuple[int, ...]) -> None:
    static = tensors(shape, 0)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            everything(static)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        captured = everything(static)
    for seed in (1, 2):
        given = tensors(shape, seed)
        for x, y in zip(static, given, strict=True):
            x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        assert all(x.equal(y) for x, y in zip(captured, everything(given), strict=True))


@SHAPES
@pytest.mark.parametrize("strict", [False, True], ids=["", "use_deterministic_algorithms"])
def test_a_hundred_repeats_have_the_same_bits(shape: tuple[int, ...], strict: bool) -> None:
    given = tensors(shape, 0)
    first = everything(given)
    torch.use_deterministic_algorithms(strict)
    try:
        for _ in range(100):
            assert all(x.equal(y) for x, y in zip(everything(given), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_test_after_a_fault() -> Iterator[None]:
    """A fault of the device stays with its process: this one ends, and pytest-xdist names the test and goes on."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


ARCH = architecture(torch.device("cuda", 0)) if torch.cuda.is_available() else 0


def problem_for(key: Key, kind: str) -> Problem:
    """A call whose tiles are all whole, or with edges, or with a mask and dropout beside them."""
    N = M = key.keys if is_short(key.kernel) else 512
    heads = 300 if is_short(key.kernel) else 3
    if kind != "whole":
        N, M = N - 1, M - 3
    problem = make_problem((1, heads, N, M, key.width, key.width), DTYPES[key.kind], key.causal, "cuda")
    if kind == "masked":
        generator = torch.Generator("cuda").manual_seed(1)
        mask = torch.rand(1, heads, N, M, generator=generator, device="cuda") > 0.2
        mask[..., 0] = True  # lse is finite
        ops, spec = problem.ops._replace(mask=mask), problem.spec
        if not key.kernel.startswith("jvp_dq"):  # which has no dropout
            ops = ops._replace(seed=torch.full((1, 1, 1, 1), 7, device="cuda"))
            spec = replace(spec, dropout_p=0.1, heads=(1, heads))
        whole = replace(problem, ops=ops, spec=spec).map(double)
        o, lse = reference.forward(whole.ops, spec)
        dq, *_ = reference.vjp(whole.ops, o, lse, whole.do, spec, (whole.ops.q.shape, None, None, None))
        to, tau = reference.jvp(whole.ops, o, lse, whole.t, spec)
        _, tau2 = reference.jvp(whole.ops, o, lse, whole.t2, spec)
        assert dq is not None
        rounded = {name: x.to(problem.o.dtype) for name, x in {"o": o, "dq": dq, "to": to}.items()}
        problem = replace(problem, ops=ops, spec=spec, lse=lse.float(), tau=tau.float(), tau2=tau2.float(), **rounded)
    return problem


@pytest.mark.parametrize("key", list(configurations(ARCH)) if ARCH else [], ids=lambda key: "-".join(map(str, key)))
@pytest.mark.parametrize("kind", ["whole", "edges", "masked"])
def test_every_configuration_is_right(key: Key, kind: str) -> None:
    """Values, not only what compiles: compilers make wrong programs of right kernels for one tile alone.

    Seen: ptxas 12.8 lets P take the registers of a held Q (forward, 128 rows, 4 warps); Triton 3.6 loses the order of a
    tile of scores on its way to the matrix unit (16 keys with mask and dropout).
    """
    problem = problem_for(key, kind)
    results = call(key.kernel, problem)
    exact, plain = exact_results(key.kernel, problem.map(double)), exact_results(key.kernel, problem)
    for x, y, z in zip(results, plain, exact, strict=True):
        assert difference((x,), (z,)) <= RATIO * difference((y,), (z,)) + 8 * torch.finfo(DTYPES[key.kind]).eps


def double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def digest() -> str:
    """Bits of every derivative as text."""
    results = [x for shape in ((2, 3, 40, 16), (2, 3, 200, 64)) for x in everything(tensors(shape, 0))]
    return " ".join(
        str(int(x.view(torch.int16).long().mul(torch.arange(x.numel(), device="cuda").view_as(x)).sum()))
        for x in results
    )


def test_another_process_has_the_same_bits() -> None:
    code = "from tests.ops.triton.test_gpu import digest; print(digest())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == digest()


@pytest.mark.parametrize("keys", [8, 130], ids=["short", "long"])
def test_more_heads_than_a_grid_has_rows(keys: int) -> None:
    heads = 70_000
    x = [torch.randn(heads, 1, n, 16, device="cuda", dtype=torch.bfloat16) for n in (8, keys, keys)]
    do, t = torch.randn_like(x[0]), [torch.randn_like(a) for a in x]
    leaves = [a.requires_grad_() for a in x]
    first = torch.autograd.grad(fused(*leaves), leaves, do, create_graph=True)
    second = torch.autograd.grad(first, leaves, t)
    part = slice(heads - 3, heads)
    own = [a[part].detach().double().requires_grad_() for a in x]
    exact_first = torch.autograd.grad(truth(*own), own, do[part].double(), create_graph=True)
    exact = torch.autograd.grad(exact_first, own, [a[part].double() for a in t])
    assert difference([a[part] for a in (*first, *second)], (*exact_first, *exact)) <= BF16


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 24 * 2**30, reason="needs 24 GB"
)
@pytest.mark.parametrize("keys", [8, 130], ids=["short", "long"])
def test_addresses_past_two_to_the_31(keys: int) -> None:
    far = 2**31 + 64  # elements between the two heads
    memory = torch.empty(far + 2**20, dtype=torch.bfloat16, device="cuda")

    def spread(x: Tensor, offset: int) -> Tensor:
        view = memory[offset:].as_strided(x.shape, (far, far, x.shape[-1], 1))
        return view.copy_(x)

    near = [torch.randn(2, 1, n, 16, device="cuda", dtype=torch.bfloat16) for n in (40, keys, keys)]
    do, t = torch.randn_like(near[0]), [torch.randn_like(a) for a in near]
    spaced = [spread(a, 2**14 * i) for i, a in enumerate((*near, do, *t))]
    results = []
    for q, k, v, cotangent, *directions in ([*near, do, *t], spaced):
        leaves = [a.detach().requires_grad_() for a in (q, k, v)]
        first = torch.autograd.grad(fused(*leaves), leaves, cotangent, create_graph=True)
        results.append((*first, *torch.autograd.grad(first, leaves, directions)))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_a_seed_on_the_device_can_be_captured() -> None:
    sample = make_sample((1, 2), 33, 40, 16, 16).to(torch.float16, "cuda")
    seed = torch.tensor([7], device="cuda")
    run = partial(fused, *sample.x, dropout_p=0.5, seed=seed)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        out = run()
    graph.replay()
    torch.cuda.synchronize()
    assert out.equal(fused(*sample.x, dropout_p=0.5, seed=7))
