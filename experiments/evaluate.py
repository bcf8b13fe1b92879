"""Evaluate a checkpoint on held-out tasks.

python -m experiments.evaluate checkpoint=outputs/default/<date_time> episodes=2000 subset=test
python -m experiments.evaluate checkpoint=... protocol=one_shot             Omniglot's official within-alphabet test
python -m experiments.evaluate checkpoint=... ways=20 test_augment=16       other tasks, 16 copies of each averaged
python -m experiments.evaluate checkpoint=... distinct_characters=true      no character of Omniglot twice in a task
python -m experiments.evaluate checkpoint=outputs/mine ways=5 shots=5 run_dir=outputs/mine     written beside the run
torchrun --nproc-per-node=4 -m experiments.evaluate ...    the same figures, the episodes shared by four processes

Episodes are those of the run's own final evaluation unless seed=... or tasks=... is given: they are drawn tasks=... at
a time, so that another number draws other ones.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments import averaging, build, checkpoint, errors, launch, processes, protocols, store
from experiments.config import (
    AugmentConfig,
    Config,
    EvaluateConfig,
    FewShotConfig,
    OmniglotConfig,
    ProtocolKind,
    TaskConfig,
)
from experiments.evaluation import Copies, Evaluation, evaluate
from experiments.learners import Learner, takes_steps
from experiments.protocols import OneShot
from experiments.trainer import memory_record, peak_memory
from theria.meta.distributed import ALONE, Processes
from theria.testing.machine import machine

TIMEOUT = 600.0  # seconds that a process waits for another
EPISODES, SUBSET = 600, "test"


def evaluate_checkpoint(settings: EvaluateConfig, run_dir: Path, ranks: Processes = ALONE) -> Evaluation | OneShot:
    """Rebuild the learner from its checkpoint, evaluate it, write `run_dir`/evaluation_<tasks>.json.

    <tasks> is one_shot, or such as test_5w1s, or test_5w1s_distinct of distinct characters; a number follows where
    there is that file already: none is overwritten.

    Raises:
        errors.UserError: no readable checkpoint, or settings that its run cannot be evaluated with.
        errors.NonFiniteError: a prediction is not finite.
    """
    begun = time.monotonic()
    check(settings)
    path, state = checkpoint.find(Path(settings.checkpoint))
    run = run_of(settings, state["config"])
    copies = build.build_copies(run, settings.test_augment, settings.seed)
    learned = averaging.evaluated(state)
    result = _one_shot if settings.protocol is ProtocolKind.one_shot else _episodes
    figures, learner = result(settings, run, learned, copies, ranks)
    if ranks.is_first:
        print(f"{path}, step {state['step']}")
        print(figures.text() + (build.chance(task_of(settings, run)) if isinstance(figures, Evaluation) else ""))
        record = {"checkpoint": str(path), "step": state["step"], **_tasks(settings, run)}
        record["inner_steps"] = run.inner.evaluated_steps if takes_steps(learner) else None
        record |= {"seconds": round(time.monotonic() - begun, 1), **memory_record(peak_memory(build.device(run)))}
        record |= {**figures.record(), "machine": machine()}
        print(f"written to {_write(run_dir, record)}")
    return figures


def _tasks(settings: EvaluateConfig, run: Config) -> dict[str, Any]:
    """What is evaluated, as JSON values."""
    task, official = run.task, settings.protocol is ProtocolKind.one_shot
    if official:
        ways, shots = protocols.WAYS, 1
    else:
        task = task_of(settings, run)
        ways, shots = task.ways if isinstance(task, FewShotConfig) else None, getattr(task, "shots", None)
    return {
        "protocol": settings.protocol.value,
        "task": task.name,
        "ways": ways,
        "shots": shots,
        "distinct_characters": settings.distinct_characters,
        "queries": 1 if official else task.queries,
        "seed": run.seed if settings.seed is None else settings.seed,
        "tasks": tasks_of(settings, run),
    }


def _write(run_dir: Path, record: dict[str, Any]) -> Path:
    """A new file, named after the tasks: others may be written at the same time."""
    name = "one_shot"
    if record["protocol"] != name:
        ways = "" if record["ways"] is None else f"{record['ways']}w"
        distinct = "_distinct" if record["distinct_characters"] else ""
        name = f"{record['subset']}_{ways}{record['shots']}s{distinct}"
    path, number = run_dir / f"evaluation_{name}.json", 1
    while True:
        try:
            with path.open("x") as file:
                file.write(json.dumps(record, indent=2, allow_nan=False) + "\n")
            return path
        except FileExistsError:
            number += 1
            path = run_dir / f"evaluation_{name}_{number}.json"


def check(settings: EvaluateConfig) -> None:
    """Refuse values outside their range, and those that the protocol would ignore."""
    counts = {"episodes": settings.episodes, "tasks": settings.tasks, "test_augment": settings.test_augment}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise errors.UserError(f"{name}={value}: needed is at least 1")
    if settings.inner_steps is not None and settings.inner_steps < 0:
        raise errors.UserError(f"inner_steps={settings.inner_steps}: needed is at least 0, or null for the run's own")
    build.check_seed(settings.seed)
    build.device_named(settings.device, "device")
    drawn: dict[str, Any] = {name: getattr(settings, name) for name in ("episodes", "subset", "ways", "shots")}
    drawn["distinct_characters"] = "true" if settings.distinct_characters else None
    given = ", ".join(f"{name}={value}" for name, value in drawn.items() if value is not None)
    if settings.protocol is ProtocolKind.one_shot and given:
        raise errors.UserError(
            f"{given}: protocol=one_shot has the tasks of the official test, 20 runs of {protocols.WAYS} ways and one "
            "shot: needed is the default, or protocol=episodes"
        )
    if not settings.checkpoint.strip():
        raise errors.UserError(errors.value_needed("checkpoint"))


def run_of(settings: EvaluateConfig, saved: dict[str, Any]) -> Config:
    """The run's configuration with what the evaluation has otherwise. Its training, and what follows it, is over.

    Raises:
        errors.UserError: a folder of images for tasks that have none.
    """
    run = store.from_container(saved)
    run.trainer.device, run.trainer.protocols = settings.device, []
    if settings.root is not None:
        if not isinstance(run.task, OmniglotConfig):
            raise errors.UserError(f"root={settings.root}: task={run.task.name} reads no folder: needed is null")
        run.task.root = settings.root
    if settings.inner_steps is not None:
        run.inner.eval_steps = settings.inner_steps
    return run


def task_of(settings: EvaluateConfig, run: Config) -> TaskConfig:
    """The run's tasks, with other sizes where they are given and images as they are."""
    if settings.subset == "val" and getattr(run.task, "train_on", "train") != "train":
        raise errors.UserError("subset=val: the run was trained on it too (task.train_on=trainval): needed is test")
    if settings.ways is not None and not isinstance(run.task, FewShotConfig):
        raise errors.UserError(f"ways={settings.ways}: task={run.task.name} has no classes: needed is null")
    sizes = {"ways": settings.ways, "shots": settings.shots}
    changes: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    if isinstance(run.task, FewShotConfig):
        changes["augment"] = AugmentConfig()  # of the training only, also when its classes are evaluated
    return replace(run.task, **changes)


