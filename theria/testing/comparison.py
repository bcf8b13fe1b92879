"""The three-way comparison: float64 truth, plain PyTorch in the tested dtype, and the implementation under test.

An implementation is accurate when its error is at most ``ratio`` times that of plain PyTorch in the same dtype (2 for
the output, 3 for derivatives, as FlashAttention's tests ask), plus a noise floor. No number here depends on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from theria.testing.compositions import COMPOSITIONS
from theria.testing.laws import difference
from theria.testing.samples import Attend, Sample, naive_attention

OUTPUT_RATIO = 2.0
DERIVATIVE_RATIO = 3.0
# A few roundings of the result itself, for the cases in which plain PyTorch happens to be almost exact.
FLOOR_ROUNDINGS = 4


@dataclass(frozen=True)
class Comparison:
    """Errors of one composition, relative to float64 (Frobenius norm over all results).

    Attributes:
        composition: its name.
        error: of the implementation under test.
        plain: of plain PyTorch in the same dtype.
        bound: what ``error`` may be.
    """

    composition: str
    error: float
    plain: float
    bound: float

    @property
    def accurate(self) -> bool:
        """NaN never passes."""
        return self.error <= self.bound


def compare(attend: Attend, sample: Sample, composition: str, dtype: torch.dtype) -> Comparison:
    """Compare ``attend`` with the truth in one composition.

    Args:
        attend: like :func:`theria.ops.sdpa`.
        sample: a float64 sample without dropout (the naive truth has none).
        composition: a key of :data:`theria.testing.compositions.COMPOSITIONS`.
        dtype: what ``attend`` and plain PyTorch compute in. The truth is computed in float64 from the values rounded
            to it.
    """
    compose = COMPOSITIONS[composition]
    rounded = sample.to(dtype)
    truth = compose(naive_attention, rounded.to(torch.float64))
    plain = difference(compose(naive_attention, rounded), truth)
    error = difference(compose(attend, rounded), truth)
    ratio = OUTPUT_RATIO if composition == "forward" else DERIVATIVE_RATIO
    return Comparison(composition, error, plain, ratio * plain + FLOOR_ROUNDINGS * torch.finfo(dtype).eps)
