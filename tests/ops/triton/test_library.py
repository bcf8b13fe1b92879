"""The operators of torch.library: their fakes, and torch.compile of derivatives through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

from theria.ops import sdpa, sdpa_hvp
from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents
from theria.testing import difference, make_sample

pytest.importorskip("triton")

from theria.ops.triton import library, rules

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = tuple[str, tuple[Any, ...]]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def calls(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shapes: tuple[Any, ...] | None = None,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    **options: Any,
) -> Iterator[Call]:
    """Every rule at one call, with some tangents absent and some cotangents not wanted."""
    spec = AttentionSpec("triton", scale=0.3, **options)
    ops = Operands(q, k, v, mask, seed)
    o, lse = rules.forward(ops, spec)
    wanted: Shapes = (q.shape, k.shape, v.shape, None) if shapes is None else (*shapes, None)  # type: ignore[assignment]
    do, tdo = torch.randn_like(o), torch.randn_like(o)
    t, t2 = Tangents(torch.randn_like(q), torch.randn_like(k)), Tangents(None, None, torch.randn_like(v))
    (to, tau), (_, tau2) = rules.jvp(ops, o, lse, t, spec), rules.jvp(ops, o, lse, t2, spec)
    yield "forward", (ops, spec)
    yield "vjp", (ops, o, lse, do, spec, wanted)
    yield "jvp", (ops, o, lse, t, spec)
    yield "hvp", (ops, o, lse, do, t, tdo, to, tau, spec, wanted)
    yield "jvp_jvp", (ops, o, lse, t, t2, Tangents(q), tau, tau2, spec)
    dq, *_ = rules.vjp(ops, o, lse, do, spec, wanted)
    yield "jvp_hvp", (ops, o, lse, do, dq, t, None, spec, wanted)


def projections() -> Iterator[Call]:
    """Operands that are (B, N, H, D) in memory."""
    q, k, v = (rand(1, n, 2, d).transpose(1, 2) for n, d in ((3, 8), (4, 8), (4, 5)))
    return calls(q, k, v, is_causal=True)


def groups() -> Iterator[Call]:
    q, k, v = rand(1, 2, 2, 3, 8), rand(1, 2, 1, 4, 8), rand(1, 2, 1, 4, 5)
    return calls(q, k, v, (None, k.shape, v.shape))


def shared_keys() -> Iterator[Call]:
    """Keys and values that a batch shares, with their own order of dimensions; dropout and a mask."""
    q, k, v = rand(2, 2, 3, 8), rand(1, 4, 2, 8).transpose(1, 2), rand(1, 4, 2, 5).transpose(1, 2)
    mask, seed = rand(1, 1, 3, 4) > -1, torch.full((1, 1, 1, 1), 7, device=DEVICE)
    return calls(q, k, v, (q.shape, k.shape, None), mask, seed, dropout_p=0.25, heads=(2, 2))


def nothing() -> Iterator[Call]:
    return calls(rand(2, 0, 8), rand(2, 4, 8), rand(2, 4, 8))


CASES: list[Callable[[], Iterator[Call]]] = [projections, groups, shared_keys, nothing]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


@cases
def test_the_fake_gives_the_shapes_dtypes_and_strides_of_the_rule(case: Callable[[], Iterator[Call]]) -> None:
    for name, args in case():
        results = tree_leaves(getattr(rules, name)(*args))
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fakes = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, args)
            promised = tree_leaves(getattr(rules, name)(*fakes))
        for real, fake in zip(results, promised, strict=True):
            assert (real is None) == (fake is None), name
            if real is not None:
                assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype), name


@pytest.mark.parametrize("case", [groups] if DEVICE == "cpu" else CASES[:3], ids=lambda case: case.__name__)
def test_opcheck(case: Callable[[], Iterator[Call]]) -> None:
    for name, args in case():
        checks = torch.library.opcheck(getattr(torch.ops.theria, f"sdpa_{name}").default, tuple(library.flatten(args)))
        assert set(checks.values()) == {"SUCCESS"}, name


def test_flat_arguments_are_those_of_the_rule() -> None:
    for name, args in groups():
        restored = tree_leaves(tuple(library.unflatten(name, tuple(library.flatten(args)))))
        assert all(a is b or a == b for a, b in zip(restored, tree_leaves(args), strict=True)), name


# ------------------------------------------------------------------------------------------------ torch.compile

SAMPLE = make_sample((2,), 3, 4, 2, 3).to(torch.float32, DEVICE)


def loss(attend: Any) -> Any:
    return lambda *x: (attend(*x) * SAMPLE.do).sin().sum()


def forward_over_reverse(attend: Any) -> Any:
    return lambda *x: jvp(grad(loss(attend), (0, 1, 2)), x, SAMPLE.t)


def of_one_operand(attend: Any) -> Any:
    """Shared operands are closed over."""
    value = SAMPLE.x[2]
    return lambda q, k, _: jvp(grad(lambda k: loss(attend)(q, k, value)), (k,), (SAMPLE.t[1],))


def gradient(attend: Any) -> Any:
    return grad(loss(attend), (0, 1, 2))


def mapped_gradient(attend: Any) -> Any:
    each = vmap(gradient(attend), (0, None, None))
    return lambda q, k, v: each(torch.stack([q, 2 * q]), k, v)


def reverse_over_reverse(attend: Any) -> Any:
    def directional(*x: Tensor) -> Tensor:
        return sum(((g * t).sum() for g, t in zip(gradient(attend)(*x), SAMPLE.t, strict=True)), x[0].new_zeros(()))

    return grad(directional, (0, 1, 2))


def explicit(attend: Any) -> Any:
    return lambda q, k, v: sdpa_hvp(q, k, v, SAMPLE.do, *SAMPLE.t, **attend.keywords)


COMPOSED = [forward_over_reverse, of_one_operand, gradient, mapped_gradient, reverse_over_reverse, explicit]
OPTIONS: list[dict[str, Any]] = [{}, {"is_causal": True, "dropout_p": 0.3, "seed": 5}]
COMPILERS = ["inductor"] if DEVICE == "cuda" else ["aot_eager"]
COMPILED_F32 = 2e-6  # inductor may contract and reorder what is around the operator


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("backend", ["triton", "custom"])
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("compose", COMPOSED, ids=lambda f: f.__name__)
def test_compiled_derivatives_are_the_eager_ones(compose: Any, compiler: str, backend: str) -> None:
    for options in OPTIONS if compose is forward_over_reverse else OPTIONS[:1]:
        function = compose(partial(sdpa, backend=backend, **options))
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        results, expected = (tree_leaves(f(*SAMPLE.x)) for f in (compiled, function))
        assert difference(results, expected) <= COMPILED_F32


@pytest.mark.parametrize("backend", ["triton", "custom"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_backward_of_a_compiled_function(compiler: str, backend: str) -> None:
    function = loss(partial(sdpa, backend=backend))
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    x = SAMPLE.leaves()
    results, expected = (torch.autograd.grad(f(*x), x) for f in (compiled, function))
    assert difference(results, expected) <= COMPILED_F32


def test_a_compiled_graph_keeps_the_operators_whole() -> None:
    names: list[str] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if "theria" in str(node.target))
        return graph

    from torch._dynamo.backends.common import aot_autograd

    function = forward_over_reverse(partial(sdpa, backend="triton"))
    torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record))(*SAMPLE.x)
    assert sorted({name.split(".")[1] for name in names}) == ["sdpa_forward", "sdpa_jvp", "sdpa_jvp_hvp", "sdpa_vjp"]


def test_one_graph_serves_other_lengths() -> None:
    def gradient(*x: Tensor) -> Any:
        return grad(lambda q, k, v: sdpa(q, k, v, backend="triton").sin().sum(), (0, 1, 2))(*x)

    compiled = torch.compile(gradient, fullgraph=True, backend=COMPILERS[0], dynamic=True)

    def operands(N: int, M: int) -> Any:
        return make_sample((2,), N, M, 4, 3).to(torch.float32, DEVICE).x

    compiled(*operands(5, 7))
    with torch.compiler.set_stance("fail_on_recompile"):
        for N, M in ((6, 9), (11, 8)):
            x = operands(N, M)
            assert difference(compiled(*x), gradient(*x)) <= COMPILED_F32
