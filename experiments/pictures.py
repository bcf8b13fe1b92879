"""Pictures of a run: learning curve, inner curve, an episode and its predictions, attention. Drawn without a screen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.attention_maps import QueryAttention
from experiments.evaluation import Evaluation, predict
from experiments.learners import Learner, takes_steps
from theria.data import Episode

RIGHT, WRONG = "#1a7f37", "#cf222e"
GAP = 4  # pixels between the images of an episode
HEADS = 8  # heads shown at most


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
    """One row a class: its support images, then its queries, framed green or, with the class taken instead, red."""
    from matplotlib.patches import Rectangle

    ways = int(task.support_y.max()) + 1
    shots, queries = len(task.support_y) // ways, len(task.query_y) // ways
    side = task.query_x.shape[-1] + GAP
    canvas = torch.zeros(ways * side, (shots + queries) * side + GAP)
    figure, axes = _figure(1, size=(0.5 * (shots + queries) + 0.6, 0.5 * ways + 0.5))
    axis = axes[0, 0]
    for label in range(ways):
        mine = task.query_y == label
        for column, image in enumerate([*task.support_x[task.support_y == label], *task.query_x[mine]]):
            left, top = column * side + (GAP if column >= shots else 0), label * side
            canvas[top : top + side - GAP, left : left + side - GAP] = image.mean(0)
        for column, guess in enumerate(predicted[mine].tolist(), start=shots):
            left, top = column * side + GAP, label * side
            color, width = (RIGHT, 0.7) if guess == label else (WRONG, 1.8)
            corner, size = (left - 1.5, top - 1.5), side - GAP + 2
            axis.add_patch(Rectangle(corner, size, size, fill=False, color=color, linewidth=width))
            if guess != label:
                axis.text(left, top + 5, str(guess), fontsize=7, color=color, weight="bold")
    axis.imshow(canvas.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xlim=(-GAP, canvas.shape[1] + 1), ylim=(canvas.shape[0] + 1, -GAP))
    axis.set_yticks([(label + 0.5) * side for label in range(ways)], [str(label) for label in range(ways)], fontsize=7)
    middles = [shots * side / 2, shots * side + GAP + queries * side / 2]
    axis.set_xticks(middles, ["support", "queries"], fontsize=7)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    right = float((predicted == task.query_y).double().mean())
    axis.set_title(f"{100 * right:.0f} % right; red: the class taken instead", fontsize=7)
    return _save(figure, path)


def attention(seen: QueryAttention, task: Episode, path: Path) -> Path:
    """Where the first query of a task looks: over the patches of its image, or over the support set or its classes."""
    if seen.over in ("support", "classes"):
        return _context_attention(seen, task, path)
    return _patch_attention(seen, task.query_x[0].mean(0).cpu(), path)


def _patch_attention(seen: QueryAttention, image: torch.Tensor, path: Path) -> Path:
    """A row a layer, a column a head; the image, its ink black, under a red as strong as the attention to a patch."""
    heads = min(len(seen.layers[0]), HEADS)
    keys = [weights[:heads, 1:] if seen.over == "cls" else weights[:heads] for weights in seen.layers]
    grid = round(keys[0].shape[-1] ** 0.5)
    even = 1 / seen.layers[0].shape[-1]
    most = max(float(weights.max()) for weights in keys)
    figure, axes = _figure(heads, len(keys), size=(1.1, 1.2))
    side = image.shape[-1]
    for row, weights in enumerate(keys):
        for head, axis in enumerate(axes[row]):
            place = (-0.5, side - 0.5, side - 0.5, -0.5)
            scale = {"vmin": 0, "vmax": max(most, 4 * even)}  # an even share everywhere stays pale
            axis.imshow(weights[head].view(grid, -1).numpy(), cmap="Reds", extent=place, **scale)
            axis.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1, alpha=0.7 * image.clamp(0, 1).numpy())
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"head {head}" if row == 0 else "", fontsize=7)
        axes[row, 0].set_ylabel(f"layer {row}", fontsize=7)
    figure.suptitle(f"most: {most / even:.1f} times an even share", fontsize=7)
    return _save(figure, path)


def _context_attention(seen: QueryAttention, task: Episode, path: Path) -> Path:
    """A row a layer and head, a column an example of the support set or a class; above it its image, and left of all
    the query's, where there are images."""
    weights = torch.cat(seen.layers)  # (layers * heads, M)
    columns, images = weights.shape[-1], not task.support_y.is_floating_point()
    figure, axes = _figure(1, 1 + images, size=(0.5 * columns + 1.2, 0.07 * len(weights) + 0.7))
    axis = axes[-1, 0]
    axis.imshow(weights.numpy(), cmap="Reds", aspect="auto", vmin=0, vmax=max(float(weights.max()), 4 / columns))
    heads, layers = len(seen.layers[0]), range(len(seen.layers))
    axis.set_yticks([(i + 0.5) * heads - 0.5 for i in layers], [f"layer {i}" for i in layers])
    axis.set_xlabel("the start token, then the support points", fontsize=7)
    if images:
        order = task.support_y.argsort(stable=True)[:: len(task.support_y) // columns]  # one of each class, or as is
        shown = order if seen.over == "classes" else torch.arange(columns)
        labels = [int(task.query_y[0]), *task.support_y[shown].tolist()]
        for column, image in enumerate([task.query_x[0], *task.support_x[shown]], start=-1):
            place = (column - 0.45, column + 0.45, 0, 1)
            axes[0, 0].imshow(image.mean(0).cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, extent=place, aspect="auto")
        axes[0, 0].set(xlim=(-1.5, columns - 0.5), ylim=(0, 1))
        axes[0, 0].axis("off")
        axis.set_xlim(-1.5, columns - 0.5)
        axis.set_xticks(range(-1, columns), [str(label) for label in labels])
        axis.set_xlabel("class; left the query", fontsize=7)
    axis.tick_params(length=0, labelsize=7)
    axis.spines[:].set_visible(False)
    figure.suptitle(f"most: {float(weights.max()) * columns:.1f} times an even share", fontsize=7)
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
