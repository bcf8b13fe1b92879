"""The panels of the page: the same as those of a run (experiments/panels.py), one chart for all runs."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from reporting.charts import Line, dot_chart, line_chart
from reporting.runs import Points, Run, number
from reporting.tables import Section, key

Charts = list[tuple[str, str]]  # (title, svg or "")
STEP = "outer step"
# What records most of them.
PANELS = "trainer.health_every above 0 and a step that it and trainer.log_every divide"
# The pictures of a run that repeat a chart of this page.
DRAWN = ("learning_curve", "inner_curve")


def sections(runs: Sequence[Run]) -> list[Section]:
    """Every panel in its order; one without data says so."""
    return [
        ("Accuracy" if _metric(runs) == "accuracy" else "Error", _accuracy(runs)),
        ("The inner loop", _inner(runs)),
        ("Learned inner rates", _rates(runs)),
        ("Second order in the meta-gradient", _gradient(runs)),
        ("Curvature of the inner loss", _curvature(runs)),
        ("Episodes and attention", _pictures(runs)),
        ("Throughput and memory", _system(runs)),
    ]


def _accuracy(runs: Sequence[Run]) -> str:
    metric = _metric(runs)
    percent = metric == "accuracy"
    held_out = _lines(runs, f"val/{metric}", interval=True)
    charts = [
        (f"Validation {metric}, 95 % interval", line_chart(held_out, x_label=STEP, percent=percent, log=not percent)),
        (f"Training {metric}", _over_steps(runs, f"train/{metric}", percent=percent, log=not percent)),
        ("Training loss", _over_steps(runs, "train/loss", log=True)),
        ("Norm of the meta-gradient", _over_steps(runs, "gradient/norm", log=True)),
    ]
    missing = _without(runs, f"val/{metric}")
    return _panel("Held-out classes beside the training classes.", charts, missing, "trainer.val_every above 0")


def _inner(runs: Sequence[Run]) -> str:
    charts: Charts = []
    for name, figure in (("support", "loss"), ("query", "loss"), ("support", "accuracy"), ("query", "accuracy")):
        lines = [line for i, run in enumerate(runs) for line in _step_lines(run, i, f"steps/{name}_{figure}_")]
        svg = line_chart(lines, x_label="inner step", percent=figure == "accuracy")
        charts.append((f"{name.capitalize()} {figure}, validation tasks", svg))
    metric = _metric(runs)
    final = [line for i, run in enumerate(runs) if (line := _final_curve(run, i)) is not None]
    axis = next((str(run.results["axis"]) for run in runs if run.results.get("axis")), "inner steps")
    charts.append((f"Test {metric}, 95 % interval", line_chart(final, x_label=axis, percent=metric == "accuracy")))
    missing = [run.label for run in runs if not run.numbered("steps/query_loss_")]
    text = "Before and after each inner step: dashed as first measured, solid as last. A gap between support and query "
    return _panel(text + "is what adaptation learns by heart.", charts, missing, f"{PANELS}, and inner steps")


def _rates(runs: Sequence[Run]) -> str:
    found = [
        (i, run.label, {name[6:]: (points[0][1], points[-1][1]) for name, points in _group(run, "rates/").items()})
        for i, run in enumerate(runs)
    ]
    rows = list(dict.fromkeys(row for _, _, rates in found for row in rates))
    charts = [("Mean rate of each layer: first (hollow) and last (full)", dot_chart(rows, found))]
    charts.append(("Mean over all", _over_steps(runs, "inner/lr_mean")))
    missing = [run.label for run, (_, _, rates) in zip(runs, found, strict=True) if not rates]
    text = "Where the inner loop may move, and where it is told to stay."
    return _panel(text, charts, missing, f"{PANELS}, and learned inner rates")


def _gradient(runs: Sequence[Run]) -> str:
    charts = [
        ("|full − first order| / |full|", _over_steps(runs, "gradient/second_order")),
        ("Cosine between full and first order", _over_steps(runs, "gradient/cosine")),
    ]
    if any(run.series("gradient/rounding") for run in runs):
        charts.append(("|mixed precision − float32| / |float32|", _over_steps(runs, "gradient/rounding", log=True)))
    text = "The meta-gradient beside what is left when inner gradients are taken as constants: 0 and 1 mean that first "
    missing = _without(runs, "gradient/second_order")
    return _panel(text + "order is the same update.", charts, missing, f"{PANELS}, and inner steps")


def _curvature(runs: Sequence[Run]) -> str:
    names = {
        "largest_eigenvalue": "Largest eigenvalue of H",
        "smallest_eigenvalue": "Smallest eigenvalue of H",
        "along_gradient": "Along the inner gradient, u'Hu",
        "hvp_norm": "|H u|",
    }
    charts = [(title, _over_steps(runs, f"curvature/{name}", log=True)) for name, title in names.items()]
    text = (
        "One task, where its inner steps begin: H the Hessian in what they change, u the direction of the inner "
        "gradient. A step of rate a overshoots along u where a u'Hu is above 2. Eigenvalues by a few steps of Lanczos."
    )
    return _panel(text, charts, _without(runs, "curvature/hvp_norm"), f"{PANELS}, and inner steps")


def _pictures(runs: Sequence[Run]) -> str:
    blocks = []
    for i, run in enumerate(runs):
        figures = []
        for path in run.pictures:
            if path.stem in DRAWN:
                continue
            data = base64.b64encode(path.read_bytes()).decode()
            name = escape(path.stem.replace("_", " "))
            figures.append(
                f'<figure><img alt="{name}" src="data:image/png;base64,{data}"><figcaption>{name}</figcaption></figure>'
            )
        blocks.append(f"<h3>{key(run, i)}</h3>")
        blocks.append(
            f'<div class="pictures">{"".join(figures)}</div>' if figures else _gap([], "trainer.pictures=true")
        )
    charts = []
    for layer in sorted({name for run in runs for name in _group(run, "attention/entropy_layer")}):
        number_of = layer.removeprefix("attention/entropy_layer")
        charts.append((f"Entropy of attention, layer {number_of} (1: looks everywhere)", _over_steps(runs, layer)))
    return "".join(blocks) + (_figures(charts) if charts else "")


def _system(runs: Sequence[Run]) -> str:
    memory = "system/peak_cuda_memory_mb" if any(r.series("system/peak_cuda_memory_mb") for r in runs) else ""
    charts = [
        ("Tasks per second", _over_steps(runs, "system/tasks_per_second")),
        ("Outer steps per second", _over_steps(runs, "system/steps_per_second")),
        ("Peak of GPU memory, MiB", _over_steps(runs, memory)) if memory else ("", ""),
        ("Peak of resident memory, MiB", _over_steps(runs, "system/peak_memory_mb")),
    ]
    return _panel("", charts, _without(runs, "system/tasks_per_second"), "a run that logged a line")


# -------------------------------------------------------------------------------------------------------------- parts
def _metric(runs: Sequence[Run]) -> str:
    """That of most runs is on the page; accuracy in doubt."""
    metrics = [run.metric for run in runs]
    return max(("accuracy", "mse"), key=metrics.count)


def _lines(runs: Sequence[Run], name: str, interval: bool = False) -> list[Line]:
    lines = []
    for i, run in enumerate(runs):
        points = run.series(name)
        halves = dict(run.series(f"{name}_ci95")) if interval else {}
        lines.append(Line(points, run.label, i, [halves.get(x, 0.0) for x, _ in points] if halves else []))
    return lines


def _over_steps(runs: Sequence[Run], name: str, percent: bool = False, log: bool = False) -> str:
    return line_chart(_lines(runs, name), x_label=STEP, percent=percent, log=log)


def _step_lines(run: Run, i: int, prefix: str) -> Iterable[Line]:
    """The first and the last curve over the inner steps."""
    curves = run.numbered(prefix)
    if len(curves) > 1:
        yield Line(_sorted(curves[0]), f"{run.label}, at first", i, faint=True)
    if curves:
        yield Line(_sorted(curves[-1]), run.label, i)


def _final_curve(run: Run, i: int) -> Line | None:
    curve, half = run.results.get("curve"), run.results.get("curve_ci95")
    if not isinstance(curve, list) or len(curve) < 2:
        return None
    half = half if isinstance(half, list) and len(half) == len(curve) else [None] * len(curve)
    pairs = enumerate(zip(curve, half, strict=True))
    values = [(float(t), number({"v": v}, "v"), number({"h": h}, "h")) for t, (v, h) in pairs]
    kept = [(t, v, h or 0.0) for t, v, h in values if v is not None]
    return Line([(t, v) for t, v, _ in kept], run.label, i, [h for _, _, h in kept])


def _sorted(values: dict[int, float]) -> Points:
    return [(float(i), values[i]) for i in sorted(values)]


def _group(run: Run, prefix: str) -> dict[str, Points]:
    names = dict.fromkeys(name for row in run.rows for name in row if name.startswith(prefix))
    return {name: points for name in names if (points := run.series(name))}


def _without(runs: Sequence[Run], name: str) -> list[str]:
    return [run.label for run in runs if not run.series(name)]


def _panel(text: str, charts: Charts, missing: Sequence[str], needs: str) -> str:
    """A sentence, the charts that have data, and who has none."""
    parts = [f'<p class="soft">{escape(text)}</p>' if text else ""]
    drawn = [(title, svg) for title, svg in charts if svg]
    parts.append(_figures(drawn) if drawn else "")
    if missing or not drawn:
        parts.append(_gap(missing if drawn else [], needs))
    return "".join(parts)


def _figures(charts: Charts) -> str:
    return (
        '<div class="grid2">' + "".join(f"<figure><h3>{escape(t)}</h3>{svg}</figure>" for t, svg in charts) + "</div>"
    )


def _gap(labels: Sequence[str], needs: str) -> str:
    of = f" for {', '.join(labels)}" if labels else ""
    return f'<p class="gap">not recorded{escape(of)}: it needs {escape(needs)}</p>'
