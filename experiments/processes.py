"""A run's processes joined, and what the first of them decides for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments import build, launch
from experiments.config import Config
from experiments.errors import UserError
from theria.data import TaskSource
from theria.meta import distributed
from theria.meta.distributed import Processes


@contextmanager
def joined(device: str, timeout: float) -> Iterator[Processes]:
    """The processes that torchrun started, joined for the time of a block; elsewhere this one alone.

    Raises:
        UserError: settings that do not fit several processes.
        LostProcess: they did not find each other.
    """
    if launch.size() > 1 and device.startswith("cuda:"):
        raise UserError(f"device={device}: one GPU for {launch.size()} processes: needed is cuda, one for each, or cpu")
    entered = False
    try:
        with distributed.processes(device, timeout) as ranks:
            entered = True
            yield ranks
    except ValueError as error:
        if entered:
            raise
        raise UserError(str(error)) from error


def directory(ranks: Processes, output_dir: str) -> Path:
    """The first process's output directory: the name has the time in it, which differs between processes."""
    return ranks.first(lambda: Path(output_dir))


def sources(ranks: Processes, settings: Config) -> dict[str, TaskSource]:
    """The tasks of training, validation and test; what is downloaded or rendered for them, the first process makes."""
    built: dict[str, TaskSource] = {}
    ranks.first(lambda: built.update(build.build_sources(settings)))
    return built or build.build_sources(settings)
