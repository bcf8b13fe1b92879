"""The same problems through theria and through the libraries beside it, each in an environment of its own.

    python scripts/compare_peers.py --environments DIR [--install] [--out results.json]
    python scripts/compare_peers.py --environments DIR --speed [--out results.json]

The first measures hypergradients of `theria.testing.problems` in float64: the relative error against the exact answer,
the median CPU time after a warm-up (JAX compiled) and the growth of memory. Unrolling takes as many steps as lead to
rounding; what differentiates implicitly does so at the exact inner solution. The second measures the outer gradient of
MAML on a transformer, after the gradients were found equal.

DIR/<library>/ is a virtual environment; `--install` makes those that are missing. A library that is not there, or that
raises, is reported as that. The tables are Markdown, on stdout.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import environments, exchange, report

from theria.testing.machine import machine
from theria.testing.problems import PROBLEMS

HERE = Path(__file__).resolve().parent / "peers"
LIBRARIES = ("theria", *environments.PEERS)
SPEED = {  # method: whose environment
    "theria Unrolled": "theria",
    "theria MixedMode": "theria",
    "theria Unrolled, 4 at once": "theria",
    "theria Unrolled, compiled": "theria",
    "higher": "higher",
    "torchopt": "torchopt",
    "learn2learn": "learn2learn",
}
SAME = 1e-4  # relative, float32: five inner steps of a transformer, summed in another order
TIMEOUT = 1800


def run(python: Path, script: str, *arguments: str) -> dict[str, Any]:
    """The JSON object that a script of `peers/` prints last, or {"failed": why}."""
    command = [str(python), str(HERE / script), *arguments]
    return environments.measured(command, TIMEOUT, OMP_NUM_THREADS="1", JAX_PLATFORMS="cpu")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Errors, times and memory of every library that is there on every problem."""
    rows, versions, absent = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.npz" for name in options.problems}
        exact = {}
        for name, path in paths.items():
            problem = exchange.export(name, path)
            exact[name] = problem.hypergradient(problem.outer0).numpy().ravel()
        for library in options.peers:
            python = environments.interpreter(options.environments, library)
            if not python.exists():
                absent[library] = "not installed"
                continue
            found = run(python, "child.py", library, *map(str, paths.values()), "--repeats", str(options.repeats))
            if "failed" in found:
                absent[library] = found["failed"]
                continue
            versions[library] = found["versions"]
            rows += [judged(library, row, exact[row["problem"]]) for row in found["results"]]
    return {"versions": versions, "absent": absent, "rows": rows}


def judged(library: str, row: dict[str, Any], exact: np.ndarray) -> dict[str, Any]:
    """The row with its error in the place of its gradient."""
    gradient = row.pop("gradient", None)
    if gradient is not None:
        row["error"] = float(np.linalg.norm(np.asarray(gradient) - exact) / np.linalg.norm(exact))
    return {"peer": library, **row}


def compare_speed(options: argparse.Namespace) -> dict[str, Any]:
    """Outer steps a second at equal gradients, each library in a process of its own."""
    rows, absent, expected = [], {}, None
    with tempfile.TemporaryDirectory() as folder:
        for method, library in SPEED.items():
            python = environments.interpreter(options.environments, library)
            if library not in options.peers or not python.exists():
                absent[method] = "not installed"
                continue
            path = Path(folder) / f"{method}.npy"
            row = run(python, "speed.py", method, str(path), *options.sizes, "--repeats", str(options.repeats))
            if "failed" not in row:
                gradient = np.load(path)
                expected = gradient if expected is None else expected
                row["difference"] = float(np.linalg.norm(gradient - expected) / np.linalg.norm(expected))
                row["steps_per_second"] = 1 / row["cpu_s"]
                if not row["difference"] <= SAME:
                    row = {"failed": f"its gradient differs by {row['difference']:.1e} from the first one's"}
            rows.append({"peer": library, "problem": "transformer", **row, "method": method})
    return {"absent": absent, "sizes": options.sizes, "rows": rows}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the environments")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--peers", nargs="*", default=list(LIBRARIES), choices=LIBRARIES)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--speed", action="store_true", help="measure MAML on a transformer instead")
    parser.add_argument("--sizes", nargs="*", default=[], help="with --speed: name=value, such as shots=5 (speed.py)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs after the warm-up")
    parser.add_argument("--out", type=Path, help="write the results as JSON here")
    options = parser.parse_args(arguments)
    options.sizes = [part for size in options.sizes for part in ("--" + size).split("=")]
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    torch.set_num_threads(1)
    options = parse(arguments)
    if options.install:
        for library in options.peers:
            if library != "theria":
                print(f"environment of {library}", file=sys.stderr, flush=True)
                environments.install(options.environments, library)
    before = os.getloadavg()[0]
    results = compare_speed(options) if options.speed else compare(options)
    results = {"machine": {**machine(), "load_before": round(before, 1)}, **results}
    print((report.speed if options.speed else report.problems)(results["rows"]))
    for line in filter(None, [report.failures(results["rows"]), *map(": ".join, results["absent"].items())]):
        print("\n" + line)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
