"""A deep equilibrium transformer beside plain ones, and its implicit gradient beside backpropagation.

python -m experiments.deq experiment=deq                                    one of configs/experiment
python -m experiments.deq experiment=deq training.steps=1000 seeds=[0]      any setting by its name

A run writes config.yaml (resolved), metrics.jsonl and results.json (figures, machine, versions, command) into its
directory, outputs/<name>/<date_time> or run_dir=DIR.

Exit status: 0; 2 for a mistake in the settings; 3 for a loss that is not finite or an equilibrium that is not reached.
"""

import json
import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from experiments import deq_config, deq_gradient, deq_network, errors, folder, store, tracking
from experiments.deq_config import DeqConfig, TrainingConfig
from experiments.deq_network import Classifier, Digits
from experiments.protocols import wilson
from theria.meta.solvers import SolverError
from theria.nn.equilibrium import DeepEquilibrium
from theria.testing.machine import machine

PROGRAM = "experiments.deq"
SAMPLES = 1797  # of scikit-learn's digits


def run(settings: DeqConfig, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """One run; what it leaves is in `run_dir`. Returns what results.json holds.

    Raises:
        errors.UserError: a setting that does not fit, or a directory with the files of another run.
        errors.NonFiniteError: a loss that is not finite, or an equilibrium that is not reached.
    """
    check(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with folder.held(run_dir):
        folder.check_unused(run_dir)
        return _run(settings, run_dir, overrides)


def _run(settings: DeqConfig, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(settings), enum_to_str=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(container))
    lines = tracking.JsonLines(run_dir / tracking.METRICS, 0)
    begun = time.monotonic(), time.process_time()
    trained = [_train_all(settings, seed, lines) for seed in settings.seeds]
    results = {
        "command": shlex.join(["python", "-m", PROGRAM, *(o for o in overrides if "run_dir=" not in o)]),
        "networks": {name: _summary([seed["networks"][name] for seed in trained]) for name in trained[0]["networks"]},
        "gradient": trained[0]["gradient"],
        "samples": {"train": settings.training.samples, "test": SAMPLES - settings.training.samples},
        "seconds": round(time.monotonic() - begun[0], 1),
        "processor_seconds": round(time.process_time() - begun[1], 1),  # what the machine's other load does not change
        "machine": machine() | {"scikit-learn": version("scikit-learn"), "numpy": version("numpy")},
    }
    (run_dir / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "machine"}, indent=2))
    print(f"everything is in {run_dir}")
    return results


def check(settings: DeqConfig) -> None:
    """Refuse values outside their range.

    Raises:
        errors.UserError: with the value and what is needed.
    """
    network, training, gradient = settings.network, settings.training, settings.gradient
    least = {
        "network.max_iter": network.max_iter,
        "network.d_ff": network.d_ff,
        "network.n_heads": network.n_heads,
        "training.steps": training.steps,
        "training.batch": training.batch,
        "gradient.batch": gradient.batch,
        "gradient.max_iter": gradient.max_iter,
        "gradient.repeats": gradient.repeats,
        "log_every": settings.log_every,
        "threads": settings.threads,
    }
    for key, value in least.items():
        if value is not None and value < 1:
            raise errors.UserError(f"{key}={value}: needed is at least 1")
    for key, value in {"network.layers": network.layers, "gradient.unrolled": gradient.unrolled}.items():
        if any(n < 1 for n in value):
            raise errors.UserError(f"{key}={value}: needed are numbers of at least 1")
    positive = {"network.tol": network.tol, "gradient.tol": gradient.tol, "training.lr": training.lr}
    for key, value in {**positive, "training.clip": training.clip}.items():
        if not (value > 0 and math.isfinite(value)):
            raise errors.UserError(f"{key}={value}: needed is a positive number")
    if not (training.contraction >= 0 and math.isfinite(training.contraction)):
        raise errors.UserError(f"training.contraction={training.contraction}: needed is at least 0")
    _check_sizes(settings)


def _check_sizes(settings: DeqConfig) -> None:
    network, training, gradient = settings.network, settings.training, settings.gradient
    if not settings.seeds:
        raise errors.UserError("seeds=[]: needed is at least one")
    if len({*settings.seeds}) < len(settings.seeds):
        raise errors.UserError(
            f"seeds={settings.seeds}: a seed is repeated, which trains the same network: give each once"
        )
    if not max(training.batch, gradient.batch) <= training.samples < SAMPLES:
        raise errors.UserError(
            f"training.samples={training.samples}: needed is a number from the size of a batch to {SAMPLES - 1}, so "
            "that some are left to test on"
        )
    if network.d_model < 1 or network.d_model % network.n_heads:
        raise errors.UserError(
            f"network.d_model={network.d_model}: needed is a multiple of network.n_heads={network.n_heads}"
        )


