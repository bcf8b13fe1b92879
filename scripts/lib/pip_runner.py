"""Runs pip for bootstrap.py and says in one line why it failed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

NO_NETWORK = re.compile(
    r"NewConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|ProxyError|SSLError|Max retries exceeded"
    r"|Failed to establish a new connection|Network is unreachable|Connection (refused|reset|aborted|broken)",
    re.IGNORECASE,
)
NO_SPACE = re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE)
NOT_FOUND = re.compile(r"No matching distribution found")


class Problem(Exception):
    """Something is missing that the user can provide; its text says what and how."""


def run_pip(python: Path, root: Path, arguments: tuple[str, ...]) -> tuple[int, str]:
    """`pip install` with its output passed on to stderr; returns the exit status and what it wrote as errors."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    command = [str(python), "-m", "pip", "install", *arguments]
    with subprocess.Popen(
        command, cwd=root, env=variables, stdout=sys.stderr, stderr=subprocess.PIPE, text=True
    ) as pip:
        assert pip.stderr is not None
        errors = []
        for line in pip.stderr:
            sys.stderr.write(line)
            errors.append(line)
    return pip.returncode, "".join(errors)


def not_found(errors: str) -> bool:
    """Whether pip found no such package: none of its indexes has it, or it could reach none."""
    return NOT_FOUND.search(errors) is not None


def no_network(errors: str) -> bool:
    """Whether pip could not reach an index."""
    return NO_NETWORK.search(errors) is not None


def explain_pip(errors: str, what: str) -> Problem:
    """The error to show for a pip that failed to install `what`."""
    if NO_SPACE.search(errors):
        return Problem(f"the disk is full: pip could not install {what}. Free some space and run again.")
    if no_network(errors):
        return Problem(
            f"no network: pip could not reach a package index for {what}. Check the connection (and HTTPS_PROXY, or "
            "PIP_INDEX_URL for a mirror), then run the same command again: it goes on from here."
        )
    if not_found(errors):
        return Problem(f"the package index has not all of {what} for Python {platform.python_version()}; see above.")
    return Problem(f"pip could not install {what}; its message is above. Run the same command again once it is solved.")
