"""What a run directory holds, as far as it can be read."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]
PNG = b"\x89PNG\r\n\x1a\n"
MOST_BYTES = 4 * 2**20  # of one picture: a page must stay quick to open


class ReportError(Exception):
    """Something that the caller can mend; its text says what."""


@dataclass
class Run:
    """One run. `notes` says what could not be read; what is missing is empty or None.

    Attributes:
        rows: the lines of metrics.jsonl, in order.
        results: of results.json.
        evaluations: of each evaluation_*.json that belongs to the run.
        parts: of run.json: command, commit and machine of each start of the run.
    """

    path: Path
    label: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def series(self, name: str) -> Points:
        """(step, value) of every line that has a finite number under this name."""
        return [(row["step"], row[name]) for row in self.rows if is_number(row.get(name)) and is_number(row["step"])]

    def numbered(self, prefix: str) -> list[dict[int, float]]:
        """Of every line that has any: {i: value of `prefix`i}."""
        pattern = re.compile(re.escape(prefix) + r"(\d+)")
        found = [
            {
                int(match[1]): value
                for name, value in row.items()
                if (match := pattern.fullmatch(name)) and is_number(value)
            }
            for row in self.rows
        ]
        return [values for values in found if values]

    def last(self, name: str) -> float | None:
        return next((value for _, value in reversed(self.series(name))), None)

    @property
    def metric(self) -> str:
        """ "accuracy" or "mse", by the results or, without them, the metrics."""
        named = self.results.get("metric") or next((e.get("metric") for e in self.evaluations), None)
        return named if isinstance(named, str) else "mse" if self.series("val/mse") else "accuracy"

    @property
    def seconds(self) -> float | None:
        return number(self.results, "seconds") or self.last("system/seconds")

    @property
    def tasks_per_second(self) -> float | None:
        """The median over the lines, which the first, slow steps do not move."""
        values = [value for _, value in self.series("system/tasks_per_second")]
        return statistics.median(values) if values else None

    @property
    def peak_memory(self) -> tuple[float, str] | None:
        """(MiB, whose): the device's where it was one, else the resident memory of the process."""
        for name, whose in (("system/peak_cuda_memory_mb", "GPU"), ("system/peak_memory_mb", "resident")):
            values = [value for _, value in self.series(name)]
            values += [value] if (value := number(self.results, name.split("/")[1])) is not None else []
            if values:
                return max(values), whose
        return None

    @property
    def steps_done(self) -> float | None:
        return number(self.results, "step") or max(
            (row["step"] for row in self.rows if is_number(row["step"])), default=None
        )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(values: dict[str, Any], name: str) -> float | None:
    return values[name] if is_number(values.get(name)) else None


def read_runs(folders: Sequence[Path], labels: Sequence[str] | None = None) -> list[Run]:
    """The runs, each under its label; an evaluation of one of them becomes a part of it.

    Raises:
        ReportError: a folder that is none or holds nothing of a run; another number of labels than of folders.
    """
    if labels is not None and len(labels) != len(folders):
        raise ReportError(f"--labels has {len(labels)} names for {len(folders)} run directories: give one for each")
    runs = [read_run(folder) for folder in folders]
    for run, label in zip(runs, labels or _labels([run.path for run in runs]), strict=True):
        run.label = label
    return _attached(runs)


def read_run(folder: Path) -> Run:
    """A run from its directory; what is damaged there is a note of the run.

    Raises:
        ReportError: no such folder, one without anything to show, or a run of another program than experiments.train.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; needed is the directory of a run, as outputs/<name>/<date_time>")
    run = Run(folder)
    run.rows = _rows(folder / "metrics.jsonl", run.notes)
    run.results = _object(folder / "results.json", run.notes)
    found = (_object(path, run.notes) for path in sorted(folder.glob("evaluation*.json")))
    run.evaluations = [evaluation for evaluation in found if evaluation]
    parts = _object(folder / "run.json", run.notes).get("parts", [])
    run.parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    run.config, run.config_text = _config(folder / "config.yaml", run.notes)
    run.pictures = _pictures(folder, run.notes)
    if not (run.rows or run.results or run.evaluations):
        found = f" ({'; '.join(run.notes)})" if run.notes else ""
        raise ReportError(
            f"{folder}: holds no metrics.jsonl, results.json or evaluation_*.json that can be read{found}; needed is "
            "the directory of a run that has logged at least one line"
        )
    program = re.match(r"python -m experiments\.(bilevel|deq)\b", str(run.results.get("command", "")))
    if program:
        raise ReportError(
            f"{folder}: is a run of experiments.{program[1]}, and the page shows runs and evaluations of "
            "experiments.train: its figures are in results.json"
        )
    return run


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"task": {"ways": 5}} as {"task.ways": 5}."""
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {key: value for name in values for key, value in flat(values[name], f"{prefix}{name}.").items()}


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    rows, bad = [], []
    lines = _text(path, notes).splitlines()
    for count, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and is_number(row.get("step")):
            rows.append(row)
        else:
            bad.append(count)
    if bad == [len(lines)]:
        notes.append(f"{path.name}: its last line is cut short, as a kill leaves it, and was left out")
    elif bad:
        notes.append(
            f"{path.name}: {len(bad)} of {len(lines)} lines are no metrics (the first: line {bad[0]}), left out"
        )
    return rows


def _object(path: Path, notes: list[str]) -> dict[str, Any]:
    text = _text(path, notes)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        notes.append(f"{path.name} is damaged ({error}): needed is the JSON that the run wrote")
        return {}
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name} is damaged: needed is a JSON object")
    return {}


def _config(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    text = _text(path, notes)
    if not text:
        return {}, ""
    try:
        import yaml
    except ImportError:
        notes.append(f'{path.name} was not read: needed is PyYAML (pip install -e ".[experiments]")')
        return {}, text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        notes.append(f"{path.name} is damaged ({str(error).splitlines()[0]})")
        return {}, text
    return (value if isinstance(value, dict) else {}), text


def _text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}: {error})")
        return ""


def _pictures(folder: Path, notes: list[str]) -> list[Path]:
    """Those of pictures/, or where there is no such folder, as beside committed results, those of the run's own."""
    place = folder / "pictures" if (folder / "pictures").is_dir() else folder
    good = []
    for path in sorted(place.glob("*.png")):
        with path.open("rb") as file:
            whole = file.read(len(PNG)) == PNG
        if whole and path.stat().st_size <= MOST_BYTES:
            good.append(path)
        else:
            notes.append(f"{path.name}: " + ("larger than 4 MiB, left out" if whole else "damaged, no PNG"))
    return good


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; the same folder twice is numbered."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    names = ["/".join(p[-depth:]) for p in parts]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _attached(runs: list[Run]) -> list[Run]:
    """An evaluation's directory is no run of its own where the run that it evaluated is among them."""
    kept = []
    for run in runs:
        checkpoint = run.evaluations[0].get("checkpoint") if run.evaluations else None
        owner = None
        if isinstance(checkpoint, str) and not run.rows and not run.results:
            folders = [folder.resolve() for folder in Path(checkpoint).parents]
            owner = next((other for other in runs if other is not run and other.path.resolve() in folders), None)
        if owner is None:
            kept.append(run)
        else:
            owner.evaluations += run.evaluations
            owner.notes += run.notes
    return kept
