"""Outer gradient of MAML on a transformer: memory and time of each way to differentiate the inner loop.

    python scripts/bench_meta.py [--steps 5 10 20 50] [--adjoints unrolled mixed_mode] [--out results.json] [--quick]
    python scripts/bench_meta.py --speed --tasks 16 --shots 1 [--out results.json]

Each row runs in a process of its own, which reports the peak of live tensor bytes, the growth of its resident memory
(a cross-check that includes what kernels hold) and the median time. On CUDA (`--device cuda`) the allocator's peak is
reported instead. With `--speed` all adjoints take turns in one process, so that whatever else the machine does meets
each of them; the CPU time of the process is reported beside that of the clock. Nothing is shown before the gradients
were compared with the unrolled ones.
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from theria.meta import MAML, SGD, Adjoint, FirstOrder, Higher, MixedMode, Unrolled
from theria.nn import TransformerClassifier
from theria.testing.machine import machine
from theria.testing.memory import PeakMemory

ADJOINTS = ("unrolled", "checkpointed", "mixed_mode", "mixed_mode_sparse", "first_order", "higher")
USUAL = [name for name in ADJOINTS if name != "mixed_mode_sparse"]
SAME = 1e-4  # relative, float32: five inner steps of a transformer summed in another order


def adjoint_of(name: str, steps: int) -> Adjoint:
    """The adjoint of a row; checkpoints lie sqrt(steps) apart."""
    every = max(1, round(math.sqrt(steps)))
    return {
        "unrolled": Unrolled(),
        "checkpointed": Unrolled(checkpoint_every=every),
        "mixed_mode": MixedMode(),
        "mixed_mode_sparse": MixedMode(checkpoint_every=every),
        "first_order": FirstOrder(),
        "higher": Higher(),
    }[name]


def build(options: argparse.Namespace, adjoint: str, steps: int) -> tuple[MAML, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model = TransformerClassifier(
        options.ways, d_model=options.d_model, n_layers=options.layers, backend=options.backend
    )
    learner = MAML(model, cross_entropy, SGD(options.rate), steps, adjoint_of(adjoint, steps)).to(options.device)
    samples = options.ways * options.shots
    x = torch.rand(2, options.tasks, samples, 1, 28, 28)
    y = torch.arange(options.ways).repeat(2, options.tasks, options.shots)
    return learner, tuple(part.to(options.device) for part in (x[0], y[0], x[1], y[1]))


def gradient(learner: MAML, episode: tuple[torch.Tensor, ...]) -> torch.Tensor:
    learner.zero_grad()
    learner(episode).backward()
    return torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None])


def timed(learner: MAML, episode: tuple[torch.Tensor, ...], device: str) -> tuple[float, float]:
    """Seconds of the clock and of this process's CPU time for one gradient."""
    clock, cpu = time.perf_counter(), time.process_time()
    gradient(learner, episode)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - cpu


def summary(times: list[tuple[float, float]]) -> dict[str, float]:
    clock, cpu = (sorted(column) for column in zip(*times, strict=True))
    return {
        "median_s": statistics.median(clock),
        "fastest_s": clock[0],
        "slowest_s": clock[-1],
        "cpu_median_s": statistics.median(cpu),
        "cpu_fastest_s": cpu[0],
    }


def measure(options: argparse.Namespace, adjoint: str, steps: int) -> dict[str, Any]:
    """One row, in a process of its own; its gradient goes to a file."""
    learner, episode = build(options, adjoint, steps)
    before = peak_resident()
    with PeakMemory(options.device) as memory:
        found = gradient(learner, episode)
    peaks = {"peak_mib": memory.peak / 2**20, "resident_growth_mib": peak_resident() - before}
    torch.save(found.cpu(), options.gradient)
    times = [timed(learner, episode, options.device) for _ in range(options.repeats)]
    return {"adjoint": adjoint, "steps": steps, **peaks, **(summary(times) if times else {})}


def rows_of_memory(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Every adjoint at every number of steps, each in a process of its own."""
    rows = []
    for steps in options.steps:
        gradients = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in names:
                path = Path(folder, name)
                command = [sys.executable, __file__, *sys.argv[1:], "--row", name, str(steps), "--gradient", str(path)]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
                gradients[name] = torch.load(path)
        for row, difference in zip(rows[-len(names) :], compare(gradients).values(), strict=True):
            row["difference"] = difference
            row["of_unrolled"] = row["peak_mib"] / rows[-len(names)]["peak_mib"]
    return rows


def rows_of_speed(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """Every adjoint in turn, `repeats` times over."""
    rows = []
    for steps in options.steps:
        cases = {name: build(options, name, steps) for name in names}
        differences = compare({name: gradient(*case).cpu() for name, case in cases.items()})
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name, case in cases.items():
                times[name].append(timed(*case, options.device))
        for name in names:
            row = {"adjoint": name, "steps": steps, **summary(times[name]), "difference": differences[name]}
            rows.append({**row, "outer_steps_per_s": 1 / row["median_s"]})
    return rows


def peak_resident() -> float:
    """Peak resident memory of this process in MiB (Linux); not ru_maxrss, which a child inherits from its parent."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024


def compare(gradients: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative difference of each gradient from the unrolled one, the first; raises where an exact one differs."""
    expected = gradients["unrolled"]
    differences = {name: ((g - expected).norm() / expected.norm()).item() for name, g in gradients.items()}
    wrong = {name: d for name, d in differences.items() if name != "first_order" and not d <= SAME}
    if wrong:
        raise SystemExit(f"gradients differ by more than {SAME}: {wrong}; nothing is reported")
    return differences


def show(rows: list[dict[str, Any]]) -> None:
    columns = [key for key in rows[0] if key not in ("slowest_s", "cpu_fastest_s")]
    widths = [max(len(key), 17 if key == "adjoint" else 9) for key in columns]
    print("  ".join(f"{key:>{width}}" for key, width in zip(columns, widths, strict=True)))
    for row in rows:
        cells = [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in columns]
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"ways": 5, "shots": 5, "tasks": 4, "layers": 4, "d-model": 64, "repeats": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    # --repeats 0 measures memory alone
    parser.add_argument("--steps", type=int, nargs="+", default=[5], help="numbers of inner steps")
    parser.add_argument("--rate", type=float, default=0.1, help="of the inner steps")
    parser.add_argument("--adjoints", nargs="+", choices=ADJOINTS, default=USUAL, help="beside unrolled")
    parser.add_argument("--speed", action="store_true", help="time alone, all adjoints in turn")
    parser.add_argument("--backend", default="auto", help="of theria.ops.sdpa")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the rows as JSON here")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--gradient", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.shots, options.tasks, options.layers, options.d_model, options.repeats = 1, 1, 1, 16, 1
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.row:
        name, steps = options.row
        print(json.dumps(measure(options, name, int(steps))))
        return
    wanted = ("unrolled", *(name for name in ADJOINTS[1:] if name in options.adjoints))
    names = [name for name in wanted if name != "higher" or importlib.util.find_spec("higher")]
    rows = rows_of_speed(options, names) if options.speed else rows_of_memory(options, names)
    facts = {"command": "python scripts/bench_meta.py " + " ".join(sys.argv[1:]), **machine()}
    print("  ".join(f"{key}: {value}" for key, value in facts.items()))
    show(rows)
    if options.out:
        sizes = {key: value for key, value in vars(options).items() if key not in ("out", "row", "gradient")}
        options.out.write_text(
            json.dumps({"machine": facts, "sizes": sizes, "rows": rows}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
