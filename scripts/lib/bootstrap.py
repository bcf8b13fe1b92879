"""Makes the environment that train.sh and test.sh run in, and does nothing when it is already complete.

Runs under any Python >= 3.11 with the standard library alone. What is done and what is left is in one small file in the
environment, `theria-state.json`, always replaced atomically. Its `phase`:

    installing  pip is at work. Found at the start of a run it means that pip was killed: build anew.
    stopped     pip ended by itself, with an error: what is there is sound, go on from it.
    ready       complete for the `key` (a hash of the metadata and the pins), the extras and the flavour of torch.

An environment without that file was made by hand: it is completed in place and nothing in it is deleted.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pip_runner import Problem, explain_pip, no_network, not_found, run_pip

ROOT = Path(__file__).resolve().parents[2]
PINS = ("scripts/constraints.txt", "scripts/constraints-cpu.txt")
# PyTorch's own index of CPU builds, asked only when the configured index has none.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The complete CPU environment is 2.3 GB and its downloads about 0.6; the CUDA libraries of torch 2.13 add about 7.
NEEDED_GB = {"cpu": 3.5, "cuda": 12.0}


@dataclass(frozen=True)
class Environment:
    """The environment to make: where, with which extras of pyproject.toml and which build of torch."""

    path: Path
    extras: frozenset[str]
    flavour: str  # "cpu" or "cuda"
    root: Path = field(default=ROOT)

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def state_file(self) -> Path:
        return self.path / "theria-state.json"

    def key(self) -> str:
        """A hash of all that decides what is installed: the pins, and pyproject.toml without the settings of tools."""
        metadata = tomllib.loads((self.root / "pyproject.toml").read_text())
        tables = [metadata["build-system"], metadata["project"], metadata.get("tool", {}).get("setuptools")]
        pins = [(self.root / name).read_text() for name in PINS]
        return hashlib.sha256(json.dumps([tables, pins], sort_keys=True).encode()).hexdigest()

    def state(self) -> dict:
        """The last state written, or {} (none, or unreadable)."""
        try:
            state = json.loads(self.state_file.read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def write_state(self, phase: str) -> None:
        state = {
            "phase": phase,
            "key": self.key(),
            "extras": sorted(self.extras),
            "flavour": self.flavour,
            "root": str(self.root),  # the editable install points there: a moved checkout needs a new one
        }
        draft = self.state_file.with_suffix(".new")
        draft.write_text(json.dumps(state, indent=1))
        os.replace(draft, self.state_file)

    def has_wrong_python(self) -> bool:
        """Whether THERIA_PYTHON asks for another Python than the environment's (without it, any will do)."""
        if not os.environ.get("THERIA_PYTHON"):
            return False
        with contextlib.suppress(OSError):
            settings = (self.path / "pyvenv.cfg").read_text()
            return re.search(rf"^version\w* = {sys.version_info[0]}\.{sys.version_info[1]}\b", settings, re.M) is None
        return True

    def is_ready(self) -> bool:
        state = self.state()
        return (
            state.get("phase") == "ready"
            and state.get("key") == self.key()
            and state.get("flavour") == self.flavour
            and state.get("root") == str(self.root)
            and self.extras <= set(state.get("extras", ()))
            and self.python.exists()
            and not self.has_wrong_python()
        )

    def must_start_over(self) -> bool:
        """Whether what is there cannot be completed in place."""
        state = self.state()
        if not self.python.exists() or state.get("phase") == "installing":
            return True
        return bool(state) and (state.get("flavour") != self.flavour or self.has_wrong_python())


def say(text: str) -> None:
    print(f"theria: {text}", file=sys.stderr, flush=True)


