"""Going on where a run stopped: which differences of the configuration are harmless, and the command that does it."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from experiments import launch
from experiments.config import Config, Schedule
from experiments.errors import UserError
from experiments.reads import unread
from experiments.store import complete, container

# What decides no parameter: it may differ between the parts of a resumed run.
FREE = {
    "name",
    "run_dir",
    "task.root",
    "task.download",
    "inner.eval_steps",
    "trainer.resume",
    "trainer.max_minutes",
    "trainer.threads",
    "trainer.device",  # to rounding, as all that follow with this remark
    "ops.backend",  # to rounding: what the other machine can run
    "learner.chunk_size",  # to rounding: what fits into its memory
    "trainer.capture",  # to rounding, as another number of processes
    "trainer.compile",  # to rounding
    "trainer.log_every",
    "trainer.health_every",
    "trainer.health_share",
    "trainer.val_every",
    "trainer.val_episodes",
    "trainer.test_episodes",
    "trainer.test_augment",
    "trainer.protocols",
    "trainer.eval_tasks",
    "trainer.checkpoint_every",
    "trainer.checkpoint_minutes",
    "trainer.keep",
    "trainer.pictures",
    "trainer.process_timeout",
    "trainer.display",
    "debug.nan_step",
    "debug.nan_task",
    "debug.step_seconds",
}


def check_same(config: Config, saved: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to go on under settings that would have led elsewhere.

    A setting that is younger than the checkpoint had, when it was written, the effect of its default in the schema; one
    that the run does not read has none.

    Raises:
        UserError: with every setting that differs, its value in the checkpoint and now.
    """
    free = FREE | unread(config) | ({"trainer.steps"} if config.trainer.schedule is Schedule.constant else set())
    now, before = _flat(container(config)), _flat(complete(saved))
    differ = [
        f"{key}: {before.get(key, 'absent')} in the checkpoint, {now.get(key, 'absent')} now"
        for key in sorted(now.keys() | before.keys())
        if now.get(key) != before.get(key) and key not in free and not key.startswith("tracking.")
    ]
    if differ:
        raise UserError(
            f"{checkpoint} belongs to another configuration, so the run cannot be continued from it:\n  "
            + "\n  ".join(differ)
            + "\nGive the settings of the checkpoint, or start a new run without trainer.resume."
        )


def command(overrides: Sequence[str], run_dir: Path) -> str:
    """What to type to go on, with as many processes as now."""
    return f"{whole(overrides)} {shlex.join([f'run_dir={quoted(run_dir)}', 'trainer.resume=true'])}"


def evaluation(run_dir: Path) -> str:
    """What to type to evaluate a run again."""
    return shlex.join(["python", "-m", "experiments.evaluate", f"checkpoint={quoted(run_dir)}"])


def quoted(path: Path) -> str:
    """A path as the value of one of Hydra's overrides, whose grammar has a meaning for most signs."""
    value = str(path)
    if re.fullmatch(r"[\w.-]*(/[\w.-]*)+", value, re.ASCII):
        return value
    return QuotedString(value, Quote.single).with_quotes()


def whole(overrides: Sequence[str]) -> str:
    """What to type to have the same run from the start."""
    kept = [item for item in overrides if item.split("=")[0].lstrip("+") not in ("run_dir", "trainer.resume", "sweep")]
    return shlex.join([*launch.command("experiments.train"), *kept])


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {key: value for name in values for key, value in _flat(values[name], f"{prefix}{name}.").items()}
