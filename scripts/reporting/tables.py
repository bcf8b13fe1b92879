"""The parts of the page that are words and numbers: the comparison, what differs, where each run comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from reporting.charts import COLORS
from reporting.runs import Run, flat, number

Section = tuple[str, str]
# Settings that two runs of the same experiment may differ in.
INCIDENTAL = ("seed", "run_dir", "name", "tracking.", "trainer.resume", "trainer.display", "trainer.threads")
MISSING = "–"
ONE_SHOT = "official within-alphabet one-shot test"


def key(run: Run, number_of_run: int) -> str:
    """The name of a run in its colour."""
    return f'<span class="key c{number_of_run % COLORS}">{escape(run.label)}</span>'


def estimate(values: dict[str, Any], name: str = "mean", interval: str = "ci95") -> str:
    """'97.31 % ± 0.24' for an accuracy, '0.3942 ± 0.031' otherwise."""
    mean, half = number(values, name), number(values, interval)
    if mean is None:
        return MISSING
    if values.get("metric") == "mse":
        return f"{mean:.4g}" + (f" ± {half:.2g}" if half is not None else "")
    return f"{100 * mean:.2f} %" + (f" ± {100 * half:.2f}" if half is not None else "")


def summary(runs: Sequence[Run]) -> list[Section]:
    """The comparison across runs, means over seeds where there are several, and what could not be read."""
    return [("Comparison", _comparison(runs) + _seeds(runs) + _notes(runs))]


def origins(runs: Sequence[Run]) -> list[Section]:
    """What the settings of the runs differ in, and the command and commit of each."""
    sections = [("Where each run comes from", "".join(_origin(run, i) for i, run in enumerate(runs)))]
    return [("What differs", _differences(runs)), *sections] if len(runs) > 1 else sections


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; the columns `right` hold numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if i in right else ''}>{c}</{tag}>" for i, c in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{line(head, "th")}</tr>{body}</table></div>'


def _comparison(runs: Sequence[Run]) -> str:
    head = ["run", "task", "test", "episodes", "before", "seed", "steps", "minutes", "peak memory", "tasks/s"]
    rows = []
    for i, run in enumerate(runs):
        rows.append([key(run, i), escape(_task(run)), *_figures(run.results, run), *_costs(run)])
        if "one_shot" in run.results:
            rows.append(["", ONE_SHOT, *_one_shot(run.results["one_shot"]), *[""] * 5])
        for evaluation in run.evaluations:
            official = evaluation.get("protocol") == "one_shot"
            name = f"evaluation of step {evaluation.get('step', '?')}: "
            name += ONE_SHOT if official else _tasks(evaluation)
            name += "".join(f", {text}" for text in _otherwise(evaluation, run))
            figures = _one_shot(evaluation) if official else _figures(evaluation, run)
            rows.append(["", escape(name), *figures, *[""] * 5])
    text = "The figure on the test classes with its 95 % interval over the episodes; before: without adaptation."
    return f'<p class="soft">{text}</p>' + table(head, rows, right=(2, 3, 4, 5, 6, 7, 8, 9))


def _figures(values: dict[str, Any], run: Run) -> list[str]:
    episodes = number(values, "episodes")
    before = estimate(values, "before", "before_ci95")
    if not values:
        value = run.last(f"val/{run.metric}")
        half = run.last(f"val/{run.metric}_ci95")
        unfinished = estimate({"mean": value, "ci95": half, "metric": run.metric})
        return [f"not finished<br>validation {unfinished}" if value is not None else "not recorded", MISSING, MISSING]
    return [f"<b>{estimate(values)}</b>", f"{episodes:,.0f}" if episodes else MISSING, before]


def _tasks(evaluation: dict[str, Any]) -> str:
    """The subset and, where they are recorded, the sizes of its tasks."""
    sizes = {"way": number(evaluation, "ways"), "shot": number(evaluation, "shots")}
    text = " ".join(f"{size:g}-{name}" for name, size in sizes.items() if size)
    return ", ".join(filter(None, [str(evaluation.get("subset", "test")), text]))


def _otherwise(evaluation: dict[str, Any], run: Run) -> list[str]:
    """What an evaluation has otherwise than the run's own, where both are recorded."""
    steps, own = number(evaluation, "inner_steps"), len(run.results.get("curve") or ()) - 1
    copies, seed = number(evaluation, "test_augment"), number(evaluation, "seed")
    found = []
    if steps is not None and own > 0 and steps != own:
        found.append(f"{steps:g} inner steps")
    if evaluation.get("distinct_characters") is True:
        found.append("distinct characters")
    if copies is not None and copies > 1:
        found.append(f"{copies:g} copies of each task")
    if seed is not None and seed != number(run.results, "seed"):
        found.append(f"seed {seed:g}")
    return found


