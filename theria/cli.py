"""The `theria` command. `theria info` prints what a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence

import torch

PACKAGES = ("theria", "torch", "triton", "numpy", "higher", "hydra-core", "wandb")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def device() -> str:
    """The first CUDA device that torch can use, or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, {torch.cuda.device_count()} visible)"


def info() -> str:
    """One `name  value` line each for the platform, the device and the packages that matter."""
    rows = [
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        *((package, version(package)) for package in PACKAGES),
        ("cuda of torch", torch.version.cuda or "none"),
        ("device", device()),
        ("threads", str(torch.get_num_threads())),
    ]
    return "\n".join(f"{name:<14} {value}" for name, value in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="theria", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions and devices, for a bug report")
    parser.parse_args(arguments)
    print(info())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
