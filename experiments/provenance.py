"""Where a run comes from: the command, the commit and the versions of each of its parts, in `run.json`."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from theria.testing.machine import machine

FILE = "run.json"
ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 10.0  # seconds for git, which may sit on a slow network drive


def record(run_dir: Path, command: str, step: int) -> Path:
    """Add a part, begun now at `step`, to the run's `run.json`; one that cannot be read is begun anew."""
    path = run_dir / FILE
    part = {
        "command": command,
        "step": step,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "machine": machine(),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"parts": [*_parts(path), part]}, indent=2) + "\n")
    os.replace(temporary, path)
    return path


def commit(root: Path = ROOT) -> dict[str, Any] | None:
    """{"hash": ..., "dirty": whether a tracked file differs from it}; None where `root` is no checkout of its own."""
    top, head, changes = (
        _git(root, *arguments)
        for arguments in (("rev-parse", "--show-toplevel"), ("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    if not top or not head or changes is None or Path(top).resolve() != root.resolve():
        return None
    return {"hash": head, "dirty": bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _parts(path: Path) -> list[Any]:
    try:
        return list(json.loads(path.read_text())["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []
