"""Evaluate a checkpoint on held-out tasks.

python -m experiments.evaluate checkpoint=outputs/default/<date_time> episodes=2000 subset=test
torchrun --nproc-per-node=4 -m experiments.evaluate ...    the same figures, the episodes shared by four processes
"""

import json
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments import build, checkpoint, errors, launch, processes, store
from experiments.config import EvaluateConfig, OmniglotConfig
from experiments.evaluation import Evaluation, evaluate
from theria.meta.distributed import ALONE, Processes

TIMEOUT = 600.0  # seconds that a process waits for another


def evaluate_checkpoint(settings: EvaluateConfig, run_dir: Path, ranks: Processes = ALONE) -> Evaluation:
    """Rebuild the learner from its checkpoint, evaluate it, write `run_dir`/evaluation.json.

    Raises:
        errors.UserError: no readable checkpoint, or settings that its run cannot be evaluated with.
    """
    if settings.episodes < 1 or settings.tasks < 1:
        raise errors.UserError(f"episodes={settings.episodes}, tasks={settings.tasks}: both must be at least 1")
    if settings.inner_steps is not None and settings.inner_steps < 0:
        raise errors.UserError(f"inner_steps={settings.inner_steps}: needed is at least 0, or null for the run's own")
    build.check_seed(settings.seed)
    if not settings.checkpoint.strip():
        raise errors.UserError(errors.value_needed("checkpoint"))
    path, state = checkpoint.find(Path(settings.checkpoint))
    run = store.from_container(state["config"])
    run.trainer.device = settings.device
    if settings.root is not None and isinstance(run.task, OmniglotConfig):
        run.task.root = settings.root
    source = build.build_source(run, settings.subset, tasks=settings.tasks, seed=settings.seed)
    learner = build.build_learner(run)
    learner.load_state_dict(state["learner"])
    learner.eval()
    steps = next(n for n in (settings.inner_steps, run.inner.eval_steps, run.inner.steps) if n is not None)
    result = evaluate(
        learner,
        source,
        episodes=settings.episodes,
        steps=steps,
        subset=settings.subset,
        alive=lambda: None,
        processes=ranks,
    )
    if ranks.is_first:
        print(f"{path}, step {state['step']}")
        print(result.text() + build.chance(run.task))
        record = {"checkpoint": str(path), "step": state["step"], **result.record()}
        (run_dir / "evaluation.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    return result


@hydra.main(version_base="1.3", config_path=store.CONFIG_DIR, config_name="evaluate")
def entry(cfg: DictConfig) -> float:
    """Hydra's entry point."""
    settings = store.to_object(cfg)
    with processes.joined(settings.device, TIMEOUT) as ranks:
        run_dir = processes.directory(ranks, HydraConfig.get().runtime.output_dir)
        return evaluate_checkpoint(settings, run_dir, ranks).after.mean


def main() -> None:
    store.register()
    launch.quiet_others()
    errors.run(entry)


if __name__ == "__main__":
    main()