def _one_shot(values: Any) -> list[str]:
    """The error in the official test, with Wilson's interval, and the number of answers."""
    values = values if isinstance(values, dict) else {}
    error, low, high = (number(values, name) for name in ("error", "error_low", "error_high"))
    if error is None:
        return ["not recorded", MISSING, MISSING]
    interval = "" if low is None or high is None else f" ({100 * low:.2f} to {100 * high:.2f})"
    trials = number(values, "trials")
    return [f"<b>{100 * error:.2f} % wrong</b>{interval}", f"{trials:,.0f} answers" if trials else MISSING, MISSING]


def _costs(run: Run) -> list[str]:
    seed, steps, seconds = run.config.get("seed", run.results.get("seed")), run.steps_done, run.seconds
    memory, speed = run.peak_memory, run.tasks_per_second
    return [
        MISSING if seed is None else escape(str(seed)),
        MISSING if steps is None else f"{steps:,.0f}",
        MISSING if seconds is None else f"{seconds / 60:,.1f}",
        MISSING if memory is None else f"{memory[0] / 1024:,.2f} GiB {memory[1]}",
        MISSING if speed is None else f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}",
    ]


def _task(run: Run) -> str:
    task = run.config.get("task")
    if not isinstance(task, dict):
        return "not recorded"
    ways, shots = task.get("ways"), task.get("shots")
    kind = f", {ways}-way {shots}-shot" if ways is not None else f", {shots} points" if shots is not None else ""
    split = f" ({task['split']})" if "split" in task else ""
    return f"{task.get('name', '')}{split}{kind}"


def _seeds(runs: Sequence[Run]) -> str:
    """A line for each experiment with several seeds."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.config and number(run.results, "mean") is not None:
            fixed = {k: v for k, v in flat(run.config).items() if not k.startswith(INCIDENTAL)}
            groups.setdefault(repr(sorted(fixed.items(), key=str)), []).append(run)
    lines = []
    for group in groups.values():
        seeds = {str(run.config.get("seed")) for run in group}
        if len(seeds) < 2 or len(seeds) < len(group):
            continue
        values = [run.results["mean"] for run in group]
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        text: Callable[[float], str] = lambda v, m=group[0].metric: estimate({"mean": v, "metric": m})  # noqa: E731
        names = ", ".join(escape(run.label) for run in group)
        spread = f"standard deviation {text(deviation)}, from {text(min(values))} to {text(max(values))}"
        lines.append(
            f"<p><b>{text(mean)}</b> mean over {len(seeds)} seeds of the same experiment ({names}); {spread}</p>"
        )
    return "".join(lines)


def _notes(runs: Sequence[Run]) -> str:
    return "".join(f'<p class="gap">{escape(run.label)}: {escape(note)}</p>' for run in runs for note in run.notes)


def _differences(runs: Sequence[Run]) -> str:
    """The settings that are not the same in all runs that recorded any."""
    recorded = [(i, run, flat(run.config)) for i, run in enumerate(runs) if run.config]
    names = sorted({name for _, _, values in recorded for name in values} - {"run_dir"})
    rows = []
    for name in names:
        cells = [json.dumps(values[name], default=str) if name in values else MISSING for _, _, values in recorded]
        if len(set(cells)) > 1:
            rows.append([f"<code>{escape(name)}</code>", *(escape(cell) for cell in cells)])
    if len(recorded) < 2:
        return '<p class="gap">not recorded: needed is the config.yaml of two runs or more</p>'
    if not rows:
        return '<p class="soft">Every setting is the same.</p>'
    return table(["setting", *(key(run, i) for i, run, _ in recorded)], rows)


def _origin(run: Run, i: int) -> str:
    parts = run.parts or ([{"command": run.results["command"]}] if isinstance(run.results.get("command"), str) else [])
    blocks = [f"<h3>{key(run, i)}</h3>", f'<p class="soft">{escape(str(run.path))}</p>']
    if not parts:
        blocks.append('<p class="gap">command and commit: not recorded (the run has no run.json)</p>')
    for part in parts:
        begun = f"from step {part.get('step', '?')}, {part['started']}" if "started" in part else ""
        blocks.append(f"<pre>{escape(str(part.get('command', 'not recorded')))}</pre>")
        blocks.append(f'<p class="soft">{escape(_commit(part))}{escape(f" · {begun}" if begun else "")}</p>')
    machine = parts[-1].get("machine") if parts else None
    machine = machine if isinstance(machine, dict) else run.results.get("machine")
    if isinstance(machine, dict):
        facts = " · ".join(f"{k} {v}" for k, v in machine.items() if v is not None)
        blocks.append(f'<p class="soft">{escape(facts)}</p>')
    if run.config_text:
        blocks.append(f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>")
    return "".join(blocks)


def _commit(part: dict[str, Any]) -> str:
    commit = part.get("commit")
    if not isinstance(commit, dict) or "hash" not in commit:
        return "commit unknown"
    return f"commit {commit['hash']}{' with uncommitted changes' if commit.get('dirty') else ''}"
