"""One outer gradient of MAML on a GPU, by theria and by what else computes it there.

    python scripts/bench_outer.py --out results
    python scripts/bench_outer.py --out results --methods "theria MixedMode, recorded" "torch.func"

16 tasks of 20-way 1-shot with 5 queries a class, 5 inner steps, a transformer of 4 layers, width 128 and 4 heads on 16
patches, float32 without TF32. Every gradient is compared with float64 before it is timed; one further off than 1e-4
(bfloat16, by autocast: 0.1) is an error and no figure. Memory is the peak of the allocator beyond the model and its
gradients. "Recorded" steps are replays of one CUDA graph, of theria by `theria.meta.CapturedStep`; "compiled" ones went
through PyTorch's compiler before, in the first call, whose seconds are given. Results as JSON in the folder, a table
last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import speed  # pyright: ignore[reportMissingImports]

import theria.nn.attention
import theria.ops
from theria.meta import MAML, SGD, CapturedStep, MixedMode, Unrolled
from theria.testing import difference
from theria.testing.machine import machine

Episode = tuple[Tensor, ...]
Step = Callable[[], Any]  # leaves the gradient in every parameter's .grad
ADJOINTS = {"Unrolled": Unrolled(), "MixedMode": MixedMode()}
BF16 = "bfloat16"
HOW = (", compiled and recorded", f", compiled and recorded, {BF16}", ", recorded", f", recorded, {BF16}", "")
SAME = 1e-4  # relative, float32: five inner steps of a transformer summed in another order
SAME_BF16 = 0.1  # factors of products have 8 bits, and the roundings pass through five inner steps


def by_theria(model: nn.Module, episode: Episode, steps: int, adjoint: str, how: str) -> Step:
    learner = MAML(model, cross_entropy, SGD(speed.RATE), steps, ADJOINTS[adjoint])
    if not how:
        return lambda: learner(episode).backward()
    autocast = torch.bfloat16 if BF16 in how else None
    return partial(CapturedStep(learner, compile="compiled" in how, autocast=autocast), episode)


def by_torch_func(model: nn.Module, episode: Episode, steps: int) -> Step:
    """Tasks under vmap, as one writes it by hand."""

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, params, x), y)

    def query_loss(params: dict[str, Tensor], x: Tensor, y: Tensor, q: Tensor, z: Tensor) -> Tensor:
        for _ in range(steps):
            grads = grad(loss)(params, x, y)
            params = {name: p - speed.RATE * grads[name] for name, p in params.items()}
        return loss(params, q, z)

    params: dict[str, Tensor] = {**dict(model.named_parameters())}
    return lambda: vmap(query_loss, (None, 0, 0, 0, 0))(params, *episode).mean().backward()


def recorded(step: Step, model: nn.Module) -> Step:
    """The step as a CUDA graph."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            model.zero_grad()
            step()
    torch.cuda.synchronize()
    model.zero_grad()
    with torch.cuda.graph(graph, stream=side):
        step()
    grads = [(p, p.grad) for p in model.parameters()]

    def replay() -> None:
        graph.replay()
        for p, g in grads:
            p.grad = g

    return replay


def prepare(method: str, model: nn.Module, episode: Episode, steps: int) -> Step:
    name, _, how = method.partition(", ")
    if name.startswith("theria "):
        return by_theria(model, episode, steps, name.removeprefix("theria "), how)
    if name == "torch.func":
        step = by_torch_func(model, episode, steps)
        return recorded(step, model) if how == "recorded" else step
    return lambda: speed.METHODS[name](model, episode, steps)


METHODS = [
    *(f"theria {adjoint}{how}" for how in HOW for adjoint in ADJOINTS),
    *("torch.func, recorded", "torch.func", "torchopt", "higher"),
]


@contextmanager
def attention_of(method: str) -> Iterator[None]:
    """theria's operator for theria, PyTorch's math path for the others."""
    before = theria.nn.attention.sdpa
    if not method.startswith("theria"):
        theria.nn.attention.sdpa = speed.math_attention  # pyright: ignore
    try:
        yield
    finally:
        theria.nn.attention.sdpa = before


def build(options: argparse.Namespace) -> tuple[nn.Module, Episode]:
    model, episode = speed.build(options)
    return model.cuda(), tuple(x.cuda() for x in episode)


def gradient(step: Step, model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    step()
    return [p.grad for p in model.parameters() if p.grad is not None]


def truth(options: argparse.Namespace) -> list[Tensor]:
    """The gradient in float64."""
    model, (x, y, q, z) = build(options)
    step = by_torch_func(model.double(), (x.double(), y, q.double(), z), options.steps)
    with attention_of("torch.func"):
        return [g.clone() for g in gradient(step, model)]


@contextmanager
def unrecorded(step: Any) -> Iterator[None]:
    """A step of theria that runs, instead of being recorded."""
    step.func.record = False
    yield
    step.func.record = True


def measure(method: str, options: argparse.Namespace, exact: list[Tensor]) -> dict[str, Any]:
    model, episode = build(options)
    with attention_of(method):
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step = prepare(method, model, episode, options.steps)
        begun = time.perf_counter()
        with unrecorded(step) if "compiled" in method else nullcontext():
            error = difference(gradient(step, model), exact)
            first = time.perf_counter() - begun
            if "compiled" in method:  # the step itself ran too, to compare with; what a compiled one takes is less
                torch.cuda.reset_peak_memory_stats()
                step()
        allowed = SAME_BF16 if method.endswith(BF16) else SAME
        if not error <= allowed:
            raise ArithmeticError(f"error {error:.1e} against float64, {allowed} is allowed")
        peak = torch.cuda.max_memory_allocated() - held
        times = []
        for _ in range(options.repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.zero_grad()
            step()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
    spread = {"ms": statistics.median(times), "fastest_ms": min(times), "slowest_ms": max(times)}
    return {"method": method, **spread, "peak_gib": peak / 2**30, "first_s": first, "error": error}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD")
    sizes = {"ways": 20, "shots": 1, "queries": 5, "tasks": 16, "steps": 5, "layers": 4, "width": 128, "repeats": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device; on a CPU: scripts/bench_meta.py, scripts/compare_peers.py --speed")
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"command": "python scripts/bench_outer.py " + " ".join(arguments), "machine": machine(), "rows": []}
    exact = truth(options)
    for method in options.methods:
        try:
            row = measure(method, options, exact)
            told = f"{row['ms']:9.1f} ms  {row['peak_gib']:6.2f} GiB  error {row['error']:.1e}"
            told += f"  first call {row['first_s']:.0f} s"
        except Exception as error:  # a failure is a result, too
            row = {"method": method, "failure": f"{type(error).__name__}: {str(error)[:300]}"}
            told = row["failure"]
        torch.cuda.empty_cache()
        result["rows"].append(row)
        (options.out / "outer.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{method:<48} {told}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
