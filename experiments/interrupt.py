"""Signals as a request that the loop answers between two steps."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from experiments import launch
from experiments.errors import UserError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_QUEUE = (signal.SIGUSR1, signal.SIGUSR2)


class SignalWatch:
    """While the block runs, SIGINT and SIGTERM are remembered in `received`; a second one ends the program at once.

    A job of submitit's has a handler for SIGUSR2 (or what SUBMITIT_PREEMPT_SIGNAL says) that puts the job back into the
    queue. There that signal is remembered instead, and handed on to the handler when an error ends the block: after the
    checkpoint, and not in the middle of a step. SIGTERM is left to submitit, which lets it pass: Slurm sends it along.
    """

    last: int | None = None  # what any watch of this process received last

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python cannot install handlers
            queue = [number for number in _QUEUE if callable(signal.getsignal(number))]
            watched = [signal.SIGINT, *queue] if queue else _SIGNALS
            self._before = {number: signal.signal(number, self._remember) for number in watched}
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        handler = self._before.get(self.received or 0) if self.received in _QUEUE else None
        if failed and callable(handler):
            handler(self.received, None)  # ends the process

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = SignalWatch.last = signum


@contextmanager
def ending_sweep(sweep: bool) -> Iterator[None]:
    """A signal during a run of a sweep in this process ends the sweep: Hydra would keep the exception of the run and
    begin the next. A job of submitit's is a process of its own.

    Raises:
        SystemExit: after a signal.
    """
    message, SignalWatch.last = "", None
    try:
        yield
    except UserError as error:  # Interrupted, or another that came at the same time
        if SignalWatch.last is None or not sweep or launch.is_queued():
            raise
        message = f"{error}\n"
    if SignalWatch.last is not None and sweep and not launch.is_queued():
        print(f"{message}no later run of the sweep was begun", file=sys.stderr)
        sys.exit(128 + SignalWatch.last)
