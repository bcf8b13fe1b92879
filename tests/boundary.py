"""What the boundary tests of every backend run over."""

from __future__ import annotations

from typing import Any

from theria.testing import LAWS, Sample, applies, standard_samples

SAMPLES = list(standard_samples())
WITH_TRUTH = [s for s in SAMPLES if "dropout_p" not in s.options]  # the naive formula has no dropout
LAW_CASES = [(law, s) for law in LAWS for s in SAMPLES if applies(law, s)]


def ids(value: Any) -> str:
    return value.name if isinstance(value, Sample) else str(value)
