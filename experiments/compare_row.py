"""One row of `experiments.compare`, in a library's environment: `python -m experiments.compare_row METHOD GIVEN.pt`.

GIVEN.pt holds the sizes, the initial parameters, the tasks and the gradient in float64. The gradient of METHOD is
compared with it first; one that is off is an error and no figure. Then outer steps are timed, each a gradient and an
update by Adam. Prints one JSON object. Needs torch and numpy, and the library; theria is read from the source tree.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts" / "peers"))

import speed
from child import reset_peak, resident

import theria.nn.attention
from theria import meta
from theria.nn import TransformerClassifier
from theria.testing import difference

SAME = 1e-4  # relative error, float32: five inner steps of a transformer, summed in another order
ADJOINTS: dict[str, meta.Adjoint] = {
    "Unrolled": meta.Unrolled(),
    "Unrolled, checkpoints": meta.Unrolled(checkpoint_every=1),
    "MixedMode": meta.MixedMode(),
    "Higher": meta.Higher(),
}
RECORDED = ", recorded"  # as one CUDA graph
COMPILED = ", compiled"  # in the call whose gradient is compared; recorded on a GPU

Episode = tuple[Tensor, ...]
Step = Callable[[], Any]  # adds the gradient of the mean loss over the tasks to every parameter's .grad


def build(sizes: dict[str, int], backend: str = "auto") -> TransformerClassifier:
    """The network of all rows, its parameters drawn from the seed in `sizes`."""
    torch.manual_seed(sizes["seed"])
    shape: dict[str, Any] = {"d_model": sizes["width"], "n_heads": sizes["heads"], "n_layers": sizes["layers"]}
    return TransformerClassifier(sizes["ways"], patch=7, backend=backend, **shape)


def prepare(method: str, model: nn.Module, episode: Episode, steps: int) -> Step:
    """The outer gradient by a method: theria with an adjoint, or a library the way it documents."""
    library, _, how = method.partition(" ")
    if library != "theria":
        return lambda: speed.METHODS[library](model, episode, steps)
    adjoint = ADJOINTS[how.removesuffix(RECORDED).removesuffix(COMPILED)]
    learner = meta.MAML(model, cross_entropy, meta.SGD(speed.RATE), steps, adjoint)
    if how.endswith((RECORDED, COMPILED)):
        step = meta.CapturedStep(learner, compile=how.endswith(COMPILED))
        return lambda: step(episode)
    return lambda: learner(episode).backward()


def gradient(step: Step, model: nn.Module) -> list[Tensor]:
    """Of every parameter, zeros where the loss does not depend on it."""
    model.zero_grad()
    step()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def measure(method: str, given: dict[str, Any], device: torch.device, repeats: int) -> dict[str, Any]:
    """Error, memory and times of a method.

    Raises:
        ArithmeticError: its gradient is not the exact one; nothing was timed.
    """
    model = build(given["sizes"]).to(device)
    model.load_state_dict(given["model"])
    episode = tuple(field.to(device) for field in given["episode"])
    if not method.startswith("theria"):
        theria.nn.attention.sdpa = speed.math_attention
    step = prepare(method, model, episode, given["sizes"]["steps"])
    peak = _peak(device)
    error = difference([g.cpu() for g in gradient(step, model)], given["gradient"])
    memory = peak()
    if not error <= SAME:
        raise ArithmeticError(f"its gradient is {error:.1e} off the one in float64, {SAME:.0e} is allowed")
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    times = [_timed(step, optimiser, device) for _ in range(repeats + 1)][1:]  # without Adam's first
    wall, cpu = zip(*times, strict=True)
    spread = {"wall_s": statistics.median(wall), "fastest_s": min(wall), "slowest_s": max(wall)}
    return {**spread, "cpu_s": statistics.median(cpu), "peak_mib": memory, "error": error}


def _timed(step: Step, optimiser: torch.optim.Optimizer, device: torch.device) -> tuple[float, float]:
    """Seconds of one outer step: by the clock, and of the CPU, whatever else runs there."""
    _wait(device)
    begun, used = time.perf_counter(), time.process_time()
    optimiser.zero_grad()
    step()
    optimiser.step()
    _wait(device)
    return time.perf_counter() - begun, time.process_time() - used


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> Callable[[], float | None]:
    """Begin to measure; the function that is returned says the peak since, beyond what there was, in MiB.

    On a GPU that of the allocator, on a CPU that of the process; None where the system does not say.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: (torch.cuda.max_memory_allocated(device) - held) / 2**20
    before, can = resident("VmRSS"), reset_peak()

    def grown() -> float | None:
        peak = resident("VmHWM")
        return peak - before if can and peak is not None and before is not None else None

    return grown


def versions(method: str) -> dict[str, str]:
    """Of Python, torch and the library of a method."""
    library = method.partition(" ")[0]
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    if library == "learn2learn":  # unpacked rather than installed, see scripts/peers/environments.py
        from with_learn2learn import VERSION

        return {**found, library: VERSION}
    try:
        return {**found, library: theria.__version__ if library == "theria" else version(library)}
    except PackageNotFoundError:
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("given", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    given = torch.load(options.given, weights_only=True)
    row = measure(options.method, given, device, options.repeats)
    print("\n" + json.dumps({**row, "versions": versions(options.method)}))


if __name__ == "__main__":
    main()
