"""Held-out figures with their 95 % confidence intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from experiments.errors import NonFiniteError
from experiments.learners import Learner, sequence, takes_steps
from experiments.tracking import json_value
from theria.data import Augment, Episode, TaskSource
from theria.data.classes import SYMMETRIES, symmetry
from theria.data.draws import Draws
from theria.meta.distributed import ALONE, Processes
from theria.nn import InContextRegressor

Z_95 = 1.96  # the normal distribution's 97.5 % quantile, as few-shot papers round it


@dataclass(frozen=True)
class Estimate:
    """A mean over n episodes with the half width of its 95 % confidence interval."""

    mean: float
    half_width: float
    n: int

    def text(self, percent: bool) -> str:
        """'97.31 % ± 0.24' for a share, '0.3942 ± 0.0310' otherwise."""
        if percent:
            return f"{100 * self.mean:.2f} % ± {100 * self.half_width:.2f}"
        return f"{self.mean:.4g} ± {self.half_width:.2g}"


@dataclass(frozen=True)
class Evaluation:
    """Figures on one subset. `curve` holds an estimate a point of `axis`; its last point is the result.

    `copies` is the number of copies of each task that were averaged, `protocols` the records of further evaluations,
    `lost` the number of episodes, point by point, with a prediction that is not finite: each counts as wrong
    throughout, and leaves no mean squared error.
    """

    subset: str
    metric: str  # "accuracy" or "mse"
    axis: str  # what the curve runs over: "inner steps", "context length" or ""
    curve: list[Estimate]
    copies: int = 1
    protocols: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: tuple[int, ...] = ()

    @property
    def after(self) -> Estimate:
        return self.curve[-1]

    @property
    def figure(self) -> float:
        """The result as one number."""
        return self.after.mean

    @property
    def before(self) -> Estimate | None:
        """Without adaptation, or with an empty context; None where the network has no such state."""
        return self.curve[0] if self.axis else None

    def text(self) -> str:
        """One line: the result, its interval and the figure without adaptation."""
        percent = self.metric == "accuracy"
        averaged = f", {self.copies} copies of each averaged" if self.copies > 1 else ""
        interval = f"(95 % interval, {self.after.n} episodes{averaged})"
        line = f"{self.subset} {self.metric} {self.after.text(percent)} {interval}"
        if self.before is None:
            return line
        without = "without adaptation" if self.axis == "inner steps" else "with no context"
        return f"{line}; {without} {self.before.text(percent)}"

    def nonfinite(self) -> str:
        """How many episodes have a prediction that is not finite, and where; "" for none."""
        points = [i for i, count in enumerate(self.lost) if count]
        if not points:
            return ""
        where = f" at {self.axis} {', '.join(map(str, points))}" if self.axis else ""
        return f"{max(self.lost)} of {self.after.n} episodes have predictions that are not finite{where}"

    def require_finite(self, advice: str) -> "Evaluation":
        """Itself, if it is a figure to report.

        Raises:
            NonFiniteError: a prediction is not finite, at whatever point of the curve; with `advice`.
        """
        if self.nonfinite():
            raise NonFiniteError(f"{self.subset}: {self.nonfinite()}, so that there is no figure.\n{advice}")
        return self

    def scalars(self) -> dict[str, float]:
        """For the tracker: the figures of the subset, and the curve under `inner/`."""
        name = f"{self.subset}/{self.metric}"
        values = {name: self.after.mean, f"{name}_ci95": self.after.half_width}
        if any(self.lost):
            values[f"{self.subset}/nonfinite"] = max(self.lost)
        if self.before is not None:
            values[f"{name}_before"] = self.before.mean
            points = {f"inner/{self.subset}_{self.metric}_{i}": point.mean for i, point in enumerate(self.curve)}
            values |= points
        return values

    def record(self) -> dict:
        """As JSON values; an infinite interval, that of one episode, is null."""
        values = {
            "subset": self.subset,
            "metric": self.metric,
            "axis": self.axis,
            "mean": self.after.mean,
            "ci95": self.after.half_width,
            "episodes": self.after.n,
            "before": self.before.mean if self.before else None,
            "before_ci95": self.before.half_width if self.before else None,
            "curve": [estimate.mean for estimate in self.curve],
            "curve_ci95": [estimate.half_width for estimate in self.curve],
            "test_augment": self.copies,
        }
        return {key: json_value(value) for key, value in values.items()} | self.protocols


@dataclass(frozen=True)
class Copies:
    """A task and deformed copies of it, over whose predictions the mean is taken.

    Attributes:
        augment: how a copy is deformed: every image of it, support and queries, by draws of its own.
        number: of copies, the task as it is among them.
        seed: with the number of the batch and of the copy, determines the deformations.
        symmetries: the copies also go through the eight symmetries of the square, each whole task under one of them,
            for a network that was trained on classes under all eight.
    """

    augment: Augment
    number: int
    seed: int
    symmetries: bool = False

    def of(self, episode: Episode, batch: int) -> list[Episode]:
        """The episode, and `number` - 1 deformed copies of it."""
        return [episode, *(self._deformed(episode, batch, i) for i in range(1, self.number))]

    def _deformed(self, episode: Episode, batch: int, copy: int) -> Episode:
        draws = Draws(self.seed, batch * self.number + copy)
        turn = copy % SYMMETRIES if self.symmetries else 0
        support_x, query_x = (
            symmetry(self.augment(x.flatten(0, 1), draws), turn).reshape(x.shape)
            for x in (episode.support_x, episode.query_x)
        )
        return episode._replace(support_x=support_x, query_x=query_x)


def estimate(values: Tensor) -> Estimate:
    """mean ± 1.96 s / sqrt(n) of (n,) values, s the sample standard deviation; one value has an infinite interval."""
    values, n = values.double(), values.numel()
    half_width = Z_95 * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(float(values.mean()), half_width, n)


def task_metric(prediction: Tensor, target: Tensor) -> Tensor:
    """(T,) figure of each task: accuracy for integer targets (T, Q), mean squared error for real ones (T, Q, 1).

    It is not finite where a prediction is not: the largest entry of NaN would be the first class.
    """
    if target.is_floating_point():
        return (prediction - target).square().flatten(1).mean(1)
    right = (prediction.argmax(-1) == target).double().mean(1)
    return right.where(prediction.isfinite().flatten(1).all(1), math.nan)


def metric_name(episode: Episode) -> str:
    return "mse" if episode.query_y.is_floating_point() else "accuracy"


def curve_axis(learner: Learner) -> str:
    if takes_steps(learner):
        return "inner steps"
    return "context length" if isinstance(learner.model, InContextRegressor) and learner.model.causal else ""


def task_curve(learner: Learner, copies: Sequence[Episode], steps: int) -> Tensor:
    """(P, T) figure of each task at every point of the learner's curve: after 0 to `steps` inner steps, after each
    length of the context, or the one figure there is. `copies`: the episode and its deformed copies, if any."""
    axis, episode = curve_axis(learner), copies[0]
    if axis == "context length":
        x, y = sequence(episode)
        return (learner.model.prefixes(x, y) - y).square().flatten(2).mean(2).T  # pyright: ignore
    return torch.stack([task_metric(point, episode.query_y) for point in mean_predictions(learner, copies, steps)])


def predict(learner: Learner, episode: Episode, steps: int) -> Tensor:
    """Predictions of the queries after `steps` inner steps, where the learner takes any."""
    return learner.predict(episode, steps=steps) if takes_steps(learner) else learner.predict(episode)  # pyright: ignore


def predictions(learner: Learner, episode: Episode, steps: int) -> Tensor:
    """(P, T, Q, ...) predictions of the queries after 0 to `steps` inner steps; the one there is, without any."""
    if takes_steps(learner):
        return learner.predict_trajectory(episode, steps=steps)  # pyright: ignore
    return predict(learner, episode, steps).unsqueeze(0)


def mean_predictions(learner: Learner, copies: Sequence[Episode], steps: int) -> Tensor:
    """`predictions`: of one copy its logits, of several the mean log-probability of each class, so that each has the
    same say.

    The answer is that of the mean logits, which differ from it by one number a query.
    """
    if len(copies) == 1:
        return predictions(learner, copies[0], steps)
    total = sum(predictions(learner, copy, steps).log_softmax(-1) for copy in copies)
    return total / len(copies)  # pyright: ignore[reportReturnType]


def curves(
    learner: Learner,
    source: TaskSource,
    *,
    episodes: int,
    steps: int,
    alive: Callable[[], None],
    copies: Copies | None = None,
    processes: Processes = ALONE,
) -> tuple[Tensor, str]:
    """(P, n) figures of the first n = `episodes` tasks of a source at each point of the curve, and what they are.

    Each batch is computed whole by one process, so that the figures do not depend on their number.
    """
    batches, count, metric = [], 0, ""
    with torch.no_grad():
        while count < episodes:
            alive()
            batch = len(batches) + processes.rank
            episode = source.sample(batch)
            tasks = [episode] if copies is None else copies.of(episode, batch)
            batches += processes.gather(task_curve(learner, tasks, steps).cpu())
            count, metric = sum(batch.shape[1] for batch in batches), metric_name(episode)
    return torch.cat(batches, 1)[:, :episodes], metric


def evaluate(
    learner: Learner,
    source: TaskSource,
    *,
    episodes: int,
    steps: int,
    subset: str,
    alive: Callable[[], None],
    copies: Copies | None = None,
    processes: Processes = ALONE,
) -> Evaluation:
    """The learner on the first `episodes` tasks of a source. `alive` is called between batches and may raise;
    `copies`: average the predictions over deformed copies of each task."""
    curve, metric = curves(
        learner, source, episodes=episodes, steps=steps, alive=alive, copies=copies, processes=processes
    )
    lost = tuple((~curve.isfinite()).sum(1).tolist())
    points = [estimate(point) for point in (curve.nan_to_num(0.0) if metric == "accuracy" else curve)]
    number = 1 if copies is None else copies.number
    return Evaluation(subset, metric, curve_axis(learner), points, number, lost=lost)
