"""Sinusoid and LinearRegression against the closed forms of their laws."""

import math

import pytest
import torch

from theria.data import LinearRegression, Sinusoid

FLOAT32 = 2e-5  # outputs are rounded to float32, values reach 5


def test_sinusoid_is_a_sinusoid_of_the_paper() -> None:
    episode = Sinusoid(shots=10, queries=20, tasks=500, seed=1).sample(3)
    assert [tuple(field.shape) for field in episode] == [(500, 10, 1), (500, 10, 1), (500, 20, 1), (500, 20, 1)]
    x = torch.cat([episode.support_x, episode.query_x], 1).double()
    y = torch.cat([episode.support_y, episode.query_y], 1).double()
    # a sin(x - p) = (a cos p) sin x - (a sin p) cos x: two linear coefficients fit all 30 points.
    basis = torch.cat([x.sin(), x.cos()], -1)
    coefficients = torch.linalg.lstsq(basis, y).solution[..., 0]
    assert float((basis @ coefficients[..., None] - y).abs().max()) < FLOAT32
    amplitude = coefficients.norm(dim=-1)
    phase = torch.atan2(-coefficients[:, 1], coefficients[:, 0])
    assert 0.1 - FLOAT32 < float(amplitude.min()) < 0.2
    assert 4.9 < float(amplitude.max()) < 5.0 + FLOAT32
    assert -1e-3 < float(phase.min()) < 0.05
    assert math.pi - 0.05 < float(phase.max()) < math.pi + 1e-3
    assert float(x.min()) < -4.99
    assert float(x.max()) > 4.99
    assert float(x.abs().max()) <= 5.0


def test_sinusoid_second_moment() -> None:
    """E y^2 = E a^2 E sin^2(x - p) = (5^3 - 0.1^3) / (3 * 4.9) / 2, as p covers a whole period of sin^2."""
    y = torch.cat([Sinusoid(tasks=2000, seed=2).sample(step).query_y for step in range(10)]).double()
    per_task = (y**2).mean((1, 2))
    expected = (125 - 0.001) / (3 * 4.9) / 2
    standard_error = float(per_task.std()) / len(per_task) ** 0.5
    assert standard_error < 0.05
    assert abs(float(per_task.mean()) - expected) < 4 * standard_error


@pytest.mark.parametrize("noise", [0.0, 2.0])
def test_linear_regression_second_moment_is_dim_plus_noise(noise: float) -> None:
    y = LinearRegression(dim=5, shots=4, queries=4, tasks=20_000, noise=noise, seed=3).sample(0).support_y.double()
    per_task = (y**2).mean((1, 2))
    standard_error = float(per_task.std()) / len(per_task) ** 0.5
    assert abs(float(per_task.mean()) - (5 + noise**2)) < 4 * standard_error


@pytest.mark.parametrize(("points", "relative_error"), [(5, 0.75), (10, 0.5), (15, 0.25), (20, 0.0), (25, 0.0)])
def test_minimum_norm_error_is_one_minus_n_over_d(points: int, relative_error: float) -> None:
    """Garg et al. 2022: the mean squared error of the minimum-norm fit, over d = 20, is 1 - n/d for n < d, then 0."""
    episode = LinearRegression(dim=20, shots=points, queries=20, tasks=1000, seed=4).sample(1)
    x, y, query_x, query_y = (field.double() for field in episode)
    w = torch.linalg.pinv(x) @ y
    # A square Gaussian matrix is ill-conditioned now and then, which amplifies the float32 rounding: take the median.
    per_task = ((query_x @ w - query_y) ** 2).mean((1, 2)) / 20
    if relative_error == 0.0:
        assert float(per_task.median()) < 1e-9
    else:
        assert abs(float(per_task.mean()) - relative_error) < 4 * float(per_task.std()) / 1000**0.5


@pytest.mark.parametrize("make", [Sinusoid, LinearRegression])
def test_pure_in_seed_and_step(make) -> None:
    one, same, other = make(seed=5), make(seed=5), make(seed=6)
    one.sample(0)
    assert all(torch.equal(a, b) for a, b in zip(one.sample(7), same.sample(7), strict=True))
    assert not torch.equal(one.sample(7).support_x, one.sample(8).support_x)
    assert not torch.equal(one.sample(7).support_x, other.sample(7).support_x)
    assert all(field.dtype == torch.float32 for field in one.sample(7))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sinusoid(shots=0), ValueError, "Sinusoid: shots=0; at least 1"),
        (lambda: Sinusoid(tasks=2.5), TypeError, "tasks=2.5 is a float; a positive integer"),  # pyright: ignore
        (lambda: Sinusoid(seed=1.5), TypeError, "Sinusoid: seed=1.5 is a float; an integer"),  # pyright: ignore
        (lambda: LinearRegression(seed=True), TypeError, "LinearRegression: seed=True is a bool; an integer"),
        (lambda: LinearRegression(dim=-1), ValueError, "LinearRegression: dim=-1"),
        (lambda: LinearRegression(noise=-1.0), ValueError, "noise=-1.0; a finite standard deviation"),
        (lambda: LinearRegression(noise=math.inf), ValueError, "noise=inf"),
        (lambda: Sinusoid().sample(-1), ValueError, "step=-1; steps count from 0"),
        (lambda: LinearRegression().sample("0"), TypeError, "step='0' is a str"),  # pyright: ignore
    ],
)
def test_wrong_input_is_refused_in_words(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
