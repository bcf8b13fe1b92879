"""Train a learner on a family of tasks.

python -m experiments.train                                the default run: 5-way 1-shot on rendered characters
python -m experiments.train experiment=sinusoid_maml       one of configs/experiment
python -m experiments.train task.ways=10 inner.steps=3     any setting by its name
python -m experiments.train --multirun seed=0,1,2          one run after the other; on a cluster: docs/scaling.md
torchrun --nproc-per-node=4 -m experiments.train ...       the tasks of each step shared by four processes, the same
                                                           run to rounding: gloo on CPUs, NCCL with a GPU for each

A run writes everything into its directory, outputs/<name>/<date_time> or run_dir=DIR: config.yaml (resolved), run.json
(command, commit, versions), metrics.jsonl, checkpoints/ (the last two), pictures/, results.json, wandb/. Ctrl-C and
SIGTERM write a checkpoint and print the command that goes on, and no later run of --multirun begins; after a kill the
last periodic checkpoint stands. The directory is one process's at a time, and no earlier run in it is replaced.
`trainer.resume=true run_dir=DIR` with the same settings goes on from DIR's newest readable checkpoint (from step 0
where there is none) to the same parameters, bit by bit on a CPU, as a run that was never stopped; `trainer.resume=PATH`
starts from another run's checkpoint in a directory of its own. Only a stop by trainer.max_minutes depends on the
machine.

Exit status: 0; 2 for a mistake in the settings; 3 for a loss, gradient or parameter that is not finite; 4 when another
process of the run is gone or hangs; 130, 143 after a signal.
"""

import json
import math
import sys
from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import (
    build,
    checkpoint,
    errors,
    folder,
    launch,
    pictures,
    processes,
    progress,
    provenance,
    resume,
    store,
    tracking,
)
from experiments.config import Config, FewShotConfig, LinearRegressionConfig
from experiments.config_learner import LearnerKind
from experiments.evaluation import Evaluation
from experiments.interrupt import SignalWatch, ending_sweep
from experiments.trainer import Parts, Trainer, memory_record
from theria.meta.distributed import ALONE, LostProcess, Processes
from theria.testing.machine import machine

PROGRAM = "experiments.train"
VALIDATION = ("val/accuracy", "val/mse")


def train(settings: Config, run_dir: Path, overrides: list[str], ranks: Processes = ALONE) -> Evaluation:
    """One run: everything that it leaves is in `run_dir`. Returns the figures on the test classes.

    Args:
        ranks: the processes that share its tasks; the first one alone writes and prints.

    Raises:
        errors.UserError: something that the caller can mend; its text says what.
    """
    ranks.first(lambda: build.check(settings))
    torch.set_float32_matmul_precision(settings.ops.matmul_precision)
    if settings.trainer.threads is not None:
        torch.set_num_threads(settings.trainer.threads)
    sources = processes.sources(ranks, settings)
    learner = build.build_learner(settings)
    ranks.copy_first(learner.state_dict())
    with folder.held(run_dir, ranks):
        found = ranks.first(lambda: _begin(settings, run_dir))
        done = 0 if found is None else found[1]["step"]
        ranks.first(lambda: provenance.record(run_dir, resume.whole(overrides), done))
        with SignalWatch() as watch, _shown(settings, done, ranks) as shown:
            _say_first_order(settings, shown)
            tracker = _tracker(settings, run_dir, shown, done, ranks)
            command = resume.command(overrides, run_dir)
            trainer = Trainer(Parts(settings, run_dir, learner, sources, tracker, shown, watch, command, ranks))
            if found is not None:
                trainer.restore(found[1], ranks.first(lambda: _validated(run_dir)))
                shown.say(f"resumed from {found[0]} at step {done}")
            return _run(trainer, resume.whole(overrides))


def _begin(settings: Config, run_dir: Path) -> tuple[Path, dict] | None:
    """The run's directory with its configuration, and where to go on from."""
    found = _checkpoint(settings, run_dir)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(store.container(settings)))
    return found


def _shown(settings: Config, done: int, ranks: Processes) -> progress.Progress:
    if not ranks.is_first:
        return progress.Silent()
    return progress.progress(settings.trainer.display, settings.trainer.steps, done)


def _say_first_order(settings: Config, shown: progress.Progress) -> None:
    """Say so where all of the run lies in MAML++'s first-order epochs."""
    learner = settings.learner
    begins = learner.epoch_steps * learner.first_order_epochs
    if learner.kind is LearnerKind.maml_plus_plus and begins >= settings.trainer.steps:
        shown.say(
            f"first order throughout: the second order of learner=maml_plus_plus begins after step {begins:,} "
            f"(learner.epoch_steps={learner.epoch_steps} * learner.first_order_epochs={learner.first_order_epochs}), "
            f"and trainer.steps={settings.trainer.steps}"
        )


def _tracker(
    settings: Config, run_dir: Path, shown: progress.Progress, done: int, ranks: Processes
) -> tracking.Tracker:
    if not ranks.is_first:
        return tracking.Tracker(None, None)
    return tracking.start(settings.tracking, run_dir, store.container(settings), shown.say, done)


