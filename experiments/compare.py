"""The same outer step of MAML through theria, with each exact adjoint, and through the libraries beside it.

    python -m experiments.compare                                      seconds on a CPU, with what is installed here
    python -m experiments.compare --environments DIR --install         each library in an environment of its own
    python -m experiments.compare --gpu --environments DIR --out compare.json       the large shape, on a GPU

The same transformer with the same initial parameters, the same tasks (rendered characters) and the same inner steps:
all of it is written to one file, which every method reads in a process of its own. Its gradient is first compared with
that of theria's `Unrolled` on the `reference` backend in float64, which tests hold to closed forms; a method that is
further off than 1e-4 is reported as wrong and gets no figure. theria runs tasks under vmap with its own attention. The
others run them in a loop, as each documents it, with PyTorch's math attention, the only one of PyTorch's that can be
differentiated twice. An outer step is a gradient and an update by Adam. Times are medians: of the CPU's time on a CPU
with one thread, so that what else runs there does not count; of the clock on a GPU. Memory is the peak beyond model and
tasks: of the process on a CPU, of the allocator on a GPU.

theria's steps are also recorded as a CUDA graph on a GPU, and compiled: on a CPU if --methods says so, since that takes
minutes there.

A library is looked for in DIR/<library>/, then in this environment; one that is nowhere, or fails, is reported as that.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from peers import environments, report  # pyright: ignore[reportMissingImports]  # noqa: E402

from experiments import compare_row  # noqa: E402
from theria import data, meta  # noqa: E402
from theria.testing.machine import machine  # noqa: E402

THERIA = [f"theria {name}" for name in compare_row.ADJOINTS]
RECORDED = [f"theria {name}{compare_row.RECORDED}" for name in ("Unrolled", "MixedMode")]
COMPILED = [f"theria {name}{compare_row.COMPILED}" for name in ("Unrolled", "MixedMode")]
PEERS = ["learn2learn", "higher", "torchopt"]
SMALL = {"ways": 5, "shots": 1, "queries": 5, "tasks": 4, "steps": 5, "layers": 2, "width": 64, "heads": 4}
LARGE = {"ways": 20, "shots": 1, "queries": 5, "tasks": 16, "steps": 5, "layers": 4, "width": 128, "heads": 4}
TIMEOUT = 1800  # seconds a method may take


def library_of(method: str) -> str:
    """Whose environment runs a method."""
    return "higher" if method == "theria Higher" else method.partition(" ")[0]


def given(sizes: dict[str, int], device: torch.device) -> dict[str, Any]:
    """What every method gets: sizes, initial parameters, tasks, and the gradient in float64."""
    counts: dict[str, Any] = {name: sizes[name] for name in ("ways", "shots", "queries", "tasks", "seed")}
    episode = tuple(data.EpisodeSampler(data.load_glyphs("train"), **counts).sample(0))
    state = compare_row.build(sizes).state_dict()
    exact = compare_row.build(sizes, backend="reference").double()
    exact.load_state_dict(state)
    exact.to(device)
    learner = meta.MAML(exact, cross_entropy, meta.SGD(compare_row.speed.RATE), sizes["steps"], meta.Unrolled())
    for task in range(sizes["tasks"]):  # one by one: in float64 memory is what is short
        x, y, q, z = (field[task : task + 1].to(device) for field in episode)
        (learner((x.double(), y, q.double(), z)) / sizes["tasks"]).backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad for p in exact.parameters()]
    return {"sizes": sizes, "model": state, "episode": episode, "gradient": [g.cpu() for g in gradient]}


def interpreter(folder: Path | None, library: str) -> Path | None:
    """The interpreter that has a library; None where none is found."""
    if library == "theria":
        return Path(sys.executable)
    if folder is not None and environments.interpreter(folder, library).exists():
        return environments.interpreter(folder, library)
    return Path(sys.executable) if find_spec(library) is not None else None


def run(python: Path, method: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a method, or {"failed": why}."""
    threads = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
    command = [str(python), "-m", "experiments.compare_row", method, str(path), "--device", options.device]
    try:
        return environments.measured([*command, "--repeats", str(options.repeats)], TIMEOUT, ROOT, **threads)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result in {TIMEOUT} s"}


