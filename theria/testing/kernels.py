"""One problem for every fused kernel: the call of its host function, its truth, and its launches one by one.

A kernel has the name by which :mod:`theria.ops.triton.tiles` knows it; its function has that name and ``_kernel``. What
is done with a launch is up to the caller: :mod:`theria.testing.compile` compiles it for a chip that need not be there,
``scripts/tune.py`` times it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from theria.ops import reference
from theria.ops.operands import AttentionSpec, Operands, Shapes, Tangents, default_scale
from theria.ops.triton.tiles import DTYPES, VARIANT, WIDTHS


class Launch(NamedTuple):
    """The arguments of :func:`theria.ops.triton.launch.launch`."""

    kernel: Any
    programs: int
    frame: Any
    args: Sequence[Any]
    static: Any
    tile: Any


@dataclass(frozen=True)
class Problem:
    """Canonical operands (B, H, N, D) of one call with everything that any rule is given."""

    ops: Operands
    spec: AttentionSpec
    o: Tensor
    lse: Tensor
    do: Tensor
    dq: Tensor
    t: Tangents
    t2: Tangents
    t12: Tangents
    tdo: Tensor
    to: Tensor
    tau: Tensor
    tau2: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Problem:
        """The problem with every tensor changed."""

        def each(x: Any) -> Any:
            if isinstance(x, tuple):
                return type(x)._make(None if y is None else f(y) for y in x)  # type: ignore[attr-defined]
            return f(x) if isinstance(x, Tensor) else x

        return replace(self, **{field.name: each(getattr(self, field.name)) for field in fields(self)})

    def head(self, batch: int, head: int) -> Problem:
        """One head of it."""
        return self.map(lambda x: x[batch : batch + 1, head : head + 1])


def make_problem(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    causal: bool = False,
    device: str = "cpu",
) -> Problem:
    """A random problem of shape (B, H, N, M, D, E); on "meta" one without values."""
    B, H, N, M, D, E = shape
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def q() -> Tensor:
        return torch.randn(B, H, N, D, dtype=dtype, device=device, generator=generator)

    def k() -> Tensor:
        return torch.randn(B, H, M, D, dtype=dtype, device=device, generator=generator)

    def v(rows: int = M) -> Tensor:
        return torch.randn(B, H, rows, E, dtype=dtype, device=device, generator=generator)

    def row() -> Tensor:
        return torch.empty(B, H, N, dtype=torch.float32, device=device)

    spec = AttentionSpec("triton", default_scale(D), causal)
    ops, t, t2, t12 = (Operands(q(), k(), v(), None, None), *(Tangents(q(), k(), v()) for _ in range(3)))
    o, to = (torch.empty(B, H, N, E, dtype=dtype, device=device) for _ in range(2))
    dq = torch.empty_like(ops.q)
    problem = Problem(ops, spec, o, row(), v(N), dq, t, t2, t12, v(N), to, row(), row())
    if device != "meta":
        _fill_residuals(problem)
    return problem


def _fill_residuals(problem: Problem) -> None:
    """o, lse, dq, to and tau by the reference in float32, head by head."""
    B, H = problem.o.shape[:2]
    for b, h in product(range(B), range(H)):
        whole, p = problem.head(b, h), problem.head(b, h).map(Tensor.float)
        o, lse = reference.forward(p.ops, p.spec)
        dq, *_ = reference.vjp(p.ops, o, lse, p.do, p.spec, _shapes(p, "q"))
        to, tau = reference.jvp(p.ops, o, lse, p.t, p.spec)
        _, tau2 = reference.jvp(p.ops, o, lse, p.t2, p.spec)
        targets = whole.o, whole.lse, whole.dq, whole.to, whole.tau, whole.tau2
        for target, x in zip(targets, (o, lse, dq, to, tau, tau2), strict=True):
            assert x is not None
            target.copy_(x)


def _shapes(p: Problem, wanted: str) -> Shapes:
    q, k, v = (getattr(p.ops, name).shape if name in wanted else None for name in "qkv")
    return q, k, v, None


def _second(p: Problem, tdo: bool) -> tuple[Any, ...]:
    return p.ops, p.o, p.lse, p.do, p.t, p.tdo if tdo else None


class Rule(NamedTuple):
    """A host function and its truth: their place and the arguments that both take."""

    module: str
    function: str
    arguments: Callable[[Problem], tuple[Any, ...]]
    truth: Callable[..., Any]


def _vjp(wanted: str, module: str = "vjp", function: str = "vjp") -> Rule:
    return Rule(module, function, lambda p: (p.ops, p.o, p.lse, p.do, p.spec, _shapes(p, wanted)), reference.vjp)


def _hvp(wanted: str, tdo: bool = False) -> Rule:
    return Rule("hvp", "hvp", lambda p: (*_second(p, tdo), p.to, p.tau, p.spec, _shapes(p, wanted)), reference.hvp)


def _both(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, t: Tangents, *rest: Any) -> tuple[Any, ...]:
    tdo, spec, shapes = rest
    to, tau = reference.jvp(ops, o, lse, t, spec)
    return to, tau, *reference.hvp(ops, o, lse, do, t, tdo, to, tau, spec, shapes)


def _short(tdo: bool = False) -> Rule:
    return Rule("short", "jvp_hvp_short", lambda p: (*_second(p, tdo), p.spec, _shapes(p, "qkv")), _both)


def _jvp_dq(tdo: bool = False) -> Rule:
    def arguments(p: Problem) -> tuple[Any, ...]:
        *residuals, t, tdo_or_none = _second(p, tdo)
        return *residuals, p.dq, t, tdo_or_none, p.spec, _shapes(p, "q")

    def truth(ops: Operands, o: Tensor, lse: Tensor, do: Tensor, dq: Tensor, *rest: Any) -> tuple[Any, ...]:
        del dq
        return _both(ops, o, lse, do, *rest)

    return Rule("jvp_dq", "jvp_hvp", arguments, truth)


def _forward_jvp(ops: Operands, t: Tangents, spec: AttentionSpec) -> tuple[Tensor, ...]:
    o, lse = reference.forward(ops, spec)
    return (o, lse, *reference.jvp(ops, o, lse, t, spec))


# By kernel: a rule that launches it.
RULES = {
    "forward": Rule("forward", "forward", lambda p: (p.ops, p.spec), reference.forward),
    "forward_jvp": Rule("forward_jvp", "forward_jvp", lambda p: (p.ops, p.t, p.spec), _forward_jvp),
    "row_stats": _hvp("q"),
    "vjp_dq": _vjp("q"),
    "vjp_dkv": _vjp("kv"),
    "jvp": Rule("jvp", "jvp", lambda p: (p.ops, p.o, p.lse, p.t, p.spec), reference.jvp),
    "hvp_dq": _hvp("q"),
    "hvp_dkv": _hvp("kv"),
    "hvp_dq_all": _hvp("q", tdo=True),
    "hvp_dkv_all": _hvp("kv", tdo=True),
    "jvp_dq": _jvp_dq(),
    "jvp_dq_all": _jvp_dq(tdo=True),
    "jvp_jvp": Rule(
        "jvp_jvp",
        "jvp_jvp",
        lambda p: (p.ops, p.o, p.lse, p.t, p.t2, p.t12, p.tau, p.tau2, p.spec),
        reference.jvp_jvp,
    ),
    "vjp_short": _vjp("qkv", "short", "vjp_short"),
    "second_short": _short(),
    "second_short_all": _short(tdo=True),
}


def call(kernel: str, problem: Problem) -> tuple[Tensor, ...]:
    """What the host function of a kernel returns, without the absent."""
    rule = RULES[kernel]
    host = getattr(import_module(f"theria.ops.triton.{rule.module}"), rule.function)
    return _present(host(*rule.arguments(problem)))


def truth(kernel: str, problem: Problem) -> tuple[Tensor, ...]:
    """The same by the reference, in the problem's own dtype."""
    rule = RULES[kernel]
    return _present(rule.truth(*rule.arguments(problem)))


