"""Where a figure comes from."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

import theria


def machine() -> dict[str, Any]:
    """Processor, GPU, cores, threads and versions, to be kept with every measured figure."""
    return {
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "theria": theria.__version__,
    }


def _cpu() -> str:
    """The model's name (Linux), or what the platform calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