def _train_all(settings: DeqConfig, seed: int, lines: tracking.JsonLines) -> dict[str, Any]:
    """Every network trained from one seed, and the gradients of the first before and after."""
    data, results = deq_network.draw(settings.training.samples, seed), {}
    networks = deq_network.build(settings.network, seed)
    batch = data.x[: settings.gradient.batch], data.y[: settings.gradient.batch]
    with _advice():
        gradient = {}
        compared = seed == settings.seeds[0]
        if compared:
            gradient["at_the_start"] = deq_gradient.compare(networks["equilibrium"], *batch, settings.gradient)
        for name, network in networks.items():
            begun = time.process_time()
            correct = train(network, data, settings.training, seed, _line(lines, settings, f"{name}_{seed}"))
            results[name] = {
                "correct": correct,
                "processor_seconds": time.process_time() - begun,
                "parameters": sum(p.numel() for p in network.parameters()),
                "step_peak_mib": deq_gradient.peak_mib(_step(network, batch)),
                **_depth(network, data),
            }
        if compared:
            gradient["after_training"] = deq_gradient.compare(networks["equilibrium"], *batch, settings.gradient)
    return {"networks": results, "gradient": gradient}


def train(
    network: Classifier, data: Digits, config: TrainingConfig, seed: int, show: Callable[[int, float], None]
) -> Tensor:
    """Train on batches that depend on the seed alone; (n,) whether each test image is classified correctly.

    Raises:
        errors.NonFiniteError: a loss that is not finite.
        SolverError: an equilibrium that is not reached, or a derivative's linear system that is not solved.
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    batches, noise = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    for step in range(config.steps):
        chosen = torch.randint(len(data.y), (config.batch,), generator=batches)
        loss = _training_loss(network, data.x[chosen], data.y[chosen], config.contraction, noise)
        if not bool(loss.isfinite()):
            raise errors.NonFiniteError(f"step {step}: loss {loss.item()}. Lower training.lr")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        show(step + 1, loss.item())
    with torch.no_grad():
        return (network(data.test_x).argmax(1) == data.test_y).double()


def _training_loss(network: Classifier, x: Tensor, y: Tensor, contraction: float, noise: torch.Generator) -> Tensor:
    """The cross-entropy; of an equilibrium, with what keeps its block a contraction."""
    embedded = network.embed(x)
    z = network.core(embedded)
    loss = F.cross_entropy(network.read(z), y)
    if not isinstance(network.core, DeepEquilibrium) or contraction == 0:
        return loss
    directions = torch.randn(z.shape, generator=noise)
    return loss + contraction * deq_network.expansion(network.core.block, embedded, z, directions)


def _step(network: Classifier, batch: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    """Forward and backward of the cross-entropy."""
    return lambda: torch.autograd.grad(F.cross_entropy(network(batch[0]), batch[1]), list(network.parameters()))


def _line(lines: tracking.JsonLines, settings: DeqConfig, name: str) -> Callable[[int, float], None]:
    def show(step: int, loss: float) -> None:
        if step % settings.log_every == 0 or step == settings.training.steps:
            lines.write({"step": step, f"{name}/loss": loss})
            print(f"{name} {step}: loss {loss:.4g}", flush=True)

    return show


def _depth(network: Classifier, data: Digits) -> dict[str, int]:
    """How many iterations the equilibrium of the test set takes."""
    if not isinstance(network.core, DeepEquilibrium):
        return {}
    with torch.no_grad():
        return {"iterations": int(network.core.solve(network.embed(data.test_x)).iterations)}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One network over the seeds: the mean of their accuracies, and the figures of each.

    An interval is of one seed, over the images of its test set: those of two seeds overlap.
    """
    correct = [run["correct"] for run in runs]
    each = [float(of_seed.mean()) for of_seed in correct]
    return {
        "test_accuracy": sum(each) / len(each),
        "test_accuracy_of_each_seed": each,
        "test_accuracy_wilson95_of_each_seed": [[*wilson(int(of_seed.sum()), len(of_seed))] for of_seed in correct],
        "parameters": runs[0]["parameters"],
        "training_processor_seconds": [round(run["processor_seconds"], 2) for run in runs],
        "step_peak_mib": runs[0]["step_peak_mib"],
        **({"test_iterations": [run["iterations"] for run in runs]} if "iterations" in runs[0] else {}),
    }


@contextmanager
def _advice() -> Iterator[None]:
    """A solver that fails ends the run with what can be done about it."""
    try:
        yield
    except SolverError as error:
        raise errors.NonFiniteError(
            f"{error}\nThe block is no contraction there: lower training.lr, or raise training.contraction, "
            "network.max_iter or network.tol (in the comparison of gradients gradient.max_iter, gradient.tol)"
        ) from error


@hydra.main(version_base="1.3", config_path=store.CONFIG_DIR, config_name="deq")
def entry(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    hydra_config = HydraConfig.get()
    run(store.to_object(cfg), Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task))


def main() -> None:
    deq_config.register()
    errors.run(entry, PROGRAM)


if __name__ == "__main__":
    main()
