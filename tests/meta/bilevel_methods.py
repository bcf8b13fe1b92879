"""What the tests of ITD and AID share: methods that solve a problem to rounding."""

import torch

from theria.meta import SGD, Unrolled
from theria.meta.bilevel import AID, ITD, BilevelProblem
from theria.meta.solvers import CG

CLOSED = 1e-10  # float64, a closed form against an inner problem and a linear system solved to rounding
CONVERGED = 1e-13  # the share of the first error that the inner steps leave
TIGHT = CG(rtol=1e-13)


def close(actual, expected, tolerance=CLOSED):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def bilevel(problem):
    return BilevelProblem(problem.inner_loss, problem.outer_loss)


def aid(problem, solver=TIGHT, **options):
    return AID(SGD(problem.rate), problem.steps_to(CONVERGED), solver, **options)


def itd(problem, adjoint=None):
    return ITD(SGD(problem.rate), problem.steps_to(CONVERGED), adjoint or Unrolled())
