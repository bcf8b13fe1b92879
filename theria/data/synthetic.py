"""Families of regression tasks with known statistics: sinusoids and linear functions."""

import math

import torch

from theria.data.draws import Draws
from theria.data.episodes import Episode, check_positive, check_seed, check_step


def _check_numbers(who: str, seed: int, **numbers: int) -> None:
    for name, value in numbers.items():
        check_positive(who, name, value)
    check_seed(who, seed)


class Sinusoid:
    """Sinusoid regression, y = a sin(x - p), of Finn, Abbeel and Levine (MAML, 2017), section 5.1.

    Amplitude a ~ U(0.1, 5) and phase p ~ U(0, pi) are drawn once a task, x ~ U(-5, 5) independently for every point.
    `sample(step)` gives support_x, support_y (T, K, 1) and query_x, query_y (T, Q, 1), float32.
    """

    amplitude = (0.1, 5.0)
    phase = (0.0, math.pi)
    domain = (-5.0, 5.0)

    def __init__(
        self,
        *,
        shots: int = 10,
        queries: int = 10,
        tasks: int = 25,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        _check_numbers("Sinusoid", seed, shots=shots, queries=queries, tasks=tasks)
        self.shots, self.queries, self.tasks, self.seed, self.device = shots, queries, tasks, seed, device

    def sample(self, step: int) -> Episode:
        """The T sinusoids of a step; pure in (seed, step)."""
        check_step("Sinusoid", step)
        draws = Draws(self.seed, step)
        amplitude = draws.uniform(self.tasks, 1, 1, low=self.amplitude[0], high=self.amplitude[1])
        phase = draws.uniform(self.tasks, 1, 1, low=self.phase[0], high=self.phase[1])
        x = draws.uniform(self.tasks, self.shots + self.queries, 1, low=self.domain[0], high=self.domain[1])
        y = amplitude * torch.sin(x - phase)
        x, y = x.to(self.device, torch.float32), y.to(self.device, torch.float32)
        k = self.shots
        return Episode(x[:, :k], y[:, :k], x[:, k:], y[:, k:])


class LinearRegression:
    """Linear functions, y = w.x + noise * e, of Garg, Tsipras, Liang and Valiant (2022).

    w ~ N(0, I_d) once a task, x ~ N(0, I_d) and e ~ N(0, 1) for every point, so that E[y^2] = d + noise^2.
    `sample(step)` gives x (T, n, d) and y (T, n, 1), float32, with n = K support and n = Q query points. With no noise
    the least-squares estimate of minimum norm from n points has the error E[(y - y_hat)^2] = max(0, d - n).
    """

    def __init__(
        self,
        *,
        dim: int = 5,
        shots: int = 10,
        queries: int = 1,
        tasks: int = 64,
        noise: float = 0.0,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        _check_numbers("LinearRegression", seed, dim=dim, shots=shots, queries=queries, tasks=tasks)
        if not (math.isfinite(noise) and noise >= 0.0):
            raise ValueError(f"LinearRegression: noise={noise}; a finite standard deviation of at least 0 is needed")
        self.dim, self.shots, self.queries, self.tasks = dim, shots, queries, tasks
        self.noise, self.seed, self.device = noise, seed, device

    def sample(self, step: int) -> Episode:
        """The T linear functions of a step; pure in (seed, step)."""
        check_step("LinearRegression", step)
        draws = Draws(self.seed, step)
        n, k = self.shots + self.queries, self.shots
        w = draws.normal(self.tasks, self.dim, 1)
        x = draws.normal(self.tasks, n, self.dim)
        y = x @ w
        if self.noise:
            y = y + self.noise * draws.normal(self.tasks, n, 1)
        x, y = x.to(self.device, torch.float32), y.to(self.device, torch.float32)
        return Episode(x[:, :k], y[:, :k], x[:, k:], y[:, k:])
