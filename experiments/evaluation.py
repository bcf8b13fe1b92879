"""Held-out figures with their 95 % confidence intervals."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.learners import Learner, sequence, takes_steps
from experiments.tracking import json_value
from theria.data import Episode, TaskSource
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
    """Figures on one subset. `curve` holds an estimate a point of `axis`; its last point is the result."""

    subset: str
    metric: str  # "accuracy" or "mse"
    axis: str  # what the curve runs over: "inner steps", "context length" or ""
    curve: list[Estimate]

    @property
    def after(self) -> Estimate:
        return self.curve[-1]

    @property
    def before(self) -> Estimate | None:
        """Without adaptation, or with an empty context; None where the network has no such state."""
        return self.curve[0] if self.axis else None

    def text(self) -> str:
        """One line: the result, its interval and the figure without adaptation."""
        percent = self.metric == "accuracy"
        line = f"{self.subset} {self.metric} {self.after.text(percent)} (95 % interval, {self.after.n} episodes)"
        if self.before is None:
            return line
        without = "without adaptation" if self.axis == "inner steps" else "with no context"
        return f"{line}; {without} {self.before.text(percent)}"

    def scalars(self) -> dict[str, float]:
        """For the tracker: the figures of the subset, and the curve under `inner/`."""
        name = f"{self.subset}/{self.metric}"
        values = {name: self.after.mean, f"{name}_ci95": self.after.half_width}
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
        }
        return {key: json_value(value) for key, value in values.items()}


def estimate(values: Tensor) -> Estimate:
    """mean ± 1.96 s / sqrt(n) of (n,) values, s the sample standard deviation; one value has an infinite interval."""
    values, n = values.double(), values.numel()
    half_width = Z_95 * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(float(values.mean()), half_width, n)


def task_metric(prediction: Tensor, target: Tensor) -> Tensor:
    """(T,) figure of each task: accuracy for integer targets (T, Q), mean squared error for real ones (T, Q, 1)."""
    if target.is_floating_point():
        return (prediction - target).square().flatten(1).mean(1)
    return (prediction.argmax(-1) == target).double().mean(1)


def metric_name(episode: Episode) -> str:
    return "mse" if episode.query_y.is_floating_point() else "accuracy"


def curve_axis(learner: Learner) -> str:
    if takes_steps(learner):
        return "inner steps"
    return "context length" if isinstance(learner.model, InContextRegressor) and learner.model.causal else ""


def task_curve(learner: Learner, episode: Episode, steps: int) -> Tensor:
    """(P, T) figure of each task at every point of the learner's curve: after 0 to `steps` inner steps, after each
    length of the context, or the one figure there is."""
    axis = curve_axis(learner)
    if axis == "inner steps":
        predictions = [predict(learner, episode, step) for step in range(steps + 1)]
        return torch.stack([task_metric(prediction, episode.query_y) for prediction in predictions])
    if axis == "context length":
        x, y = sequence(episode)
        return (learner.model.prefixes(x, y) - y).square().flatten(2).mean(2).T  # pyright: ignore
    return task_metric(learner.predict(episode), episode.query_y)[None]


def predict(learner: Learner, episode: Episode, steps: int) -> Tensor:
    """Predictions of the queries after `steps` inner steps, where the learner takes any."""
    return learner.predict(episode, steps=steps) if takes_steps(learner) else learner.predict(episode)  # pyright: ignore


def evaluate(
    learner: Learner,
    source: TaskSource,
    *,
    episodes: int,
    steps: int,
    subset: str,
    alive: Callable[[], None],
    processes: Processes = ALONE,
) -> Evaluation:
    """The learner on the first `episodes` tasks of a source. `alive` is called between batches and may raise.

    Each batch is computed whole by one process, so that the figures do not depend on their number.
    """
    batches, count, metric = [], 0, ""
    with torch.no_grad():
        while count < episodes:
            alive()
            episode = source.sample(len(batches) + processes.rank)
            batches += processes.gather(task_curve(learner, episode, steps).cpu())
            count, metric = sum(batch.shape[1] for batch in batches), metric_name(episode)
    curve = torch.cat(batches, 1)[:, :episodes]
    return Evaluation(subset, metric, curve_axis(learner), [estimate(point) for point in curve])
