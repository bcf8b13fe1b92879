"""Pictures of a run: the learning curve, the inner curve, an episode with its predictions. Drawn without a screen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.evaluation import Evaluation, predict
from experiments.learners import Learner, takes_steps
from theria.data import Episode

RIGHT, WRONG = "#1a7f37", "#cf222e"


def _figure(columns: int, rows: int = 1, size: tuple[float, float] = (4.5, 3.4)) -> tuple[Any, Any]:
    """A figure of the object-oriented interface: no backend, no screen, no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def learning_curve(rows: Sequence[dict[str, Any]], metric: str, path: Path) -> Path:
    """Training loss, and the training and validation figure with its 95 % band, over the outer steps."""
    figure, axes = _figure(2)
    loss, score = axes[0]
    _line(loss, rows, "train/loss", "training")
    _line(score, rows, f"train/{metric}", "training classes")
    _line(score, rows, f"val/{metric}_before", "held-out classes, no adaptation", linestyle=":")
    held_out = [row for row in rows if row.get(f"val/{metric}") is not None]
    if held_out:
        steps, mean = [row["step"] for row in held_out], [row[f"val/{metric}"] for row in held_out]
        half = [row.get(f"val/{metric}_ci95") or 0.0 for row in held_out]
        low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        (line,) = score.plot(steps, mean, marker="o", markersize=3, label="held-out classes")
        score.fill_between(steps, low, high, alpha=0.3, color=line.get_color())
    for axis, name in ((loss, "query loss after adaptation"), (score, metric)):
        axis.set(xlabel="outer step", ylabel=name)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    return _save(figure, path)


def inner_curve(result: Evaluation, path: Path, baseline: Sequence[float] | None = None) -> Path:
    """The figure after each inner step or context length, with its 95 % interval; `baseline` a closed form to meet."""
    figure, axes = _figure(1)
    axis = axes[0, 0]
    mean, half = [point.mean for point in result.curve], [point.half_width for point in result.curve]
    axis.errorbar(range(len(mean)), mean, half, marker="o", markersize=3, capsize=2, label="learner")
    if baseline is not None:
        axis.plot(range(len(baseline)), baseline, linestyle="--", color="black", label="least squares")
        axis.legend(frameon=False)
    axis.set(xlabel=result.axis, ylabel=f"{result.subset} {result.metric}")
    return _save(figure, path)


def episode(learner: Learner, tasks: Episode, steps: int, path: Path) -> Path:
    """The first task of an episode: support set, queries, predictions."""
    first = Episode(*(field[:1] for field in tasks))
    with torch.no_grad():
        before = predict(learner, first, 0)[0].cpu() if takes_steps(learner) else None
        after = predict(learner, first, steps)[0].cpu()
    task = Episode(*(field[0].cpu() for field in first))
    if task.query_y.is_floating_point():
        return _regression(task, before, after, path)
    return _classification(task, after.argmax(-1), path)


def _classification(task: Episode, predicted: torch.Tensor, path: Path) -> Path:
    """One row a class: its support images, then its queries with the predicted class in green or red."""
    ways = int(task.support_y.max()) + 1
    shots, queries = len(task.support_y) // ways, len(task.query_y) // ways
    figure, axes = _figure(shots + queries, ways, size=(1.0, 1.15))
    for label in range(ways):
        support = task.support_x[task.support_y == label]
        mine = task.query_y == label
        for axis, image in zip(axes[label], [*support, *task.query_x[mine]], strict=True):
            axis.imshow(image.mean(0).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[label, 0].set_ylabel(f"class {label}", fontsize=8)
        for axis, guess in zip(axes[label, shots:], predicted[mine].tolist(), strict=True):
            axis.set_title(f"is {guess}", fontsize=8, color=RIGHT if guess == label else WRONG)
    right = float((predicted == task.query_y).double().mean())
    figure.suptitle(f"support | queries, {100 * right:.0f} % right", fontsize=9)
    return _save(figure, path)


def _regression(task: Episode, before: torch.Tensor | None, after: torch.Tensor, path: Path) -> Path:
    """Targets and predictions over x, or against each other where x has several entries."""
    figure, axes = _figure(1)
    axis = axes[0, 0]
    guesses = [("after", after)] if before is None else [("before adaptation", before), ("after", after)]
    if task.query_x.shape[-1] == 1:
        x = _list(task.query_x)
        axis.plot(_list(task.support_x), _list(task.support_y), "k^", label="support")
        axis.plot(x, _list(task.query_y), "ko", fillstyle="none", label="query")
        for name, guess in guesses:
            axis.plot(x, _list(guess), "x", label=name)
        axis.set(xlabel="x", ylabel="y")
    else:
        for name, guess in guesses:
            axis.plot(_list(task.query_y), _list(guess), "x", label=name)
        axis.axline((0, 0), slope=1, color="black", linewidth=0.5)
        axis.set(xlabel="target", ylabel="prediction")
    axis.legend(frameon=False)
    return _save(figure, path)


def _line(axis: Any, rows: Sequence[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, linewidth=1, **style)


def _list(values: torch.Tensor) -> list[float]:
    return values.flatten().tolist()


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