def _run(trainer: Trainer, command: str) -> Evaluation:
    """Train, evaluate, draw; whatever happens, the tracker is closed."""
    code = 1
    try:
        result = trainer.run()
        if trainer.ranks.is_first:
            _report(trainer, result, command)
        code = 0
    except errors.UserError as error:
        code = error.exit_code
        raise
    except LostProcess as error:
        code = errors.LostProcessError.exit_code
        raise errors.LostProcessError(trainer.lost(error)) from error
    finally:
        trainer.parts.tracker.finish(code)
    return result


def _report(trainer: Trainer, result: Evaluation, command: str) -> None:
    """results.json, the pictures, and the lines that end a run."""
    parts = trainer.parts
    record = {"command": command, "seed": parts.config.seed, "step": trainer.step}
    record |= {"seconds": round(trainer.elapsed, 1), **memory_record(trainer.peaks)}
    record |= {**result.record(), "machine": machine()}
    (parts.run_dir / "results.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    if trainer.trainer.pictures:
        for path in _draw(trainer, result):
            parts.tracker.picture(trainer.step, path.stem, path)
    minutes = trainer.elapsed / 60
    parts.progress.say(f"\n{trainer.step} steps in {minutes:.1f} minutes; everything is in {parts.run_dir}")
    parts.progress.say(result.text() + build.chance(parts.config.task))


def _draw(trainer: Trainer, result: Evaluation) -> list[Path]:
    parts, folder = trainer.parts, trainer.parts.run_dir / "pictures"
    task = parts.config.task
    rows = tracking.read(parts.run_dir / tracking.METRICS)
    steps = len(result.curve) - 1
    drawn = [
        pictures.learning_curve(rows, result.metric, folder / "learning_curve.png"),
        pictures.episode(trainer.evaluated, parts.sources["test"].sample(0), steps, folder / "episode.png"),
    ]
    if result.axis:
        baseline = None
        if isinstance(task, LinearRegressionConfig) and task.noise == 0 and result.axis == "context length":
            # Least squares of minimum norm from n noiseless points of dimension d leaves d - n of the variance d.
            baseline = [max(0.0, task.dim - n) for n in range(len(result.curve))]
        drawn.append(pictures.inner_curve(result, folder / "inner_curve.png", baseline))
    return drawn


def _checkpoint(settings: Config, run_dir: Path) -> tuple[Path, dict] | None:
    """Where to go on from: None for a run that begins.

    Raises:
        errors.UserError: nothing readable there, another configuration, or a run that would overwrite an older one.
    """
    saved = checkpoint.saved(run_dir)
    wanted = settings.trainer.resume or (launch.is_queued() and bool(saved))
    goes_on = wanted is True or (bool(wanted) and checkpoint.belongs(Path(str(wanted)), run_dir))
    if not (goes_on and saved):
        folder.check_unused(run_dir)
    if not wanted:
        return None
    found = checkpoint.newest(run_dir, _warn) if wanted is True else checkpoint.find(Path(str(wanted)), _warn)
    if found is None:
        _warn(f"{run_dir} holds no checkpoint: starting at step 0")
        return None
    resume.check_same(settings, found[1]["config"], found[0])
    return found


def _validated(run_dir: Path) -> int:
    """The last step whose validation is among the kept metrics; -1: none."""
    rows = tracking.read(run_dir / tracking.METRICS)
    return max((row["step"] for row in rows if any(key.startswith("val/") for key in row)), default=-1)


def objective(run_dir: Path) -> float:
    """What a sweep optimises: the figure of the last validation, a mean squared error that is not finite as infinity;
    NaN where there was none."""
    rows = tracking.read(run_dir / tracking.METRICS)
    found = next((row[key] for row in reversed(rows) for key in VALIDATION if key in row), math.nan)
    return math.inf if found is None else found


def check_sweep(settings: Config, sweeper: DictConfig) -> None:
    """Refuse a search that has nothing to optimise, or goes the wrong way.

    Raises:
        errors.UserError: with what is needed.
    """
    if "direction" not in sweeper:
        return
    if settings.trainer.val_every == 0:
        raise errors.UserError("trainer.val_every=0: a sweep optimises the last validation: needed is at least 1")
    needed = "maximize" if isinstance(settings.task, FewShotConfig) else "minimize"
    if sweeper.direction != needed:
        raise errors.UserError(f"hydra.sweeper.direction={sweeper.direction}: task={settings.task.name} needs {needed}")


def _warn(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@hydra.main(version_base="1.3", config_path=store.CONFIG_DIR, config_name="train")
def entry(cfg: DictConfig) -> float:
    """Hydra's entry point; returns the last validation, so that a sweeper can optimise it. It never sees the test."""
    hydra_config = HydraConfig.get()
    settings = store.to_object(cfg)
    check_sweep(settings, hydra_config.sweeper)
    with (
        ending_sweep(hydra_config.mode is RunMode.MULTIRUN),
        processes.joined(settings.trainer.device, settings.trainer.process_timeout) as ranks,
    ):
        run_dir = processes.directory(ranks, hydra_config.runtime.output_dir)
        train(settings, run_dir, list(hydra_config.overrides.task), ranks)
        return objective(run_dir)


def main() -> None:
    store.register()
    launch.quiet_others()
    errors.run(entry, PROGRAM)


if __name__ == "__main__":
    # By its own name: a launcher pickles the entry point, and that of `__main__` with all that it reads, torch.ops too.
    from experiments import train as importable

    importable.main()
