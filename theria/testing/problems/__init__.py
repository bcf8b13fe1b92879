"""Bilevel problems with exact answers, for any library: `PROBLEMS[name](seed, dtype, device)` makes a `Problem`.

| name | inner problem | exact answer |
|---|---|---|
| `textbook` | two-dimensional, fixed numbers | closed form |
| `quadratic` | random quadratics of a given condition number | closed form |
| `benchmark_quadratic` | the simulated finite sum of benchmark_bilevel | closed form |
| `neumann` | K + 1 steps from the solution | the Neumann series with the powers 0 to K |
| `ridge`, `ridge_per_feature` | ridge regression, the penalty is learned | closed form |
| `least_squares_cleaning` | weighted least squares, a weight a sample is learned | closed form |
| `hyper_cleaning` | weighted softmax regression | Newton's method and a dense Hessian, to rounding |
| `maml` | a number of gradient steps on quadratic tasks | powers of I - rate A |
| `imaml` | quadratic tasks with a proximal term | closed form |
"""

from collections.abc import Callable

from theria.testing.problems.problem import Problem, Samples
from theria.testing.problems.quadratics import benchmark_quadratic, neumann, quadratic, textbook
from theria.testing.problems.regression import hyper_cleaning, least_squares_cleaning, ridge, ridge_per_feature
from theria.testing.problems.tasks import imaml, maml

PROBLEMS: dict[str, Callable[..., Problem]] = {
    make.__name__: make
    for make in (
        textbook,
        quadratic,
        benchmark_quadratic,
        neumann,
        ridge,
        ridge_per_feature,
        least_squares_cleaning,
        hyper_cleaning,
        maml,
        imaml,
    )
}

__all__ = [
    "PROBLEMS",
    "Problem",
    "Samples",
    "benchmark_quadratic",
    "hyper_cleaning",
    "imaml",
    "least_squares_cleaning",
    "maml",
    "neumann",
    "quadratic",
    "ridge",
    "ridge_per_feature",
    "textbook",
]
