"""The folder of a run: one process writes there, and no run replaces the files of another."""

import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from experiments import checkpoint, tracking
from experiments.errors import UserError
from theria.meta.distributed import ALONE, Processes

LOCK = ".lock"
RESULTS = "results.json"


@contextmanager
def held(run_dir: Path, ranks: Processes = ALONE) -> Iterator[None]:
    """The folder, made where it is not there, is this run's for the time of a block; the first process holds it.

    The system lets go of it however the process ends; the file of the lock stays.

    Raises:
        UserError: another process has it.
    """
    with ExitStack() as stack:
        ranks.first(lambda: stack.enter_context(_locked(run_dir)))
        yield


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{run_dir} is in use by {file.read().strip() or 'another process'}: wait for its end, or give another "
                "run_dir"
            ) from error
        except OSError as error:
            print(f"{run_dir} cannot be locked ({error}): give no other process this run_dir", file=sys.stderr)
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def check_unused(run_dir: Path) -> None:
    """Refuse a folder in which an earlier run got beyond its beginning, where there is nothing to lose.

    Raises:
        UserError: with what is there.
    """
    begun = any(row.get("step", 0) for row in tracking.read(run_dir / tracking.METRICS))
    saved = checkpoint.saved(run_dir)
    if any(map(checkpoint.step_of, saved)) or (saved and begun):
        raise UserError(
            f"{run_dir} holds the checkpoints of an earlier run: continue it with trainer.resume=true, or give another "
            "run_dir"
        )
    found = RESULTS if (run_dir / RESULTS).exists() else tracking.METRICS if begun else None
    if found is not None:
        raise UserError(f"{run_dir} holds {found} of an earlier run: give another run_dir, or remove what is there")
