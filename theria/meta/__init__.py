"""Learning to learn. How an inner solution is differentiated is a value; every algorithm takes any of them."""

from theria.meta.adjoint import Adjoint, FirstOrder, Unrolled
from theria.meta.higher_engine import Higher
from theria.meta.maml import ANIL, FOMAML, MAML
from theria.meta.mixed_mode import MixedMode
from theria.meta.optimisers import SGD, InnerOptimiser

__all__ = [
    "ANIL",
    "FOMAML",
    "MAML",
    "SGD",
    "Adjoint",
    "FirstOrder",
    "Higher",
    "InnerOptimiser",
    "MixedMode",
    "Unrolled",
]