def has_nvidia_gpu() -> bool:
    """Whether nvidia-smi runs and lists a device."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listing.returncode == 0 and "GPU" in listing.stdout


def choose_flavour(existing: str | None) -> str:
    """`THERIA_TORCH` if set; else what a complete environment has; else CUDA where a GPU answers, CPU elsewhere."""
    asked = os.environ.get("THERIA_TORCH", "")
    if asked not in ("", "cpu", "cuda"):
        raise Problem(f"THERIA_TORCH={asked} is not a build of torch. Use THERIA_TORCH=cpu or THERIA_TORCH=cuda.")
    if asked:
        return asked
    gpu = has_nvidia_gpu() if existing != "cuda" else True
    if existing == "cpu" and gpu:
        say("this machine has an NVIDIA GPU and the environment a CPU torch. THERIA_TORCH=cuda replaces it.")
    return existing or ("cuda" if gpu else "cpu")


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds the environment's lock, which the system releases however the process ends."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "theria.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is preparing {path}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_space(environment: Environment) -> None:
    free = shutil.disk_usage(environment.path).free / 1e9
    needed = NEEDED_GB[environment.flavour]
    if free < needed:
        raise Problem(
            f"{free:.1f} GB are free at {environment.path}, and an environment with the {environment.flavour} build of "
            f"torch needs {needed} GB. Free some, or set THERIA_VENV to a folder on a larger disk."
        )


def create(environment: Environment) -> None:
    """An empty environment in place of whatever is there, except the lock, which this process holds, and the state."""
    environment.write_state("installing")
    for entry in environment.path.iterdir():
        if entry.name in ("theria.lock", environment.state_file.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    check_space(environment)
    say(f"making {environment.path} with Python {platform.python_version()} ({environment.flavour} build of torch)")
    venv.create(environment.path, with_pip=True, symlinks=True)


def pip_install(environment: Environment, *arguments: str) -> tuple[int, str]:
    """`pip install` with the state kept beside it; see pip_runner.run_pip."""
    environment.write_state("installing")
    status, errors = run_pip(environment.python, environment.root, arguments)
    if status >= 0:  # negative: ended by a signal, so the state stays "installing"
        environment.write_state("stopped")
    return status, errors


def torch_requirement(environment: Environment) -> str:
    """`torch==X` for CUDA and for macOS, where the plain build is the CPU one; `torch==X+cpu` elsewhere."""
    pins = (environment.root / PINS[0]).read_text()
    pin = re.search(r"^torch==\S+", pins, re.MULTILINE)
    assert pin is not None, f"{PINS[0]} pins torch"
    return pin[0] + ("+cpu" if environment.flavour == "cpu" and sys.platform == "linux" else "")


def install_torch(environment: Environment, requirement: str) -> None:
    """The chosen build, without its dependencies, which the project's own install brings.

    Raises:
        Problem: No index in reach has that build.
    """
    if environment.flavour == "cuda":
        return  # the plain build is what the project's own install takes
    status, errors = pip_install(environment, "--no-deps", requirement)
    if status == 0:
        return
    if not not_found(errors) or not requirement.endswith("+cpu"):
        raise explain_pip(errors, requirement)
    say(f"the configured index has no {requirement}; asking PyTorch's index of CPU builds")
    status, _ = pip_install(environment, "--no-deps", "--index-url", TORCH_CPU_INDEX, requirement)
    if status != 0:
        if no_network(errors):
            raise explain_pip(errors, requirement)
        raise Problem(
            f"{requirement} for Python {platform.python_version()} is neither in the configured index nor within "
            f"reach at {TORCH_CPU_INDEX}. Check the network, try another interpreter (THERIA_PYTHON=python3.11), or "
            "take the plain build with THERIA_TORCH=cuda (several gigabytes)."
        )


def verify(environment: Environment) -> str:
    """Imports what was installed, outside the checkout; returns the version of torch."""
    code = "import torch, theria; print(torch.__version__, torch.version.cuda or 'cpu')"
    result = subprocess.run(
        [str(environment.python), "-c", code], cwd=environment.path, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise Problem(f"the installed packages do not import:\n{result.stderr.strip()}")
    version, cuda = result.stdout.split()
    if environment.flavour == "cuda" and cuda == "cpu":
        raise Problem(
            f"the configured index gave torch {version}, a build without CUDA, to a machine with an NVIDIA GPU. "
            "Point PIP_INDEX_URL at an index with the CUDA build, or run on the CPU with THERIA_TORCH=cpu."
        )
    return version


def install(environment: Environment) -> None:
    """Everything, in the environment as it is."""
    requirement = torch_requirement(environment)
    install_torch(environment, requirement)
    pins = PINS[1] if environment.flavour == "cpu" else PINS[0]
    project = f".[{','.join(sorted(environment.extras))}]"
    status, errors = pip_install(environment, "-c", pins, requirement, "-e", project)
    if status != 0:
        raise explain_pip(errors, "the project and its dependencies")
    version = verify(environment)
    environment.write_state("ready")
    say(f"ready: {environment.path} with torch {version}")


def prepare(path: Path, extras: frozenset[str]) -> None:
    """Makes, completes or leaves alone the environment at `path`."""
    found = Environment(path, extras, "cpu").state()
    flavour = choose_flavour(found.get("flavour"))
    environment = Environment(path, extras, flavour)
    if environment.is_ready():
        return
    with exclusive(path):
        if environment.is_ready():  # made by the run that held the lock
            return
        state = environment.state()
        if environment.must_start_over():
            if state.get("phase") == "installing":
                say("the last run was interrupted while it installed; starting over")
            create(environment)
        elif state:
            environment = Environment(path, extras | set(state.get("extras", ())), flavour)
        else:
            say(f"{path} was not made by these scripts: completing it in place")
        install(environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True, help="where the environment is or will be")
    parser.add_argument("--extras", required=True, help="comma-separated extras of pyproject.toml")
    arguments = parser.parse_args()
    try:
        prepare(arguments.venv.absolute(), frozenset(arguments.extras.split(",")))
    except Problem as problem:
        say(str(problem))
        return 1
    except OSError as error:
        say(f"{error}: cannot make {arguments.venv}. Is the disk full, or the folder not writable?")
        return 1
    except KeyboardInterrupt:
        say("interrupted; run the same command again to start over")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
