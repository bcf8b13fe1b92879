"""Benchmark of the fused kernels on a GPU, beside the peers that run there.

    python scripts/bench.py --gpu --out results
    python scripts/bench.py --gpu --out results --sections "double backward" short --candidates theria

Every row is checked on one head against float64 before it is timed: theria's may be off by three times what PyTorch's
math path in the same dtype is, else the row is an error and no figure. Times are medians with a cold L2 cache; short
calls are timed as replays of a CUDA graph, too, where the host does not count. ``floor`` is what the products, or the
bytes, would take at the speeds measured on an H200. Results as JSON in the folder, a table last.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
import triton
from bench_cases import BF16, NOMINAL, Case, Shape, cases, name_of, slow_to_start
from bench_peers import MATH, THERIA, TRUTH, Inputs, Work, make_inputs, missing, prepare
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from theria.ops import sdpa
from theria.testing import difference
from theria.testing.machine import machine
from theria.testing.memory import PeakMemory

ACCURACY, FLOOR = 3.0, 8.0  # errors of PyTorch's math path, roundings
PLAIN_ROWS = 8192  # the longest sequence for which that path's error is taken


def one_head(x: Any) -> Any:
    return type(x)(*(a[:1, :1] for a in x)) if isinstance(x, Inputs) else tuple(a[:1, :1] for a in x)


def worst(results: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> float:
    """The largest relative error among the results."""
    return max(difference((x,), (y,)) for x, y in zip(results, exact, strict=True))


def errors(case: Case, inputs: Inputs, results: tuple[torch.Tensor, ...]) -> tuple[float, float | None]:
    """Relative error of the first head, and that of the math path in the same dtype."""
    head = one_head(inputs)
    exact = prepare(TRUTH, case.order, Inputs(*(a.double() for a in head)), case.causal)()
    plain = None
    if case.shape[2] <= PLAIN_ROWS:
        plain = worst(prepare(MATH, case.order, head, case.causal)(), exact)
    return worst(one_head(results), exact), plain


def check(case: Case, work: Work, inputs: Inputs) -> dict[str, Any]:
    error, plain = errors(case, inputs, work())
    eps = torch.finfo(case.dtype).eps
    allowed = (ACCURACY * plain if plain is not None else eps) + FLOOR * eps
    if case.candidate is THERIA and not error <= allowed:
        raise ArithmeticError(f"error {error:.1e} against float64, {allowed:.1e} is allowed")
    return {"error": error, "math_error": plain}


def replays(case: Case, inputs: Inputs) -> float:
    """Milliseconds of one replay of the work as a CUDA graph.

    Autograd runs a backward on the stream of its forward, so that the graph it starts from is made on the side stream.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work = prepare(case.candidate, case.order, inputs, case.causal)
        for _ in range(3):
            work()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=side):
        work()
    return timed(graph.replay, 100)[0]


