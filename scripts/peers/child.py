"""One peer on all problems, in the peer's own environment: `python child.py PEER [PROBLEM.npz ...] [--repeats N]`.

Prints one JSON object: {"versions": {...}, "results": [{"problem", "method", "gradient", "seconds", "cpu_s",
"peak_mib"} or
{"problem", "method", "failed"}]}. Without problems it only says which versions it found.
"""

import argparse
import importlib
import json
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from given import load

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(what: str) -> float | None:
    """VmRSS or VmHWM (its peak) of this process in MiB; None where Linux does not say."""
    if not STATUS.exists():
        return None
    lines = STATUS.read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(what)), None)


def reset_peak() -> bool:
    """Begin to measure the peak of the resident memory anew."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def measure(method: Any, repeats: int) -> dict[str, Any]:
    """Its gradient, median times after one warm-up (by the clock, and of the CPU, whatever else runs there), and the
    peak of memory beyond what there was before."""
    before, can = resident("VmRSS"), reset_peak()
    gradient = np.asarray(method(), dtype=np.float64)
    peak = resident("VmHWM")
    times, cpu = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        method()
        times.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    grown = peak - before if can and peak is not None and before is not None else None
    seconds = {"seconds": statistics.median(times), "cpu_s": statistics.median(cpu)}
    return {"gradient": gradient.ravel().tolist(), **seconds, "peak_mib": grown}


def found_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer")
    parser.add_argument("problems", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    peer = importlib.import_module(f"with_{options.peer}")
    named = {name: found_version(name) for name in ("torch", "jax", "numpy")}
    versions = {"python": platform.python_version(), options.peer: peer.VERSION, **named}
    results = []
    for path in options.problems:
        given = load(path)
        for name, method in peer.methods(given).items():
            row: dict[str, Any] = {"problem": given.name, "method": name}
            try:
                row |= measure(method, options.repeats)
            except Exception as error:  # a failure is a result, of any kind
                row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            results.append(row)
    print("\n" + json.dumps({"versions": {k: v for k, v in versions.items() if v}, "results": results}))


if __name__ == "__main__":
    main()
