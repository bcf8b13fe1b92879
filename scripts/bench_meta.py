"""Outer gradient of MAML on a transformer: memory and time of each way to differentiate the inner loop.

    python scripts/bench_meta.py [--out results.json] [--quick]

Gradients are compared before anything is measured. Each row runs in a process of its own, which reports the peak of
live tensor bytes, the growth of its resident memory (a cross-check that includes what kernels hold) and the median
time. On CUDA (`--device cuda`) the allocator's peak is reported instead.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from theria.meta import MAML, SGD, Adjoint, FirstOrder, Higher, MixedMode, Unrolled
from theria.nn import TransformerClassifier
from theria.testing.machine import machine
from theria.testing.memory import PeakMemory

ADJOINTS: dict[str, Adjoint] = {
    "unrolled": Unrolled(),
    "mixed_mode": MixedMode(),
    "first_order": FirstOrder(),
    "higher": Higher(),
}
SAME = 1e-4  # relative, float32: five inner steps of a transformer summed in another order


def build(options: argparse.Namespace, adjoint: str) -> tuple[MAML, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = TransformerClassifier(
        options.ways, d_model=options.d_model, n_layers=options.layers, backend=options.backend
    )
    learner = MAML(model, cross_entropy, SGD(0.1), options.steps, ADJOINTS[adjoint]).to(options.device)
    samples = options.ways * options.shots
    x = torch.rand(2, options.tasks, samples, 1, 28, 28)
    y = torch.arange(options.ways).repeat(2, options.tasks, options.shots)
    return learner, tuple(part.to(options.device) for part in (x[0], y[0], x[1], y[1]))


def gradient(learner: MAML, episode: tuple[torch.Tensor, ...]) -> torch.Tensor:
    learner.zero_grad()
    learner(episode).backward()
    return torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None])


def measure(options: argparse.Namespace, adjoint: str) -> dict[str, Any]:
    """One row, in a process of its own."""
    learner, episode = build(options, adjoint)
    before = peak_resident()
    gradient(learner, episode)
    resident = peak_resident() - before
    with PeakMemory(options.device) as memory:
        gradient(learner, episode)
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        gradient(learner, episode)
        if options.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    times.sort()
    return {
        "adjoint": adjoint,
        "peak_mib": memory.peak / 2**20,
        "resident_growth_mib": resident,
        "median_s": statistics.median(times),
        "fastest_s": times[0],
        "slowest_s": times[-1],
    }


def peak_resident() -> float:
    """Peak resident memory of this process in MiB (Linux); not ru_maxrss, which a child inherits from its parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def check(options: argparse.Namespace, names: list[str]) -> dict[str, float]:
    """Relative difference of each gradient from the unrolled one; raises where an exact one differs."""
    expected = gradient(*build(options, "unrolled"))
    differences = {
        name: ((gradient(*build(options, name)) - expected).norm() / expected.norm()).item() for name in names
    }
    wrong = {name: d for name, d in differences.items() if name != "first_order" and not d <= SAME}
    if wrong:
        raise SystemExit(f"gradients differ by more than {SAME}: {wrong}; nothing was measured")
    return differences


def show(rows: list[dict[str, Any]]) -> None:
    base = next(row for row in rows if row["adjoint"] == "unrolled")
    print(f"{'adjoint':<12}{'peak MiB':>10}{'of unrolled':>12}{'RSS + MiB':>11}{'median s':>10}{'difference':>12}")
    for row in rows:
        print(
            f"{row['adjoint']:<12}{row['peak_mib']:>10.1f}{row['peak_mib'] / base['peak_mib']:>12.2f}"
            f"{row['resident_growth_mib']:>11.1f}{row['median_s']:>10.3f}{row['difference']:>12.1e}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"ways": 5, "shots": 5, "tasks": 4, "steps": 5, "layers": 4, "d-model": 64, "repeats": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--backend", default="auto", help="of theria.ops.sdpa")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--row", choices=list(ADJOINTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.shots, options.tasks, options.layers, options.d_model, options.repeats = 1, 1, 1, 16, 1
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.row:
        print(json.dumps(measure(options, options.row)))
        return
    names = [name for name in ADJOINTS if name != "higher" or importlib.util.find_spec("higher")]
    differences = check(options, names)
    rows = []
    for name in names:
        command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({**json.loads(out.splitlines()[-1]), "difference": differences[name]})
    facts = {"command": "python scripts/bench_meta.py " + " ".join(sys.argv[1:]), **machine()}
    print("  ".join(f"{key}: {value}" for key, value in facts.items()))
    show(rows)
    if options.out:
        sizes = {key: value for key, value in vars(options).items() if key not in ("out", "row")}
        options.out.write_text(
            json.dumps({"machine": facts, "sizes": sizes, "rows": rows}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
