"""Bilevel optimisation: minimise f(z*(x), x) over x, where z*(x) minimises g(z, x) over z.

| method | differentiates | for |
|---|---|---|
| `ITD` | through the inner steps, by any adjoint | short inner loops, any order of derivative |
| `AID` | the inner solution, by equation 1 and a linear solver, warm-started | inner problems that are solved |
| `SOBA` | the same, in a single loop over batches | losses that are means over data |
| `SABA` | the same with SAGA's memory | finite sums; linear convergence |
| `F2SA` | a penalty, first derivatives alone | inner problems without Hessian-vector products |
"""

from theria.meta.bilevel.aid import AID
from theria.meta.bilevel.directions import Directions
from theria.meta.bilevel.f2sa import F2SA, F2SAInfo, F2SAState
from theria.meta.bilevel.itd import ITD
from theria.meta.bilevel.problem import BilevelProblem, Evaluation, HypergradientResult, Method
from theria.meta.bilevel.soba import SABA, SOBA, SABAState, SOBAState

__all__ = [
    "AID",
    "F2SA",
    "ITD",
    "SABA",
    "SOBA",
    "BilevelProblem",
    "Directions",
    "Evaluation",
    "F2SAInfo",
    "F2SAState",
    "HypergradientResult",
    "Method",
    "SABAState",
    "SOBAState",
]
