"""Where the figures of a run go: metrics.jsonl always, Weights & Biases as far as it can be had.

Names are grouped by what stands before the slash, and a dashboard makes one section of each group (GROUPS). Of the
group `steps/`, numbers for each inner step, wandb shows a chart for each figure, `curves/`, and not the numbers.
"""

import json
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from experiments.config import TrackingConfig, TrackingMode

METRICS = "metrics.jsonl"
GROUPS = ("train", "val", "test", "inner", "steps", "rates", "gradient", "curvature", "attention", "system", "pictures")
HIDDEN = "steps"  # the group whose numbers have no chart each
_ABSENT = 'wandb is not installed: only metrics.jsonl is written (pip install -e ".[experiments]", or tracking=off)'


class JsonLines:
    """One JSON object a line: {"step": 10, "train/loss": 1.2}. Numbers that JSON has no word for become null."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Continues a file after `resume_step`: later lines, and one cut short by a kill, are dropped."""
        self.path = path
        kept = [json.dumps(row) for row in read(path) if row.get("step", 0) <= resume_step] if resume_step else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, path)

    def write(self, row: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({key: json_value(value) for key, value in row.items()}, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a kill cut short is left out. A missing file has none."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def step_curves(row: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """{"loss": {"support": [after 0 steps, after 1, ...], "query": [...]}, ...} of "steps/support_loss_0", ..."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, value in row.items():
        match = re.fullmatch(rf"{HIDDEN}/(support|query)_(\w+)_(\d+)", name)
        if match and value is not None:
            found.setdefault(match[2], {}).setdefault(match[1], {})[int(match[3])] = value
    return {
        figure: {name: [points[i] for i in sorted(points)] for name, points in lines.items()}
        for figure, lines in found.items()
    }


def json_value(value: Any) -> Any:
    """`value`, with null for the numbers that JSON has no word for; lists are searched."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [json_value(item) for item in value] if isinstance(value, list) else value


class Wandb:
    """A wandb run behind a guard: no failure of it, and no server, can stop or lose the training run."""

    def __init__(self, config: TrackingConfig, run_dir: Path, settings: dict[str, Any], say: Callable[[str], None]):
        self.say, self.run = say, None
        try:
            import wandb
        except ImportError:
            say(_ABSENT)
            return
        self.wandb = wandb
        self.run = self._start(config, run_dir, settings)
        if self.run is not None:
            self._guard(self._define)

    def _start(self, config: TrackingConfig, run_dir: Path, settings: dict[str, Any]) -> Any:
        modes: list[Literal["online", "offline"]] = ["online", "offline"]
        for mode in modes[config.mode is TrackingMode.offline :]:
            try:
                return self.wandb.init(
                    project=config.project,
                    entity=config.entity,
                    group=settings["name"],
                    name=run_dir.name,
                    tags=config.tags,
                    id=_run_id(run_dir),
                    resume="allow" if mode == "online" else None,
                    config=settings,
                    dir=str(run_dir),
                    mode=mode,
                    settings=self._settings(config),
                )
            except Exception as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                outcome = "tracking goes on offline" if mode != modes[-1] else "only metrics.jsonl is written"
                self.say(f"wandb cannot run {mode} ({reason}): {outcome}")
                self.wandb.teardown()  # its service still holds the run's id
        return None

    def _settings(self, config: TrackingConfig) -> Any:
        wanted = {
            "init_timeout": config.timeout,
            "login_timeout": config.timeout,
            "finish_timeout": config.timeout,
            "silent": True,
            "console": "off",
        }
        known = self.wandb.Settings.model_fields  # finish_timeout is younger than the oldest release that is supported
        return self.wandb.Settings(**{name: value for name, value in wanted.items() if name in known})

    def _define(self) -> None:
        assert self.run is not None
        self.run.define_metric("step", hidden=True)
        for group in GROUPS:
            self.run.define_metric(f"{group}/*", step_metric="step", hidden=group == HIDDEN)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self.say(f"wandb failed ({type(error).__name__}: {error}): from here on only metrics.jsonl is written")
            self.run = None

    def scalars(self, row: Mapping[str, Any]) -> None:
        if self.run is not None:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
            self._guard(lambda: self.run and self.run.log(numbers | self._charts(numbers)))

    def _charts(self, row: Mapping[str, float]) -> dict[str, Any]:
        """One chart over the inner steps for each figure of the group `steps/`, support and query in one."""
        charts = {}
        for figure, lines in step_curves(row).items():
            sets, values = list(lines), list(lines.values())
            xs = [list(range(len(line))) for line in values]
            title = f"{figure} after each inner step"
            chart = self.wandb.plot.line_series(xs, values, keys=sets, title=title, xname="inner step")
            charts[f"curves/{figure}"] = chart
        return charts

    def picture(self, step: int, name: str, path: Path) -> None:
        if self.run is not None:
            image = {f"pictures/{name}": self.wandb.Image(str(path)), "step": step}
            self._guard(lambda: self.run and self.run.log(image))

    def finish(self, exit_code: int) -> None:
        if self.run is not None:
            self._guard(lambda: self.run and self.run.finish(exit_code=exit_code))
            self.run = None


class Tracker:
    """metrics.jsonl first, then wandb if there is one; a process that does not write has neither."""

    def __init__(self, lines: JsonLines | None, wandb: Wandb | None) -> None:
        self.lines, self.wandb = lines, wandb

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        row = {"step": step, **values}
        if self.lines is not None:
            self.lines.write(row)
        if self.wandb is not None:
            self.wandb.scalars(row)

    def picture(self, step: int, name: str, path: Path) -> None:
        if self.wandb is not None:
            self.wandb.picture(step, name, path)

    def finish(self, exit_code: int = 0) -> None:
        if self.wandb is not None:
            self.wandb.finish(exit_code)


def start(
    config: TrackingConfig, run_dir: Path, settings: dict[str, Any], say: Callable[[str], None], resume_step: int = 0
) -> Tracker:
    """The tracker of a run whose resolved configuration is `settings`; `say` hears of whatever does not work."""
    lines = JsonLines(run_dir / METRICS, resume_step)
    off = config.mode is TrackingMode.off
    return Tracker(lines, None if off else Wandb(config, run_dir, settings, say))


def _run_id(run_dir: Path) -> str:
    """The same for every part of a resumed run, so that its parts are one run on the server."""
    path = run_dir / "tracking_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:8])
    return path.read_text().strip()
