"""An environment for each peer: how it installs beside Python 3.11 and PyTorch 2.13, and where its interpreter is."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TORCH = ("torch==2.13.0", "numpy==2.3.5")  # always with its version: another one is another comparison


@dataclass(frozen=True)
class Peer:
    """How to install a library: arguments of one `pip install` after another, then a step of its own.

    `why` says what is unusual about it.
    """

    name: str
    installs: tuple[tuple[str, ...], ...]
    why: str = ""
    finish: Callable[[Path], None] | None = None


def _learn2learn(python: Path) -> None:
    """Unpack the source release beside the installed packages, unbuilt."""
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    with tempfile.TemporaryDirectory() as folder:
        source = ["--no-deps", "--no-binary", "learn2learn", "learn2learn==0.2.0", "-d", folder]
        subprocess.run([str(python), "-m", "pip", "download", "-q", *source], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
        (package,) = Path(folder).glob("learn2learn-*/learn2learn")
        shutil.copytree(package, site / "learn2learn", dirs_exist_ok=True)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("higher", (TORCH, ("--no-deps", "higher==0.2.1"))),
        Peer("torchopt", (TORCH, ("optree", "graphviz"), ("--no-deps", "torchopt==0.7.3"))),
        Peer(
            "betty",
            (TORCH, ("--no-deps", "--ignore-requires-python", "betty-ml==0.2.1")),
            "it asks for a Python below 3.11, and runs on it",
        ),
        Peer("learn2learn", (TORCH,), "its C extension does not build on 3.11; its Python part runs", _learn2learn),
        Peer("jaxopt", (("jaxopt==0.8.5",),)),
    )
}


def interpreter(environments: Path, name: str) -> Path:
    """The interpreter of a library's environment; theria's is the one that runs this."""
    return Path(sys.executable) if name == "theria" else environments / name / "bin" / "python"


def install(environments: Path, name: str) -> None:
    """Make a peer's environment, or finish one that was left unfinished."""
    python, peer, finished = interpreter(environments, name), PEERS[name], environments / name / "finished"
    if finished.exists():
        return
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environments / name)], check=True)
    for arguments in peer.installs:
        subprocess.run([str(python), "-m", "pip", "install", "-q", *arguments], check=True)
    if peer.finish is not None:
        peer.finish(python)
    finished.touch()


def measured(command: list[str], timeout: float, cwd: Path | None = None, **variables: str) -> dict[str, Any]:
    """The JSON object that a program prints last, or {"failed": why}. Another Python sees none of this one's variables.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds.
    """
    own = () if command[0] == sys.executable else ("PYTHON", "VIRTUAL_ENV")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    environment = {**kept, "PYTHONWARNINGS": "ignore", **variables}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])
