"""Several processes of one run, as torchrun starts them: the first writes, prints and decides, the others compute.

torchrun --nproc-per-node=2 -m experiments.train ...
"""

import os
import sys
from collections.abc import Sequence

# Hydra makes a directory in every process, and its name has the time in it: the others' is the current one, which they
# leave as it is. The run's directory is that of the first.
OTHERS = "hydra.run.dir=."


def size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_other() -> bool:
    """Whether this process is one of several and not the first."""
    return size() > 1 and os.environ.get("RANK", "0") != "0"


def is_queued() -> bool:
    """Whether this is a job of submitit's, which may be one that was preempted and is run again."""
    return "SUBMITIT_EXECUTOR" in os.environ


def quiet_others() -> None:
    """Before Hydra reads the command line: only the first process may write."""
    if is_other():
        sys.argv.append(OTHERS)


def arranged(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra's parser needs them, options before settings."""
    settings = [item for item in arguments if item[:1] != "-" and ("=" in item or item[:1] == "~")]
    return [*(item for item in arguments if item not in settings), *settings]


def command(module: str) -> list[str]:
    """How a module is run with as many processes as this run has."""
    if size() == 1:
        return ["python", "-m", module]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    machines = [] if here == size() else [f"--nnodes={size() // here}"]
    return ["torchrun", *machines, f"--nproc-per-node={here}", "-m", module]