def _present(x: Any) -> tuple[Tensor, ...]:
    return tuple(y for y in ((x,) if isinstance(x, Tensor) else x) if y is not None)


@contextmanager
def launches_go_to(handle: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, host functions hand their launches to ``handle`` and start nothing."""
    modules: list[Any] = [
        m for name, m in sys.modules.items() if name.startswith("theria.ops.triton.") and hasattr(m, "launch")
    ]
    originals = [module.launch for module in modules]
    for module in modules:
        module.launch = lambda *args: handle(Launch(*args))
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.launch = original


def launches(kernel: str, problem: Problem) -> list[Launch]:
    """The launches of one kernel in the call of its host function. They are not started; what it reads is computed."""
    start = import_module("theria.ops.triton.launch").launch
    import_module(f"theria.ops.triton.{RULES[kernel].module}")
    own: list[Launch] = []
    name = kernel.removesuffix(VARIANT) + "_kernel"

    def handle(launch: Launch) -> None:
        if name_of(launch) == name:
            own.append(launch)
        elif launch.frame.device.type != "meta":
            start(*launch)

    with launches_go_to(handle):
        call(kernel, problem)
    assert own, f"the host function of {kernel} does not launch it"
    return own


def name_of(launch: Launch) -> str:
    """The name of the kernel's function."""
    return launch.kernel.fn.__name__


def short_sides(width: int, kind: str) -> list[int]:
    """Tile sides of the keys that the short kernels take with heads of a width."""
    short, rules = (import_module(f"theria.ops.triton.{name}") for name in ("short", "rules"))
    return [side for side in WIDTHS if short.fits(rules.Sizes(side, side, width, width), DTYPES[kind])]
