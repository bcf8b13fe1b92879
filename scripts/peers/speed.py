"""One row of the comparison of speed, in a library's own environment: `python speed.py METHOD OUT.npy [sizes]`.

The outer gradient of MAML on a transformer classifier of `theria.nn`, float32: T tasks, S inner steps of SGD. theria
runs its tasks under vmap, the others in a loop, as each of them documents it; they get PyTorch's own attention ("math",
the only one of PyTorch's that can be differentiated twice), theria its default. "Compiled" is by
`theria.meta.CapturedStep`, in the call before those that are timed. Prints one JSON object; writes the gradient.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from child import reset_peak, resident
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # theria, which is not installed beside the peers

import theria.nn.attention
from theria.nn import TransformerClassifier

Episode = tuple[Tensor, Tensor, Tensor, Tensor]
RATE = 0.1


def math_attention(*args: Any, backend: str, **options: Any) -> Tensor:
    """PyTorch's attention in the place of `theria.ops.sdpa`."""
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*args, **options)


def build(options: argparse.Namespace) -> tuple[nn.Module, Episode]:
    torch.manual_seed(0)
    model = TransformerClassifier(options.ways, d_model=options.width, n_layers=options.layers)
    tasks, support, query = options.tasks, options.ways * options.shots, options.ways * options.queries
    x, q = torch.rand(tasks, support, 1, 28, 28), torch.rand(tasks, query, 1, 28, 28)
    classes = torch.arange(options.ways)
    return model, (x, classes.repeat(tasks, options.shots), q, classes.repeat(tasks, options.queries))


def of_theria(adjoint: str, at_once: int | None = None) -> Callable[[nn.Module, Episode, int], None]:
    """All tasks under one vmap, or so many of them, one backward after the other."""

    def run(model: nn.Module, episode: Episode, steps: int) -> None:
        from theria import meta

        learner = meta.MAML(model, cross_entropy, meta.SGD(RATE), steps, getattr(meta, adjoint)())
        tasks = len(episode[0])
        for part in zip(*(field.split(at_once or tasks) for field in episode), strict=True):
            (learner(part) * (len(part[0]) / tasks)).backward()

    return run


def of_theria_compiled(adjoint: str) -> Callable[[nn.Module, Episode, int], None]:
    """All tasks under one vmap, the step compiled at the first call."""
    steps_of: dict[int, Any] = {}

    def run(model: nn.Module, episode: Episode, steps: int) -> None:
        from theria import meta

        if id(model) not in steps_of:
            learner = meta.MAML(model, cross_entropy, meta.SGD(RATE), steps, getattr(meta, adjoint)())
            steps_of[id(model)] = meta.CapturedStep(learner, compile=True)
        steps_of[id(model)](episode)

    return run


def with_higher(model: nn.Module, episode: Episode, steps: int) -> None:
    import higher

    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for x, y, q, z in zip(*episode, strict=True):
        with higher.innerloop_ctx(model, optimiser, copy_initial_weights=False) as (fast, stepper):
            for _ in range(steps):
                stepper.step(cross_entropy(fast(x), y))
            (cross_entropy(fast(q), z) / len(episode[0])).backward()


def with_torchopt(model: nn.Module, episode: Episode, steps: int) -> None:
    import torchopt

    optimiser = torchopt.MetaSGD(model, lr=RATE)
    parameters = torchopt.extract_state_dict(model, by="reference")
    state = torchopt.extract_state_dict(optimiser, by="reference")
    for x, y, q, z in zip(*episode, strict=True):
        for _ in range(steps):
            optimiser.step(cross_entropy(model(x), y))
        (cross_entropy(model(q), z) / len(episode[0])).backward()
        torchopt.recover_state_dict(model, parameters)
        torchopt.recover_state_dict(optimiser, state)


def with_learn2learn(model: nn.Module, episode: Episode, steps: int) -> None:
    from with_learn2learn import MAML

    learner = MAML(model, lr=RATE)
    for x, y, q, z in zip(*episode, strict=True):
        fast = learner.clone()
        for _ in range(steps):
            fast.adapt(cross_entropy(fast(x), y))
        (cross_entropy(fast(q), z) / len(episode[0])).backward()


METHODS = {
    "theria Unrolled": of_theria("Unrolled"),
    "theria MixedMode": of_theria("MixedMode"),
    "theria Unrolled, 4 at once": of_theria("Unrolled", 4),
    "theria Unrolled, compiled": of_theria_compiled("Unrolled"),
    "higher": with_higher,
    "torchopt": with_torchopt,
    "learn2learn": with_learn2learn,
}


def gradient(method: str, model: nn.Module, episode: Episode, steps: int) -> np.ndarray:
    model.zero_grad()
    METHODS[method](model, episode, steps)
    return np.concatenate([p.grad.flatten().numpy() for p in model.parameters() if p.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("out", type=Path)
    sizes = {"ways": 5, "shots": 1, "queries": 5, "tasks": 16, "steps": 5, "layers": 4, "width": 64, "repeats": 5}
    for name, default in {**sizes, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.method.startswith("theria"):
        theria.nn.attention.sdpa = math_attention  # pyright: ignore
    model, episode = build(options)
    before, can = resident("VmRSS"), reset_peak()
    np.save(options.out, gradient(options.method, model, episode, options.steps))
    peak = resident("VmHWM")
    times, cpu = [], []
    for _ in range(options.repeats):
        begun, used = time.perf_counter(), time.process_time()
        gradient(options.method, model, episode, options.steps)
        times.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    grown = peak - before if can and peak is not None and before is not None else None
    wall = {"median_s": statistics.median(times), "fastest_s": min(times), "slowest_s": max(times)}
    # CPU time on one thread: what the machine does beside does not count.
    print(json.dumps({**wall, "cpu_s": statistics.median(cpu), "peak_mib": grown}))


if __name__ == "__main__":
    main()
