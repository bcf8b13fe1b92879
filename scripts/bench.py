"""Benchmark of the operator: time and extra memory of each order, beside PyTorch's math attention.

    python scripts/bench.py                                   # the shape of the documentation: N = M = 4096
    python scripts/bench.py --shape 1,4,1024,64 --causal both --out results.json
    python scripts/bench.py --gpu --out results               # the fused kernels on a GPU (bench_gpu.py)

Each row runs in a process of its own: it first checks the values against float64 on a small problem, then measures the
median time and the peak of the process's memory beyond what it held before the call. A row whose check fails is an
error, not a figure. "double backward" is the whole of it: cotangents of dQ, dK, dV to gradients of Q, K, V and dO.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from theria.ops import sdpa
from theria.testing import COMPOSITIONS, difference, make_sample, naive_attention
from theria.testing.machine import machine

ORDERS = {"forward": "forward", "vjp": "backward", "jvp": "func_jvp", "double backward": "double_backward"}
# Against float64 on a small problem; far above float32 rounding, far below any wrong formula.
GATE = 1e-4


def math_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "math": math_attention,
    "reference": partial(sdpa, backend="reference"),
    "custom": partial(sdpa, backend="custom"),
}


def check(attend: Callable[..., Tensor], order: str, causal: bool, dtype: torch.dtype) -> float:
    """Error of a composition on a small problem; raises when it is wrong."""
    sample = make_sample((1, 2), 33, 33, 16, 16, options={"is_causal": causal})
    compose = COMPOSITIONS[ORDERS[order]]
    error = difference(compose(attend, sample.to(dtype)), compose(naive_attention, sample))
    if not error <= GATE * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps:
        raise SystemExit(f"{order}: error {error:.1e} against float64; no figure is reported for a wrong result")
    return error


def workload(attend: Callable[..., Tensor], order: str, x: list[Tensor], causal: bool) -> Callable[[], Any]:
    """What is timed; for the backward orders without the forward they start from."""
    attend = partial(attend, is_causal=causal)
    do, directions = torch.randn_like(x[0]), [torch.randn_like(a) for a in x]
    if order == "forward":
        return lambda: attend(*x)
    if order == "jvp":
        return lambda: torch.func.jvp(attend, tuple(x), tuple(directions))
    leaves, do = [a.requires_grad_() for a in x], do.requires_grad_()
    out = attend(*leaves)
    if order == "vjp":
        return lambda: torch.autograd.grad(out, leaves, do, retain_graph=True)
    grads = torch.autograd.grad(out, leaves, do, create_graph=True)
    return lambda: torch.autograd.grad(grads, [*leaves, do], directions, retain_graph=True)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(name: str, order: str, shape: tuple[int, ...], causal: bool, dtype: torch.dtype, repeats: int) -> dict:
    """One row: the error of the check, times in seconds, peak extra bytes."""
    attend = CANDIDATES[name]
    error = check(attend, order, causal, dtype)
    torch.manual_seed(0)
    x = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    run = workload(attend, order, x, causal)
    run()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before, times = resident("VmRSS"), []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {
        "candidate": name,
        "order": order,
        "shape": list(shape),
        "causal": causal,
        "dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "median_s": statistics.median(times),
        "times_s": times,
        "peak_extra_bytes": resident("VmHWM") - before,
    }


def in_process(arguments: list[str]) -> dict[str, Any]:
    """A row measured in a fresh process, so that no row sees another's memory."""
    done = subprocess.run([sys.executable, __file__, "--row", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or f"{' '.join(arguments)}: exit {done.returncode}")
    return json.loads(done.stdout)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'order':<16} {'causal':<7} {'candidate':<10} {'median s':>9} {'extra MiB':>10} {'error':>9}"]
    lines += [
        f"{r['order']:<16} {r['causal']!s:<7} {r['candidate']:<10} {r['median_s']:>9.3f} "
        f"{r['peak_extra_bytes'] / 2**20:>10.1f} {r['error']:>9.1e}"
        for r in rows
    ]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1,4,4096,64", help="B,H,N,D (default: %(default)s)")
    parser.add_argument("--causal", choices=["no", "yes", "both"], default="both")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--candidates", nargs="+", default=["math", "custom"], choices=CANDIDATES)
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=ORDERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--gpu", action="store_true", help="the benchmark on a GPU instead; see --gpu --help")
    parser.add_argument("--row", nargs=2, metavar=("CANDIDATE", "ORDER"), help="measure one row here (internal)")
    return parser.parse_args()


def main() -> None:
    if "--gpu" in sys.argv:
        import bench_gpu

        bench_gpu.main([argument for argument in sys.argv[1:] if argument != "--gpu"])
        return
    args = parse()
    shape, dtype = tuple(int(n) for n in args.shape.split(",")), getattr(torch, args.dtype)
    if args.row:
        candidate, order = args.row
        print(json.dumps(measure(candidate, order, shape, args.causal == "yes", dtype, args.repeats)))
        return
    causal = {"no": ["no"], "yes": ["yes"], "both": ["no", "yes"]}[args.causal]
    common = ["--shape", args.shape, "--dtype", args.dtype, "--repeats", str(args.repeats)]
    cases = [(order, c, name) for order in args.orders for c in causal for name in args.candidates]
    rows = [in_process([name, order, "--causal", c, *common]) for order, c, name in cases]
    print(table(rows))
    if args.out:
        command = "python scripts/bench.py " + " ".join(sys.argv[1:])
        args.out.write_text(json.dumps({"command": command, "machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
