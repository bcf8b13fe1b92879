"""How a run shows itself: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Protocol

from experiments.config import Display

PLAIN_SECONDS = 5.0  # between two plain progress lines


class Progress(Protocol):
    """Progress of the outer steps and everything a run has to say meanwhile."""

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *exc: object) -> None: ...

    def update(self, step: int, figures: dict[str, str]) -> None:
        """Show that `step` steps are done."""
        ...

    def say(self, message: str) -> None:
        """Print a line."""
        ...


class Plain:
    """Lines on stdout, at most one progress line every few seconds."""

    def __init__(self, total: int, done: int, quiet: bool = False) -> None:
        self.total, self.start, self.quiet = total, done, quiet
        self.shown = self.begun = float("-inf")

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def update(self, step: int, figures: dict[str, str]) -> None:
        now = time.monotonic()
        if self.begun < 0:
            self.begun, self.start = now, step
        if self.quiet or (now - self.shown < PLAIN_SECONDS and step < self.total):
            return
        self.shown = now
        left = (self.total - step) * (now - self.begun) / max(step - self.start, 1)
        shown = [f"step {step}/{self.total}", *(f"{k} {v}" for k, v in figures.items())]
        self.say("  ".join([*shown, _left(left)] if step > self.start else shown))

    def say(self, message: str) -> None:
        print(message, flush=True)


class Silent:
    """Nothing: of the processes of a run one speaks."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def update(self, step: int, figures: dict[str, str]) -> None: ...

    def say(self, message: str) -> None: ...


class Bar:
    """A rich progress bar; other lines scroll above it."""

    def __init__(self, total: int, done: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = RichProgress(*columns, expand=True)
        self.task = self.bar.add_task("training", total=total, completed=done, figures="")

    def __enter__(self) -> "Bar":
        self.bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def update(self, step: int, figures: dict[str, str]) -> None:
        self.bar.update(self.task, completed=step, figures="  ".join(f"{k} {v}" for k, v in figures.items()))

    def say(self, message: str) -> None:
        self.bar.console.print(message, markup=False, highlight=False, soft_wrap=True)


def progress(display: Display, total: int, done: int) -> Progress:
    """The display asked for; `auto` is the bar where stdout is a terminal and rich is installed."""
    if display is Display.auto:
        display = Display.bar if sys.stdout.isatty() and _has_rich() else Display.plain
    return Bar(total, done) if display is Display.bar else Plain(total, done, quiet=display is Display.off)


def _has_rich() -> bool:
    from importlib.util import find_spec

    return find_spec("rich") is not None


def _left(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"left {minutes}:{seconds:02d}"
