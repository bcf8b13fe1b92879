"""theria.data.draws: the published SplitMix64, and the laws of what is drawn from it."""

import pytest
import torch

from theria.data.draws import Draws, mix64

# The first outputs of the reference implementation (Vigna, splitmix64.c) from the state 1234567.
SPLITMIX64 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
CHI2_99_9 = {9: 27.88, 23: 49.73}  # quantiles of the chi-square law by degrees of freedom; the seeds are fixed


def test_bits_are_splitmix64() -> None:
    draws = Draws(0)
    draws._state = 1234567
    got = [*draws.bits(2).tolist(), *draws.bits(3).tolist()]  # a second call continues the stream
    assert [value % 2**64 for value in got] == SPLITMIX64


def test_steps_and_seeds_have_streams_of_their_own() -> None:
    states = {Draws(seed, step)._state for seed in (-1, 0, 1, 2**40) for step in range(2000)}
    assert len(states) == 4 * 2000
    assert len({mix64(value) for value in range(10_000)}) == 10_000


def test_uniform_lies_inside_and_has_the_moments() -> None:
    u = Draws(3).uniform(200_000, low=-2.0, high=4.0)
    assert u.dtype == torch.float64
    assert -2.0 < float(u.min()) < -1.999
    assert 3.999 < float(u.max()) < 4.0
    standard_error = (36 / 12 / 200_000) ** 0.5
    assert abs(float(u.mean()) - 1.0) < 4 * standard_error
    assert float(u.var()) == pytest.approx(3.0, rel=0.02)


def test_normal_has_the_moments() -> None:
    z = Draws(4).normal(200_000)
    assert abs(float(z.mean())) < 4 / 200_000**0.5
    assert float(z.var()) == pytest.approx(1.0, abs=4 * (2 / 200_000) ** 0.5)
    assert float((z**4).mean()) == pytest.approx(3.0, abs=4 * (96 / 200_000) ** 0.5)


def test_integers_are_uniform() -> None:
    counts = Draws(5).integers(10, 50_000).bincount(minlength=10)
    assert len(counts) == 10
    assert float(((counts - 5000) ** 2 / 5000).sum()) < CHI2_99_9[9]


def test_choose_takes_available_places_once_in_uniform_order() -> None:
    available = torch.tensor([[True, False, True, True, False, True]]).expand(24_000, 6)
    chosen = Draws(6).choose(available, 4)
    assert torch.equal(chosen.sort().values, torch.tensor([0, 2, 3, 5]).expand(24_000, 4))
    code = (chosen * torch.tensor([216, 36, 6, 1])).sum(1)
    counts = code.unique(return_counts=True)[1]
    assert len(counts) == 24  # each of the 4! orders
    assert float(((counts - 1000) ** 2 / 1000).sum()) < CHI2_99_9[23]


def test_distinct_is_choose_where_everything_is_available() -> None:
    everything = torch.ones(7, 5, 30, dtype=torch.bool)
    assert torch.equal(Draws(8).distinct(30, 7, 5, 4), Draws(8).choose(everything, 4))
    one, other = Draws(8), Draws(8)
    one.distinct(30, 7, 5, 4)
    other.choose(everything, 4)
    assert torch.equal(one.bits(3), other.bits(3))  # and the stream goes on alike


def test_draws_are_made_where_they_are_wanted() -> None:
    for device in ("cpu", "meta"):
        assert Draws(9).uniform(2, 3, device=device).device.type == device


def test_permutation_is_one() -> None:
    permutation = Draws(7).permutation(5, 40)
    assert torch.equal(permutation.sort().values, torch.arange(40).expand(5, 40))
    assert not torch.equal(permutation[0], permutation[1])
