"""Checkpoints that survive a kill at any moment: written aside, flushed to the disk, renamed; the last two are kept,
and those that are asked for."""

import os
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import theria
from experiments.errors import UserError

FORMAT = 1
KEEP = 2
PATTERN = "step_[0-9]*.pt"


def directory(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def saved(run_dir: Path) -> list[Path]:
    """The run's checkpoints, the oldest first."""
    return sorted(directory(run_dir).glob(PATTERN), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(path.stem.removeprefix("step_"))


def belongs(path: Path, run_dir: Path) -> bool:
    """Whether `path` is the run's own directory or one of its checkpoints."""
    path = path.resolve()
    return path == run_dir.resolve() or path.parent == directory(run_dir).resolve()


def save(run_dir: Path, state: dict[str, Any], keep: int | None = None) -> Path:
    """Write `state` (its key "step" names the file) so that a reader sees the whole file or none; drop old ones.

    Of this checkpoint and those before it the last two stay, and those at multiples of `keep` steps. Later ones, which
    a run that had to go on from an earlier step left behind, are not counted: they may be the damaged ones.
    """
    folder = directory(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{state['step']:08d}.pt"
    for left in folder.glob(f".{PATTERN}.*"):  # by a process that was killed while it wrote
        left.unlink()
    temporary = folder / f".{path.name}.{os.getpid()}"
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, "versions": versions(), "rng": rng_state(), **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(folder)
    for old in [other for other in saved(run_dir) if step_of(other) <= state["step"]][:-KEEP]:
        if not (keep and step_of(old) and step_of(old) % keep == 0):
            old.unlink()
    return path


def load(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        UserError: the file is missing, damaged, or of another format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load alone reads flipped bits as weights
        if damaged:
            raise UserError(f"{path} is damaged: the checksum of {damaged} does not match")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint") from error
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as it has parts
        raise UserError(f"{path} is damaged and cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path}: checkpoint format {found}; this version reads format {FORMAT}")
    return state


def newest(run_dir: Path, say=print) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read, or None when it has none; `say` hears of each damaged one.

    Raises:
        UserError: there are checkpoints and none can be read.
    """
    paths, reasons = saved(run_dir), []
    for i, path in reversed(list(enumerate(paths))):
        try:
            return path, load(path)
        except UserError as error:
            reasons.append(str(error))
            if i:
                say(f"{error}; trying the checkpoint before it, {paths[i - 1].name}")
    if paths:
        raise UserError(
            f"no checkpoint in {directory(run_dir)} can be read:\n  " + "\n  ".join(reasons) + "\nPut a good copy in "
            "their place, or begin anew in another run_dir."
        )
    return None


def find(path: Path, say=print) -> tuple[Path, dict[str, Any]]:
    """The checkpoint at a file, or the newest of a run directory.

    Raises:
        UserError: nothing readable is there.
    """
    if path.is_dir():
        found = newest(path, say)
        if found is None:
            raise UserError(f"{path} holds no checkpoint: needed is a checkpoint file, or a run directory with one")
        return found
    return path, load(path)


def versions() -> dict[str, str]:
    """What the numbers of a run may depend on."""
    own = getattr(theria, "__version__", "unknown")
    python, numpy = sys.version.split()[0], np.__version__
    return {"theria": own, "python": python, "torch": str(torch.__version__), "numpy": numpy}


def rng_state() -> dict[str, Any]:
    """The state of every global generator, as values that torch.load reads with weights_only=True."""
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
    }


def restore_rng(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():  # here there may be fewer GPUs than where the checkpoint was written, or none
        for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(cuda, device)
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002


def _sync(folder: Path) -> None:
    """Make the renaming itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
