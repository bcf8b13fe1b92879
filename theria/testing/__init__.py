"""The conformance suite that ships with theria: import it to test an attention, or a learner, of your own."""

from theria.testing.comparison import Comparison, compare
from theria.testing.compositions import COMPOSITIONS, DIRECTIONAL, third_order
from theria.testing.laws import LAWS, applies, difference
from theria.testing.samples import Sample, chained, make_sample, masks, naive_attention, standard_samples

__all__ = [
    "COMPOSITIONS",
    "DIRECTIONAL",
    "LAWS",
    "Comparison",
    "Sample",
    "applies",
    "chained",
    "compare",
    "difference",
    "make_sample",
    "masks",
    "naive_attention",
    "standard_samples",
    "third_order",
]
