"""Matrix-free linear solvers on pytrees: `solver.solve(matvec, b) -> Solution(value, result, residual, iterations)`.

| solver | operator | products an iteration |
|---|---|---|
| `CG` | symmetric positive definite | 1 |
| `MINRES` | symmetric | 1 |
| `GMRES` | any square | 1, and memory that grows with `restart` |
| `BiCGSTAB` | any square | 2 |
| `NormalCG` | any, rectangular too | 1 and 1 with the transpose |
| `Neumann` | the spectral radius of I - scale A below 1 | 1 |
| `Nystrom` | damped positive semidefinite, approximate | `rank` in all |
| `Dense` | any square, small | N in all |
"""

from theria.meta.solvers.base import IterativeSolver, LinearSolver
from theria.meta.solvers.bicgstab import BiCGSTAB
from theria.meta.solvers.cg import CG, NormalCG
from theria.meta.solvers.dense import Dense
from theria.meta.solvers.gmres import GMRES
from theria.meta.solvers.minres import MINRES
from theria.meta.solvers.neumann import Neumann
from theria.meta.solvers.nystrom import Nystrom
from theria.meta.solvers.solution import Result, Solution, SolverError

__all__ = [
    "CG",
    "GMRES",
    "MINRES",
    "BiCGSTAB",
    "Dense",
    "IterativeSolver",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Result",
    "Solution",
    "SolverError",
]