def timed(run: Callable[[], Any], milliseconds: float) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in milliseconds, the L2 cache cold."""
    times: Any = do_bench(run, warmup=20, rep=int(milliseconds), quantiles=[0.5, 0.2, 0.8])
    return tuple(times)


def by_turns(first: Callable[[], Any], second: Callable[[], Any], pairs: int = 60) -> float:
    """The time of the first over that of the second: the median over neighbours, the L2 cache cold.

    What draws so much power runs at one of two clocks, some 10 % apart, for tenths of a second; neighbours share it.
    Nothing waits for the device until all is queued: whoever waits has the host's time in the next measurement.
    """
    cache = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(4)] for _ in range(pairs)]
    for events in marks:
        for run, start, end in ((first, *events[:2]), (second, *events[2:])):
            cache.zero_()
            start.record()
            run()
            end.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) / c.elapsed_time(d) for a, b, c, d in marks)


def measure(case: Case) -> dict[str, Any]:
    """Errors, then times."""
    row = name_of(case)
    torch.compiler.reset()
    inputs = make_inputs(case.shape, case.dtype)
    work = prepare(case.candidate, case.order, inputs, case.causal)
    row |= check(case, work, inputs)
    held = torch.cuda.memory_allocated()
    with PeakMemory("cuda") as memory:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        rough = 1e3 * (time.perf_counter() - start)
    row |= dict(zip(("ms", "ms_20", "ms_80"), timed(work, max(100, 5 * rough)), strict=True))
    row |= {"tflops": NOMINAL[case.order] * case.unit / row["ms"] / 1e9, "held_bytes": held, "extra_bytes": memory.peak}
    if case.section == "short":
        row["graph_ms"] = replays(case, inputs)
    if case.section == "forward over reverse":
        row["of_double_backward"] = by_turns(work, prepare(case.candidate, "double backward", inputs, case.causal))
    return row


def guarded(measure: Callable[[], dict[str, Any]], row: dict[str, Any]) -> dict[str, Any]:
    """What was measured, or the row with what kept it from being."""
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        return row | {"failure": "out of memory"}
    except Exception as error:
        torch.cuda.synchronize()  # raises after a fault of the GPU, which no later row would survive
        return row | {"failure": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def memory(rows: int) -> dict[str, Any]:
    """Extra memory of the double backward at B·H = 16, D = 64, in units of its outputs, and all that was ever held."""
    inputs = make_inputs((1, 16, rows, 64), BF16)
    torch.cuda.reset_peak_memory_stats()
    work = prepare(THERIA, "double backward", inputs, False)
    whole = torch.cuda.max_memory_allocated()
    with PeakMemory("cuda") as used:
        results = work()
    outputs = sum(x.numel() * x.itemsize for x in results)
    return {"section": "memory", "rows": rows, "extra_bytes": used.peak, "of_outputs": used.peak / outputs,
            "whole_bytes": max(whole, torch.cuda.max_memory_allocated())}  # fmt: skip


def repeatability(shape: Shape, causal: bool, repeats: int = 100) -> dict[str, Any]:
    """Whether every repeat of the double backward has the same bits."""
    work = prepare(THERIA, "double backward", make_inputs(shape, BF16), causal)
    first = work()
    same = all(all(torch.equal(a, b) for a, b in zip(first, work(), strict=True)) for _ in range(repeats))
    return {"section": "repeatability", "shape": list(shape), "causal": causal, "repeats": repeats, "equal": same}


class Nothing(torch.autograd.Function):
    """What PyTorch itself takes for a call with gradients, from a Function in Python that does nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        return ctx.saved_tensors


CHAIN = 9  # calls of which each takes the output of the one before as its queries


