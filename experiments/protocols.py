"""Evaluations beside random episodes.

`one_shot` is Omniglot's official test (Lake, Salakhutdinov and Tenenbaum 2015): 20 runs, each of 20 characters of one
evaluation alphabet, drawn once by one person, and 20 drawings of the same characters by another to be named. It is for
learners trained on the background alphabets; the classes of `vinyals` are drawn from all alphabets, and a learner
trained on them has seen the test.

Its figure is the share of wrong answers of 400, with Wilson's 95 % interval (Wilson, "Probable inference, the law of
succession, and statistical inference", JASA 1927; Brown, Cai and DasGupta, "Interval estimation for a binomial
proportion", Statistical Science 2001, recommend it): mean +- 1.96 s / sqrt(n) would have no width at no errors. It
takes the answers as independent; those of one run share their drawers, so that the errors of each run are reported too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from experiments.config import Config, OmniglotConfig, ProtocolKind, TaskConfig
from experiments.errors import NonFiniteError, UserError, nearest
from experiments.evaluation import Z_95, Copies, curves
from experiments.learners import Learner, takes_steps
from theria.data import Episode
from theria.meta.distributed import ALONE, Processes

ONE_SHOT = ProtocolKind.one_shot.value
TRAIN_ON = ("train", "trainval")
FURTHER = (ONE_SHOT,)  # what trainer.protocols may name
WAYS = 20
SEEN = {"vinyals": "its classes are drawn from all alphabets, those of the test among them"}


@dataclass(frozen=True)
class OneShot:
    """Errors in the official one-shot test.

    Attributes:
        wrong: the number of wrong answers of each run.
        answers: the number of answers in a run.
        copies: the number of copies of each task that were averaged.
    """

    wrong: tuple[int, ...]
    answers: int
    copies: int = 1

    @property
    def trials(self) -> int:
        return len(self.wrong) * self.answers

    @property
    def figure(self) -> float:
        """The share of wrong answers."""
        return sum(self.wrong) / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the share."""
        return wilson(sum(self.wrong), self.trials)

    def text(self) -> str:
        """One line: the error and its interval."""
        low, high = self.interval
        averaged = f", {self.copies} copies of each task averaged" if self.copies > 1 else ""
        return (
            f"one-shot error {100 * self.figure:.2f} % (95 % interval {100 * low:.2f} to {100 * high:.2f}, "
            f"{sum(self.wrong)} of {self.trials} in {len(self.wrong)} runs{averaged})"
        )

    def scalars(self) -> dict[str, float]:
        """For the tracker."""
        low, high = self.interval
        return {"test/one_shot_error": self.figure, "test/one_shot_low": low, "test/one_shot_high": high}

    def record(self) -> dict:
        """As JSON values."""
        low, high = self.interval
        return {
            "protocol": ONE_SHOT,
            "error": self.figure,
            "error_low": low,
            "error_high": high,
            "interval": "Wilson, 95 %",
            "wrong": sum(self.wrong),
            "trials": self.trials,
            "run_errors": [wrong / self.answers for wrong in self.wrong],
            "test_augment": self.copies,
        }


def wilson(k: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of which k of n trials were seen: the shares p with |k/n - p| <= z sd(p)."""
    z, p = Z_95, k / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return (0.0 if k == 0 else low), (1.0 if k == n else high)  # exact there, and rounded otherwise


class FixedTasks:
    """A task source that has the same tasks at every step, all of them: what is drawn for a batch, the deformations of
    its copies, then belongs to these tasks and depends on no setting."""

    def __init__(self, episode: Episode) -> None:
        self.episode = episode

    def sample(self, step: int) -> Episode:
        """The tasks; `step` changes nothing."""
        return self.episode


def check_one_shot(task: TaskConfig) -> OmniglotConfig:
    """The task, if it may have the official test.

    Raises:
        UserError: another task than Omniglot, or a split that has the test's alphabets in its training set.
    """
    if not isinstance(task, OmniglotConfig):
        raise UserError(f"task={task.name}: the one_shot protocol is of task=omniglot")
    if task.split in SEEN:
        raise UserError(
            f"task.split={task.split}: the one_shot protocol tests on alphabets never trained on, and "
            f"{SEEN[task.split]}: train with task.split=background, small1 or small2"
        )
    return task


def check(config: Config) -> None:
    """Refuse final evaluations that the run cannot have.

    Raises:
        UserError: a protocol that there is not or that is not for the task; validation on classes that are trained on.
    """
    for name in config.trainer.protocols:
        if name not in FURTHER:
            raise UserError(f"trainer.protocols=[{name}]: there is no such protocol; {nearest(name, FURTHER)}")
        check_one_shot(config.task)
    task = config.task
    if isinstance(task, OmniglotConfig):
        if task.train_on not in TRAIN_ON:
            raise UserError(f"task.train_on={task.train_on}: {nearest(task.train_on, TRAIN_ON)}")
        if task.train_on != TRAIN_ON[0] and config.trainer.val_every:
            raise UserError(
                f"task.train_on={task.train_on}: the validation classes are trained on, so that a validation would "
                "measure nothing, and the test classes are for the end: choose every setting with task.train_on=train, "
                "then give trainer.val_every=0"
            )


def one_shot(
    learner: Learner,
    runs: FixedTasks,
    *,
    steps: int,
    alive: Callable[[], None],
    copies: Copies | None = None,
    processes: Processes = ALONE,
) -> OneShot:
    """The learner, of 20 ways and in evaluation mode, in the official test. The arguments are those of `evaluate`.

    Raises:
        NonFiniteError: a prediction is not finite.
    """
    number, answers = runs.episode.query_y.shape
    shares, _ = curves(learner, runs, episodes=number, steps=steps, alive=alive, copies=copies, processes=processes)
    lost = int((~shares[-1].isfinite()).sum())
    if lost:
        after = f" after {steps} inner steps" if takes_steps(learner) else ""
        raise NonFiniteError(
            f"the one-shot test: {lost} of {number} runs have predictions that are not finite{after}, so that there is "
            "no figure: lower the inner rate or the inner steps"
        )
    wrong = tuple(round(answers * (1 - share)) for share in shares[-1].tolist())
    return OneShot(wrong, answers, 1 if copies is None else copies.number)