def compare(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each method that ran, and why the others did not."""
    rows, absent = [], {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.pt"
        torch.save(given(options.sizes, torch.device(options.device)), path)
        if options.device != "cpu":
            torch.cuda.empty_cache()  # the methods measure the same device
        for method in options.methods:
            library = library_of(method)
            python = interpreter(options.environments, library)
            if python is None:
                absent[method] = not_installed(library)
                continue
            row = run(python, method, path, options)
            if "failed" not in row:
                row = rated(row, options)
            rows.append({"method": method, **row})
            print(f"{method}: {row.get('failed') or 'measured'}", file=sys.stderr, flush=True)
    return rows, absent


def rated(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    seconds = row["cpu_s" if options.device == "cpu" else "wall_s"]
    rates = {"outer_steps_per_second": 1 / seconds, "tasks_per_second": options.sizes["tasks"] / seconds}
    return {**rates, **row}


def not_installed(library: str) -> str:
    """With the command that mends it."""
    peer = environments.PEERS[library]
    why = f" ({peer.why})" if peer.why else ""
    return f"not installed{why}: python -m experiments.compare --environments DIR --install"


def table(rows: Sequence[dict[str, Any]], device: str) -> str:
    """Markdown."""
    lines = []
    for row in rows:
        if "failed" in row:
            lines.append([row["method"], "no figure", "", "", ""])
            continue
        memory = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        rates = (f"{row[name]:.3g}" for name in ("outer_steps_per_second", "tasks_per_second"))
        lines.append([row["method"], *rates, memory, f"{row['error']:.0e}"])
    second = "CPU second" if device == "cpu" else "second"
    head = ["", f"outer steps a {second}", f"tasks a {second}", "peak MiB", "gradient off float64 by"]
    return report.table(head, lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, metavar="DIR", help="folder with an environment for each library")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing in it")
    parser.add_argument("--gpu", action="store_true", help="on a CUDA device, in the large shape")
    parser.add_argument("--methods", nargs="+", choices=[*COMPILED, *RECORDED, *THERIA, *PEERS], metavar="METHOD")
    for name in SMALL:
        parser.add_argument(f"--{name}", type=int, help=f"{SMALL[name]}; with --gpu {LARGE[name]}")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and of the tasks")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, after the one whose gradient is compared")
    parser.add_argument("--out", type=Path, help="write the figures as JSON here")
    options = parser.parse_args(arguments)
    if options.install and options.environments is None:
        parser.error("--install: needed is a folder for the environments: give --environments DIR")
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: torch finds no CUDA device here; without it the same runs on the CPU, in a small shape")
    options.device = "cuda" if options.gpu else "cpu"
    defaults = LARGE if options.gpu else SMALL
    chosen = {name: getattr(options, name) for name in SMALL}
    options.sizes = {name: defaults[name] if value is None else value for name, value in chosen.items()}
    options.sizes["seed"] = options.seed
    if options.repeats < 1 or any(value < 1 for name, value in options.sizes.items() if name != "seed"):
        parser.error("every size and --repeats: needed is at least 1")
    if options.sizes["width"] % options.sizes["heads"]:
        parser.error(
            f"--width {options.sizes['width']} --heads {options.sizes['heads']}: needed is a multiple of heads"
        )
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}: make it first")
    options.methods = options.methods or [*(COMPILED + RECORDED if options.gpu else []), *THERIA, *PEERS]
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The comparison as a program; returns what it writes.

    Raises:
        SystemExit: 1, after everything is written, when theria's own gradient is wrong or its step fails.
    """
    options = parse(arguments)
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.install:
        for library in dict.fromkeys(library_of(method) for method in options.methods):
            if library != "theria":
                print(f"environment of {library}", file=sys.stderr, flush=True)
                environments.install(options.environments, library)
    load = round(os.getloadavg()[0], 1)
    rows, absent = compare(options)
    command = " ".join(["python -m experiments.compare", *(sys.argv[1:] if arguments is None else arguments)])
    where = {"machine": {**machine(), "load_before": load}, "device": options.device, "sizes": options.sizes}
    result = {"command": command, **where, "clock": "cpu_s" if options.device == "cpu" else "wall_s"}
    result |= {"rows": rows, "absent": absent}
    print(table(rows, options.device))
    for method, reason in {**absent, **{row["method"]: row["failed"] for row in rows if "failed" in row}}.items():
        print(f"\n{method}: {reason}")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    if any("failed" in row for row in rows if row["method"].startswith("theria")):
        raise SystemExit(1)
    return result


if __name__ == "__main__":
    main()