def host_cost(shape: Shape = (1, 1, 16, 16), calls: int = 200) -> dict[str, Any]:
    """Microseconds of the host per call with gradients, forward and backward: theria, PyTorch's, `Nothing`.

    "chained" is what one more call adds to a graph, an eighth of what eight more do: a backward starts PyTorch's engine
    and its thread once, however many calls there are.
    """
    inputs = make_inputs(shape, BF16)
    x = [a.requires_grad_() for a in inputs.x]

    def per_call(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times.append(1e6 * (time.perf_counter() - start) / calls)
        return statistics.median(times)

    costs = {}
    attend: dict[str, Callable[..., torch.Tensor]] = {
        "": partial(sdpa, backend="triton"), "pytorch_": scaled_dot_product_attention, "nothing_": Nothing.apply
    }  # fmt: skip

    def chain(run: Callable[..., torch.Tensor], length: int) -> torch.Tensor:
        out = x[0]
        for _ in range(length):
            out = run(out, *x[1:])
        return out

    def forward(run: Callable[..., torch.Tensor], length: int) -> float:
        return per_call(lambda: chain(run, length))

    def backward(run: Callable[..., torch.Tensor], length: int) -> float:
        out = chain(run, length)
        return per_call(lambda: torch.autograd.grad(out, x, inputs.do, retain_graph=True))

    for (name, run), (way, cost) in product(attend.items(), (("forward", forward), ("backward", backward))):
        one, many = (cost(run, length) for length in (1, CHAIN))
        costs |= {f"{name}{way}_us": one, f"{name}chained_{way}_us": (many - one) / (CHAIN - 1)}
    return {"section": "host", "shape": list(shape)} | costs


def others() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The rows that are no times of one order."""
    for rows in (4096, 16384, 65536, 131072):
        yield {"section": "memory", "rows": rows}, lambda rows=rows: memory(rows)
    for shape, causal in (((2, 4, 1024, 64), True), ((2, 4, 1000, 128), False), ((64, 4, 64, 32), False)):
        name = {"section": "repeatability", "shape": list(shape)}
        yield name, lambda shape=shape, causal=causal: repeatability(shape, causal)
    yield {"section": "host"}, host_cost


def everything() -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The name of each row, with a failure where it cannot be measured here, and its measurement."""
    for case in cases():
        yield name_of(case), partial(measure, case)
    yield from others()
    for case in slow_to_start():
        absent = missing(case.candidate)
        yield name_of(case) | ({"failure": absent} if absent else {}), partial(measure, case)


def describe(row: dict[str, Any]) -> str:
    """One candidate's cell of the table, or a whole line."""
    if "failure" in row:
        return f"{row.get('candidate', row['section'])}: {row['failure'][:60]}"
    if row["section"] == "memory":
        return (
            f"N = {row['rows']}: extra {row['of_outputs']:.2f} of the outputs, {row['whole_bytes'] / 1e9:.2f} GB in all"
        )
    if row["section"] == "repeatability":
        return f"{row['shape']}: {row['repeats']} repeats {'equal' if row['equal'] else 'DIFFER'}"
    if row["section"] == "host":
        return "; ".join(
            f"{way.replace('_', ' ')} {row[f'{way}_us']:.0f} µs (PyTorch {row[f'pytorch_{way}_us']:.0f}, "
            f"a Function that does nothing {row[f'nothing_{way}_us']:.0f})"
            for way in ("forward", "backward", "chained_forward", "chained_backward")
        )
    graph = f", graph {row['graph_ms']:.3f}" if "graph_ms" in row else ""
    turns = f", {row['of_double_backward']:.3f} of a double backward" if "of_double_backward" in row else ""
    return f"{row['candidate']} {row['ms']:.3f}{graph}{turns} ({row['tflops']:.0f} T, {row['error']:.0e})"


def table(rows: list[dict[str, Any]]) -> str:
    """One line per section and shape, the candidates beside one another."""

    def line(row: dict[str, Any]) -> tuple[Any, ...]:
        return (
            row["section"],
            str(row.get("shape", row.get("rows", ""))),
            row.get("dtype", ""),
            row.get("causal", False),
        )

    order = list(dict.fromkeys(line(row) for row in rows))
    shown = []
    for key, group in groupby(sorted(rows, key=lambda row: order.index(line(row))), line):
        members = list(group)
        floor = f"floor {members[0]['floor_ms']:.3f} | " if "floor_ms" in members[0] else ""
        name = f"{key[0]:<20} {key[1] if floor else '':<20} {key[2]:<8} {'causal' if key[3] else '':<6}"
        shown.append(f"{name} {floor}{' | '.join(describe(row) for row in members)}")
    return "\n".join(shown)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--sections", nargs="+", help="only these")
    parser.add_argument("--candidates", nargs="+", help="only these")
    parser.add_argument("--minutes", type=float, default=5.0, help="after this no row is begun (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device: --gpu measures the fused kernels on one; without it, bench.py measures the CPU"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"command": "python scripts/bench.py --gpu " + " ".join(arguments), "machine": machine()}
    result["machine"]["triton"] = triton.__version__
    rows: list[dict[str, Any]] = []
    stop = time.monotonic() + 60 * args.minutes
    for name, run in everything():
        if args.sections and name["section"] not in args.sections:
            continue
        if args.candidates and name.get("candidate", "theria") not in args.candidates:
            continue
        late = time.monotonic() > stop
        rows.append(name if "failure" in name else name | {"failure": "out of time"} if late else guarded(run, name))
        (args.out / "bench.json").write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")
        print(f"{name['section']}: {describe(rows[-1])}", file=sys.stderr, flush=True)
    print(table(rows))
