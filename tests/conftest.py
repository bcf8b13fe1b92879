"""Shared by all tests: no test depends on the order, and no result on memory that nobody wrote.

Without a GPU the kernels run in Triton's interpreter, which is decided before anything imports Triton.
"""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the suite runs in several processes


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new uninitialised floating memory with NaN, so that a result that was never written shows."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poison(*args: object, _original=original, **kwargs: object) -> torch.Tensor:
            x = _original(*args, **kwargs)
            return x.fill_(float("nan")) if x.dtype.is_floating_point else x

        monkeypatch.setattr(torch, name, poison)


def pytest_configure(config: pytest.Config) -> None:
    """Triton's interpreter turns arrays of one element into loop bounds, which numpy warns about."""
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
