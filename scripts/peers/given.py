"""A problem as a peer gets it: numpy arrays from a file and losses for its own array library. Imports numpy alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from losses import LOSSES

ITERATIONS = 200  # of a conjugate gradient: far more than the 32 unknowns of the largest problem
RESIDUAL = 1e-13  # relative, at which an iterative solver may stop


@dataclass(frozen=True)
class Given:
    """As `theria.testing.problems.Problem`, by value.

    Attributes:
        data: what the losses read.
        inner0, outer0: the starting points; `starts_at_outer`: the inner one is `outer0`, repeated, and differentiable.
        solution: z at `outer0`, exact.
        rate: of gradient descent.
        steps: to take in the inner problem when unrolled; `exactly` says that the problem is that of so many steps,
            else they are as many as give the solution to rounding.
    """

    name: str
    data: dict[str, Any]
    inner0: Any
    outer0: Any
    solution: Any
    rate: float
    steps: int
    exactly: bool
    starts_at_outer: bool

    def losses(self, xp: Any, array: Callable[[Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """(z, x) -> scalar of `xp`, inner and outer; `array` makes its arrays of numpy's."""
        data = {key: float(value) if value.ndim == 0 else array(value) for key, value in self.data.items()}
        inner, outer = LOSSES[self.name]
        return partial(inner, xp, data), partial(outer, xp, data)

    @property
    def solved(self) -> bool:
        """Whether it is an implicit problem: its answer is that at the solution of the inner problem."""
        return not self.exactly

    @property
    def series(self) -> int | None:
        """The highest power in the Neumann series that is the exact answer, where it is one."""
        return self.steps - 1 if self.name == "neumann" else None


def load(path: Path) -> Given:
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    data = {key[5:]: value for key, value in arrays.items() if key.startswith("data_")}
    return Given(
        name=str(arrays["name"]),
        data=data,
        inner0=arrays["inner0"],
        outer0=arrays["outer0"],
        solution=arrays["solution"],
        rate=float(arrays["rate"]),
        steps=int(arrays["steps"]),
        exactly=bool(arrays["exactly"]),
        starts_at_outer=bool(arrays["starts_at_outer"]),
    )
