"""The `theria` command.

theria info    versions and devices, for a bug report
theria check   the contract of attention's derivatives, on this machine, for every backend that it has
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence

import torch
from torch import Tensor

from theria.ops import CAPABILITIES, sdpa
from theria.testing import COMPOSITIONS, DIRECTIONAL, LAWS, applies, difference, naive_attention, standard_samples
from theria.testing.samples import Attend, Sample

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


# In float64 both sides are exact to rounding; the bounds leave two to three digits for sums and condition.
TRUTH_BOUND, LAW_BOUND = 1e-10, 1e-12


def worst_composition(attend: Attend, samples: Sequence[Sample]) -> tuple[float, str]:
    """The largest error against autograd of naive softmax over all compositions of derivatives, and where it is."""
    known = [s for s in samples if "dropout_p" not in s.options]  # the naive formula has no dropout
    cases = [(name, s) for name in COMPOSITIONS for s in (known if name in DIRECTIONAL else known[:1])]

    def error(name: str, s: Sample) -> float:
        return difference(COMPOSITIONS[name](attend, s), COMPOSITIONS[name](naive_attention, s))

    return max(((error(name, s), f"{name}, {s.name}") for name, s in cases), key=_nan_is_worst)


def worst_law(attend: Attend, samples: Sequence[Sample]) -> tuple[float, str]:
    """The largest violation of a law that needs no reference, and where it is."""
    cases = [(law, s) for law in LAWS for s in samples if applies(law, s)]
    return max(((LAWS[law](attend, s), f"{law}, {s.name}") for law, s in cases), key=_nan_is_worst)


def _nan_is_worst(error: tuple[float, str]) -> float:
    return float("inf") if error[0] != error[0] else error[0]


def check(attention: Attend = sdpa) -> int:
    """Prints one row a backend, device and kind of check; returns the number of rows that fail."""
    failed = 0
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        samples = [s.to(device=device) for s in standard_samples()]
        for backend, capability in CAPABILITIES.items():
            missing = capability.missing() or (None if torch.float64 in capability.dtypes else "has no float64")
            if missing:
                print(f"{backend:<10} {device:<5} not checked: {missing}")
                continue

            def attend(*operands: Tensor, backend: str = backend, **options: object) -> Tensor:
                return attention(*operands, backend=backend, **options)

            for kind, worst, bound in (("truth", worst_composition, TRUTH_BOUND), ("laws", worst_law, LAW_BOUND)):
                error, where = worst(attend, samples)
                right = error <= bound
                failed += not right
                verdict = "ok" if right else f"FAILED: above {bound:.0e}"
                print(f"{backend:<10} {device:<5} {kind:<6} {error:8.1e}  {verdict:<20} at worst: {where}")
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="theria", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions and devices, for a bug report")
    commands.add_parser("check", help="the contract of attention's derivatives on this machine")
    if parser.parse_args(arguments).command == "check":
        return 1 if check() else 0
    print(info())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
