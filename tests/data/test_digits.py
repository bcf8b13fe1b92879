"""theria.data.load_digits against scikit-learn's own arrays."""

import builtins
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import datasets

from theria.data import EpisodeSampler, load_digits
from theria.data.digits import DIGITS

ROUNDING = 0.501 / 255  # to the nearest uint8
NEAREST_NEIGHBOUR = 0.97  # 98.1 % measured over the 30 classes, leave one out


def test_the_counts_of_the_docstring() -> None:
    loaded = {subset: load_digits(subset) for subset in DIGITS}
    assert {subset: len(dataset) for subset, dataset in loaded.items()} == {"train": 16, "val": 6, "test": 8}
    digits = [{name[0] for name in dataset.names} for dataset in loaded.values()]
    assert digits == [{"0", "2", "5", "7", "8"}, {"1", "4"}, {"3", "6", "9"}]
    counts = torch.cat([dataset.counts for dataset in loaded.values()])
    assert (int(counts.min()), int(counts.max())) == (174, 183)
    assert sum(int(d.counts[d.names.index(n)]) for d in loaded.values() for n in d.names if "@" not in n) == 1797
    assert all(d.images.shape[2:] == (1, 28, 28) and d.images.dtype == torch.uint8 for d in loaded.values())


def test_no_class_is_the_half_turn_of_another() -> None:
    for subset in DIGITS:
        assert not {"0@180", "1@180", "8@180", "6@180", "9@180", "6@270", "9@270"} & set(load_digits(subset).names)


def test_a_turned_digit_has_the_origin_of_its_digit() -> None:
    dataset = load_digits("test")
    assert dataset.origins.tolist() == [int(name.split("@")[0]) for name in dataset.names]
    assert len(dataset.origins.unique()) == 3


def test_pixels_are_those_of_scikit_learn() -> None:
    images, labels = datasets.load_digits(return_X_y=True)
    threes = images[labels == 3].reshape(-1, 8, 8) / 16
    dataset = load_digits("test")
    ours = dataset.images[dataset.names.index("3"), : len(threes), 0].numpy() / 255
    # Bilinear interpolation is linear interpolation along each axis, between the centres of the pixels.
    at = (np.arange(28) + 0.5) * 8 / 28 - 0.5
    for small, large in zip(threes, ours, strict=True):
        rows = np.stack([np.interp(at, np.arange(8), row) for row in small])
        expected = np.stack([np.interp(at, np.arange(8), column) for column in rows.T]).T
        assert np.abs(large - expected).max() < ROUNDING
    turned = dataset.images[dataset.names.index("3@90"), 0, 0]
    assert torch.equal(turned, dataset.images[dataset.names.index("3"), 0, 0].rot90(1))


def test_classes_can_be_told_apart() -> None:
    x, y = [], []
    for subset in DIGITS:
        dataset = load_digits(subset)
        for c, n in enumerate(dataset.counts.tolist()):
            x.append(dataset.images[c, :n].flatten(1) / 255)
            y += [f"{dataset.names[c]}"] * n
    distance = torch.cdist(torch.cat(x), torch.cat(x)).fill_diagonal_(torch.inf)
    hits = sum(y[i] == y[j] for i, j in enumerate(distance.argmin(1).tolist()))
    assert hits / len(y) > NEAREST_NEIGHBOUR


def test_five_ways_from_every_subset() -> None:
    for subset in DIGITS:
        episode = EpisodeSampler(load_digits(subset), ways=5, shots=1, queries=15, tasks=2).sample(0)
        assert episode.query_x.shape == (2, 75, 1, 28, 28)
        assert float(episode.query_x.max()) == 1.0


def test_an_unknown_subset_is_refused() -> None:
    with pytest.raises(ValueError, match="subset='dev'; one of 'train', 'val', 'test'"):
        load_digits("dev")


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real(name, *args, **kwargs)

    monkeypatch.setenv("THERIA_CACHE", str(tmp_path))
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"needs scikit-learn, .*pip install -e \"\.\[experiments\]\""):
        load_digits()
