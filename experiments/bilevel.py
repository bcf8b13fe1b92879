"""Learn hyperparameters by hypergradients.

python -m experiments.bilevel experiment=hyper_cleaning                    one of configs/experiment
python -m experiments.bilevel experiment=ridge_hyperparameter method.kind=itd method.inner_steps=200

A run writes config.yaml (resolved), metrics.jsonl and results.json (figures, machine, versions, command) into its
directory, outputs/<name>/<date_time> or run_dir=DIR.

Exit status: 0; 2 for a mistake in the settings; 3 for a loss or hypergradient that is not finite.
"""

import json
import math
import shlex
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from experiments import bilevel_cleaning, bilevel_config, bilevel_ridge, errors, folder, store, tracking
from experiments.bilevel_config import (
    BilevelConfig,
    HyperCleaningConfig,
    MethodConfig,
    MethodKind,
    OuterKind,
    ProblemConfig,
    RidgeConfig,
)
from experiments.bilevel_data import Experiment, Stage
from theria.meta import SGD
from theria.meta.bilevel import AID, ITD, Evaluation, Method
from theria.meta.solvers import CG
from theria.testing.machine import machine

PROGRAM = "experiments.bilevel"


def run(settings: BilevelConfig, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """One run; what it leaves is in `run_dir`. Returns what results.json holds.

    Raises:
        errors.UserError: a setting that does not fit, or a directory with the files of another run.
        errors.NonFiniteError: a loss or hypergradient that is not finite.
    """
    check(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    experiment = build(settings.problem, settings.seed)
    with folder.held(run_dir):
        folder.check_unused(run_dir)
        return _run(settings, experiment, run_dir, overrides)


def _run(settings: BilevelConfig, experiment: Experiment, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    container = OmegaConf.to_container(OmegaConf.structured(settings), enum_to_str=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(container))
    lines = tracking.JsonLines(run_dir / tracking.METRICS, 0)
    begun, outer, counts = (time.monotonic(), time.process_time()), {}, {}
    for name, stage in experiment.stages.items():
        outer[name], counts[name] = optimise(settings, name, stage, lines)
    results = {
        "command": shlex.join(["python", "-m", PROGRAM, *(o for o in overrides if "run_dir=" not in o)]),
        "seconds": round(time.monotonic() - begun[0], 1),
        "processor_seconds": round(time.process_time() - begun[1], 1),  # what the machine's other load does not change
        "evaluations": counts,
        **experiment.report(outer),
        "machine": machine() | {"scikit-learn": version("scikit-learn"), "numpy": version("numpy")},
    }
    (run_dir / "results.json").write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    print(json.dumps({key: value for key, value in results.items() if key != "machine"}, indent=2))
    print(f"everything is in {run_dir}")
    return results


def check(settings: BilevelConfig) -> None:
    """Refuse values outside their range.

    Raises:
        errors.UserError: with the value and what is needed.
    """
    method, outer = settings.method, settings.outer
    least = {
        "method.inner_steps": (method.inner_steps, 1),
        "method.max_iterations": (method.max_iterations, 1),
        "outer.steps": (outer.steps, 1),
        "log_every": (settings.log_every, 1),
        "threads": (settings.threads, 1),
    }
    for key, (value, bound) in least.items():
        if value is not None and value < bound:
            raise errors.UserError(f"{key}={value}: needed is at least {bound}")
    positive = {"outer.lr": outer.lr, "method.inner_rate": method.inner_rate, "method.rtol": method.rtol}
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise errors.UserError(f"{key}={value}: needed is a positive number")
    if not 0 <= method.momentum < 1:
        raise errors.UserError(f"method.momentum={method.momentum}: needed is a number in [0, 1)")


def build(config: ProblemConfig, seed: int) -> Experiment:
    """The experiment of a configuration.

    Raises:
        errors.UserError: what does not fit the data set.
    """
    match config:
        case HyperCleaningConfig():
            return bilevel_cleaning.build(config, seed)
        case RidgeConfig():
            return bilevel_ridge.build(config, seed)
    raise TypeError(f"no builder for {type(config).__name__}")


def build_method(config: MethodConfig, stage: Stage, outer: Tensor) -> Method:
    rate = 1 / float(stage.largest(outer)) if config.inner_rate is None else config.inner_rate
    optimiser = SGD(rate, momentum=config.momentum, nesterov=config.momentum > 0)
    if config.kind is MethodKind.itd:
        return ITD(optimiser, config.inner_steps)
    solver = CG(rtol=config.rtol, max_iterations=config.max_iterations)
    # Reverse over reverse: forward mode costs several times as much on tensors as small as these.
    return AID(optimiser, config.inner_steps, solver, throw=False, mode="reverse_over_reverse")


class Evaluator:
    """h of a stage at its outer variable, with the gradient in `outer.grad`; warm starts and lines of figures."""

    def __init__(self, settings: BilevelConfig, name: str, stage: Stage, lines: tracking.JsonLines) -> None:
        self.settings, self.name, self.stage, self.lines = settings, name, stage, lines
        self.outer = torch.nn.Parameter(stage.outer0.clone())
        self.warm: dict[str, Any] = {"inner0": stage.inner0, "v0": None}
        self.count = 0

    def __call__(self) -> Tensor:
        self.outer.grad = None
        method = build_method(self.settings.method, self.stage, self.outer.detach())
        evaluation = self.stage.problem.evaluate(self.outer, method=method, **self.warm)
        evaluation.value.backward()
        if isinstance(method, AID):  # ITD is the gradient of steps from one and the same start
            self.warm = {"inner0": evaluation.inner, "v0": evaluation.linear.value}
        self._record(evaluation)
        self.count += 1
        return evaluation.value

    def _record(self, evaluation: Evaluation) -> None:
        assert self.outer.grad is not None
        value, norm = evaluation.value.item(), float(self.outer.grad.norm())
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise errors.NonFiniteError(
                f"{self.name}, evaluation {self.count}: value {value}, hypergradient norm {norm}. Lower outer.lr or "
                f"method.inner_rate"
            )
        if self.count % self.settings.log_every:
            return
        figures = {"value": value, "gradient_norm": norm, "inner_residual": float(evaluation.inner_residual)}
        figures |= self.stage.figures(self.outer.detach(), evaluation.inner)
        self.lines.write({"step": self.count, **{f"{self.name}/{key}": figure for key, figure in figures.items()}})
        shown = ", ".join(f"{key} {figure:.4g}" for key, figure in figures.items())
        print(f"{self.name} {self.count}: {shown}", flush=True)


def optimise(settings: BilevelConfig, name: str, stage: Stage, lines: tracking.JsonLines) -> tuple[Tensor, int]:
    """The outer variable at the end of a stage, and the evaluations that it took."""
    evaluate = Evaluator(settings, name, stage, lines)
    if settings.outer.kind is OuterKind.lbfgs:
        options = {"max_iter": settings.outer.steps, "max_eval": settings.outer.steps, "line_search_fn": "strong_wolfe"}
        optimiser = torch.optim.LBFGS([evaluate.outer], tolerance_grad=1e-9, tolerance_change=1e-12, **options)
        optimiser.step(evaluate)  # pyright: ignore[reportArgumentType]
    else:
        optimiser = torch.optim.Adam([evaluate.outer], lr=settings.outer.lr)
        for _ in range(settings.outer.steps):
            evaluate()
            optimiser.step()
    return evaluate.outer.detach(), evaluate.count


@hydra.main(version_base="1.3", config_path=store.CONFIG_DIR, config_name="bilevel")
def entry(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    hydra_config = HydraConfig.get()
    if OmegaConf.is_missing(cfg, "problem"):
        raise errors.UserError(
            "no problem was chosen: give experiment=hyper_cleaning or experiment=ridge_hyperparameter"
        )
    run(store.to_object(cfg), Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task))


def main() -> None:
    bilevel_config.register()
    errors.run(entry, PROGRAM)


if __name__ == "__main__":
    main()
