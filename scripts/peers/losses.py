"""The losses of `theria.testing.problems` for any array library `xp`: torch, jax.numpy.

Written a second time, from the formulas; `exchange.export` refuses a problem whose own losses give other numbers.
Names of the data as there: z inner, x outer, "inner_"/"outer_" for the two losses' own numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

Data = Mapping[str, Any]
Loss = Callable[[Any, Data, Any, Any], Any]


def _sigmoid(xp: Any, x: Any) -> Any:
    return 1 / (1 + xp.exp(-x))


def _cross_entropy(xp: Any, logits: Any, targets: Any) -> Any:
    """(n,) of logits (n, k) and probabilities (n, k)."""
    log_normaliser = xp.log(xp.exp(logits).sum(-1))
    return log_normaliser - (logits * targets).sum(-1)


def quadratic(side: str) -> Loss:
    """z'Hz/2 + x'Bx/2 + x'Cz + c'z + d'x."""

    def loss(xp: Any, data: Data, z: Any, x: Any) -> Any:
        H, B, C, c, d = (data[f"{side}_{name}"] for name in "HBCcd")
        return z @ H @ z / 2 + x @ B @ x / 2 + x @ C @ z + c @ z + d @ x

    return loss


def ridge_inner(xp: Any, data: Data, z: Any, x: Any) -> Any:
    return ((data["inner_X"] @ z - data["inner_y"]) ** 2).mean() / 2 + (x * z**2).sum() / 2


def ridge_outer(xp: Any, data: Data, z: Any, x: Any) -> Any:
    return ((data["outer_Xv"] @ z - data["outer_yv"]) ** 2).mean() / 2


def least_squares_inner(xp: Any, data: Data, z: Any, x: Any) -> Any:
    errors = ((data["inner_A"] @ z - data["inner_Y"]) ** 2).sum(1)
    return (_sigmoid(xp, x) * errors).mean() / 2 + data["inner_c"] * (z**2).sum() / 2


def least_squares_outer(xp: Any, data: Data, z: Any, x: Any) -> Any:
    return ((data["outer_B"] @ z - data["outer_Z"]) ** 2).sum(1).mean() / 2


def cleaning_inner(xp: Any, data: Data, z: Any, x: Any) -> Any:
    entropies = _cross_entropy(xp, data["inner_A"] @ z, data["inner_Y"])
    return (_sigmoid(xp, x) * entropies).mean() + data["inner_c"] * (z**2).sum()


def cleaning_outer(xp: Any, data: Data, z: Any, x: Any) -> Any:
    return _cross_entropy(xp, data["outer_B"] @ z, data["outer_Z"]).mean()


def _energies(xp: Any, A: Any, linear: Any, z: Any) -> Any:
    """(T,): z'A z / 2 - linear'z of each task."""
    return xp.einsum("ti,tij,tj->t", z, A, z) / 2 - (linear * z).sum(-1)


def tasks_inner(xp: Any, data: Data, z: Any, x: Any) -> Any:
    return _energies(xp, data["inner_A"], data["inner_s"], z).sum()


def proximal_inner(xp: Any, data: Data, z: Any, x: Any) -> Any:
    return tasks_inner(xp, data, z, x) + data["inner_proximal"] / 2 * ((z - x) ** 2).sum()


def tasks_outer(xp: Any, data: Data, z: Any, x: Any) -> Any:
    return _energies(xp, data["outer_A"], data["outer_q"], z).mean()


QUADRATIC = (quadratic("inner"), quadratic("outer"))
RIDGE = (ridge_inner, ridge_outer)
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "textbook": QUADRATIC,
    "quadratic": QUADRATIC,
    "benchmark_quadratic": QUADRATIC,
    "neumann": QUADRATIC,
    "ridge": RIDGE,
    "ridge_per_feature": RIDGE,
    "least_squares_cleaning": (least_squares_inner, least_squares_outer),
    "hyper_cleaning": (cleaning_inner, cleaning_outer),
    "maml": (tasks_inner, tasks_outer),
    "imaml": (proximal_inner, tasks_outer),
}