def tasks_of(settings: EvaluateConfig, run: Config) -> int:
    """The number of tasks evaluated at once, which decides the draws."""
    return run.trainer.eval_tasks if settings.tasks is None else settings.tasks


def check_enough(settings: EvaluateConfig, run: Config, subset: str) -> None:
    """Refuse more shots than there are images, in the settings of an evaluation.

    Raises:
        errors.UserError: with the most that there are.
    """
    task = run.task
    if not isinstance(task, FewShotConfig) or settings.shots is None or subset not in build.SUBSETS:
        return
    most = int(build.build_dataset(task, subset).counts.min()) - task.queries
    if settings.shots > most:
        raise errors.UserError(
            f"shots={settings.shots}: needed is at most {most}: a class of subset={subset} has {most + task.queries} "
            f"images, and the run's task.queries={task.queries} of them are asked for"
        )


def _episodes(
    settings: EvaluateConfig, run: Config, learned: dict[str, Any], copies: Copies | None, ranks: Processes
) -> tuple[Evaluation, Learner]:
    """Random tasks of a subset, and the learner that was given them."""
    task = task_of(settings, run)
    subset = SUBSET if settings.subset is None else settings.subset
    distinct = settings.distinct_characters
    drawn: dict[str, Any] = {"tasks": tasks_of(settings, run), "seed": settings.seed, "distinct_characters": distinct}
    try:
        source = build.build_source(replace(run, task=task), subset, **drawn)
    except errors.UserError:
        check_enough(settings, run, subset)
        raise
    learner = _learner(settings, run, learned, task.ways if isinstance(task, FewShotConfig) else None)
    episodes = EPISODES if settings.episodes is None else settings.episodes
    options = {"episodes": episodes, "subset": subset, "copies": copies, **_options(run, ranks)}
    advice = "Lower the inner steps, inner_steps=..., or train with a lower inner.lr"
    return evaluate(learner, source, **options).require_finite(advice), learner


def _one_shot(
    settings: EvaluateConfig, run: Config, learned: dict[str, Any], copies: Copies | None, ranks: Processes
) -> tuple[OneShot, Learner]:
    """Omniglot's official test, and the learner that was given it."""
    runs = build.build_one_shot(run)
    learner = _learner(settings, run, learned, protocols.WAYS)
    return protocols.one_shot(learner, runs, copies=copies, **_options(run, ranks)), learner


def _learner(settings: EvaluateConfig, run: Config, learned: dict[str, Any], ways: int | None) -> Learner:
    """The run's learner with its parameters, for tasks of so many ways."""
    if ways is not None:
        learner = build.for_ways(run, learned, ways)
    else:
        learner = build.build_learner(run)
        learner.load_state_dict(learned)
    if settings.inner_steps is not None and not takes_steps(learner):
        kind = run.learner.kind.value
        raise errors.UserError(
            f"inner_steps={settings.inner_steps}: learner={kind} takes no inner steps: needed is null"
        )
    return learner.eval()


def _options(run: Config, ranks: Processes) -> dict[str, Any]:
    return {"steps": run.inner.evaluated_steps, "alive": lambda: None, "processes": ranks}


@hydra.main(version_base="1.3", config_path=store.CONFIG_DIR, config_name="evaluate")
def entry(cfg: DictConfig) -> float:
    """Hydra's entry point."""
    settings = store.to_object(cfg)
    with processes.joined(settings.device, TIMEOUT) as ranks:
        run_dir = processes.directory(ranks, HydraConfig.get().runtime.output_dir)
        return evaluate_checkpoint(settings, run_dir, ranks).figure


def main() -> None:
    store.register()
    launch.quiet_others()
    errors.run(entry)


if __name__ == "__main__":
    main()
