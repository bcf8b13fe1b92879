"""theria.data.EpisodeSampler: the laws of an episode, its reproducibility, and its refusals."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from theria.data import Augment, ClassDataset, Episode, EpisodeSampler
from theria.data.draws import Draws

# Quantiles of the chi-square law at 99.9 %, by degrees of freedom. The seeds are fixed: no chance in a run.
CHI2_99_9 = {6: 22.46, 7: 24.32, 11: 31.26, 15: 37.70, 23: 49.73, 27: 55.48}
# SHA-256 of the identities in three episodes: the same on every platform, process and version of torch.
GOLDEN = "f9a19446392baae81d2fd34e73d432aa25fb8dc6bf49961406b491f652c6330a"
# The classes of four tasks of distinct origins, frozen likewise.
DISTINCT = [[1, 2, 4, 7], [4, 6, 7, 5], [2, 1, 0, 7], [0, 5, 6, 7]]


def identified(
    classes: int = 8, samples: int = 12, groups: list[str] | None = None, origins: list[int] | None = None
) -> ClassDataset:
    """Float samples (2,) that hold their class and their number within it."""
    c, s = torch.meshgrid(torch.arange(classes), torch.arange(samples), indexing="ij")
    return ClassDataset(torch.stack([c, s], -1).float(), groups=groups, origins=origins)


def sampler(dataset: ClassDataset | None = None, **options) -> EpisodeSampler:
    settings: dict[str, Any] = {"ways": 5, "shots": 2, "queries": 3, "tasks": 4} | options
    return EpisodeSampler(dataset or identified(), **settings)


def digest() -> str:
    """What GOLDEN froze: episodes of every option."""
    dataset = identified(groups=["a"] * 5 + ["b"] * 3)
    parts = []
    for options in ({}, {"seed": -3, "shuffle": False}, {"seed": 2**70, "within_groups": 0.5, "ways": 3}):
        for step in (0, 1, 10**12):
            parts += [field.to(torch.int64).flatten() for field in sampler(dataset, **options).sample(step)]
    return hashlib.sha256(repr(torch.cat(parts).tolist()).encode()).hexdigest()


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_episode_is_consistent(shuffle: bool) -> None:
    for step in range(20):
        episode = sampler(shuffle=shuffle, tasks=6).sample(step)
        assert [tuple(f.shape) for f in episode] == [(6, 10, 2), (6, 10), (6, 15, 2), (6, 15)]
        assert [f.dtype for f in episode] == [torch.float32, torch.int64, torch.float32, torch.int64]
        for t in range(6):
            task = episode.task(t)
            items = [tuple(x) for x in [*task.support_x.long().tolist(), *task.query_x.long().tolist()]]
            assert len(set(items)) == 25  # no sample twice: support and query are disjoint
            labels = [*task.support_y.tolist(), *task.query_y.tolist()]
            class_of_label = {(label, item[0]) for label, item in zip(labels, items, strict=True)}
            assert len(class_of_label) == 5  # one class a label,
            assert len({c for _, c in class_of_label}) == 5  # one label a class
            assert Counter(task.support_y.tolist()) == dict.fromkeys(range(5), 2)
            assert Counter(task.query_y.tolist()) == dict.fromkeys(range(5), 3)


def test_unshuffled_items_come_class_by_class_and_shuffled_ones_do_not() -> None:
    plain, shuffled = sampler(shuffle=False).sample(1), sampler().sample(1)
    assert torch.equal(plain.support_y, torch.arange(5).repeat_interleave(2).expand(4, 10))
    assert torch.equal(plain.query_y, torch.arange(5).repeat_interleave(3).expand(4, 15))
    assert not torch.equal(shuffled.support_y[0], shuffled.support_y[1])
    assert not torch.equal(shuffled.query_y[0], plain.query_y[0])


def test_position_tells_nothing_of_the_label() -> None:
    first = torch.cat([sampler(ways=8, tasks=400).sample(step).query_y[:, 0] for step in range(4)])
    assert float(((first.bincount(minlength=8) - 200) ** 2 / 200).sum()) < CHI2_99_9[7]


def test_classes_pairs_and_samples_are_uniform() -> None:
    source = sampler(ways=2, shots=1, queries=1, tasks=700, shuffle=False)
    episodes = [source.sample(step) for step in range(4)]
    classes = torch.cat([e.support_x[..., 0] for e in episodes]).long()  # (2800, 2)
    by_label = classes[:, 0].bincount(minlength=8)
    assert float(((by_label - 350) ** 2 / 350).sum()) < CHI2_99_9[7]
    low, high = classes.min(1).values, classes.max(1).values
    pairs = (8 * low + high).unique(return_counts=True)[1]
    assert len(pairs) == 28
    assert float(((pairs - 100) ** 2 / 100).sum()) < CHI2_99_9[27]
    samples = torch.cat([e.query_x[..., 1] for e in episodes]).long().flatten().bincount(minlength=12)
    expected = 5600 / 12
    assert float(((samples - expected) ** 2 / expected).sum()) < CHI2_99_9[11]


def test_ragged_classes_never_give_their_padding() -> None:
    dataset = identified(classes=4, samples=12)
    ragged = ClassDataset(dataset.images, counts=[5, 7, 12, 6])
    seen = [set() for _ in range(4)]
    for step in range(60):
        episode = sampler(ragged, ways=4).sample(step)
        for c, s in torch.cat([episode.support_x, episode.query_x], 1).flatten(0, 1).long().tolist():
            seen[c].add(s)
    assert seen == [set(range(n)) for n in (5, 7, 12, 6)]


def test_within_groups() -> None:
    groups = ["a"] * 5 + ["b"] * 2 + ["c"] * 5
    dataset = identified(classes=12, groups=groups)

    def groups_seen(probability: float) -> list[str]:
        x = sampler(dataset, within_groups=probability, tasks=500).sample(0).support_x[..., 0].long()
        return ["".join(sorted({groups[c] for c in row})) for row in x.tolist()]

    inside = Counter(groups_seen(True))
    assert set(inside) == {"a", "c"}  # "b" has too few classes
    assert abs(inside["a"] - 250) < 4 * (500 / 4) ** 0.5
    # Without the constraint, 5 of 12 classes fall in one group with probability 2 / C(12, 5) = 2 / 792.
    assert sum(len(g) == 1 for g in groups_seen(False)) < 10
    assert abs(sum(len(g) == 1 for g in groups_seen(0.5)) - 251) < 4 * (500 / 4) ** 0.5


def turned_corners(**options) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Characters and their quarter turns, both (T, N), of the supports and the queries of tasks of distinct origins.

    Character c of 6 is an image with c + 1 in one corner: a turn moves it to another.
    """
    images = torch.zeros(6, 2, 1, 2, 2)
    images[..., 0, 0] = torch.arange(1.0, 7.0)[:, None, None]
    settings = {"ways": 5, "shots": 1, "queries": 1, "shuffle": False, "distinct_origins": True} | options
    episode = sampler(ClassDataset(images).with_rotations(), **settings).sample(0)
    corners = [x.flatten(2).max(-1) for x in (episode.support_x, episode.query_x)]
    return [(values.long() - 1, places) for values, places in corners]


def test_distinct_origins_are_distinct_and_support_and_query_turned_alike() -> None:
    (characters, turns), (queried, queried_turns) = turned_corners(tasks=2000)
    assert all(len(set(row)) == 5 for row in characters.tolist())
    assert torch.equal(characters, queried)
    assert torch.equal(turns, queried_turns)
    repeated = [len(set(row)) < 5 for row in turned_corners(tasks=2000, distinct_origins=False)[0][0].tolist()]
    assert abs(sum(repeated) / 2000 - 0.855) < 0.05  # 1 - 6 * 4^5 / C(24, 5): the default does hold them


def test_each_of_distinct_origins_has_a_uniform_turn_of_its_own() -> None:
    characters, turns = turned_corners(tasks=2400)[0]
    classes = (4 * characters + turns)[:, 0].bincount(minlength=24)
    assert float(((classes - 100) ** 2 / 100).sum()) < CHI2_99_9[23]
    pairs = (4 * turns[:, 0] + turns[:, 1]).bincount(minlength=16)
    assert float(((pairs - 150) ** 2 / 150).sum()) < CHI2_99_9[15]


def test_origins_of_different_sizes_are_equally_likely() -> None:
    origins = [9, 2, 9, 9, 2, 5, 9]
    dataset = identified(classes=7, origins=origins)
    episode = sampler(dataset, ways=2, shots=1, tasks=2400, shuffle=False, distinct_origins=True).sample(0)
    classes = episode.support_x[..., 0].long()
    assert all(origins[a] != origins[b] for a, b in classes.tolist())
    expected = torch.tensor([800 / origins.count(origin) for origin in origins])
    seen = classes[:, 0].bincount(minlength=7)
    assert float(((seen - expected) ** 2 / expected).sum()) < CHI2_99_9[6]


def test_distinct_origins_are_pure_in_seed_and_step() -> None:
    dataset = identified(origins=[0, 1, 2, 3] * 2)
    one, same = (sampler(dataset, ways=4, seed=1, distinct_origins=True) for _ in range(2))
    one.sample(0)
    assert all(torch.equal(a, b) for a, b in zip(one.sample(9), same.sample(9), strict=True))
    assert not torch.equal(one.sample(9).support_x, one.sample(10).support_x)
    other = sampler(dataset, ways=4, seed=2, distinct_origins=True)
    assert not torch.equal(one.sample(9).support_x, other.sample(9).support_x)
    unshuffled = sampler(dataset, ways=4, shots=1, shuffle=False, seed=1, distinct_origins=True).sample(9)
    assert unshuffled.support_x[..., 0].tolist() == DISTINCT


def test_origins_of_one_class_each_change_no_bit() -> None:
    dataset = identified().select([6, 1, 4, 0, 3, 7])
    for a, b in zip(sampler(dataset).sample(3), sampler(dataset, distinct_origins=True).sample(3), strict=True):
        assert torch.equal(a, b)


def test_uint8_becomes_zero_to_one_and_float_stays() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1, 1).expand(3, 2, 1, 1, 1)
    episode = EpisodeSampler(ClassDataset(images), ways=3, shots=1, queries=1, tasks=2).sample(0)
    assert episode.support_x.shape == (2, 3, 1, 1, 1)
    assert sorted(episode.support_x[0].flatten().tolist()) == [0.0, pytest.approx(0.2, abs=1e-8), 1.0]
    assert sampler().sample(0).support_x.max() > 1.0  # floats are not scaled


def test_pure_in_seed_and_step() -> None:
    one, same, other = sampler(seed=1), sampler(seed=1), sampler(seed=2)
    one.sample(0)  # what was sampled before has no influence
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(one.sample(9), same.sample(9), strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator is not touched
    assert not torch.equal(one.sample(9).support_x, one.sample(10).support_x)
    assert not torch.equal(one.sample(9).support_x, other.sample(9).support_x)


def test_the_same_in_every_process() -> None:
    code = "import importlib.util, sys; s = importlib.util.spec_from_file_location('t', sys.argv[1]); "
    code += "m = importlib.util.module_from_spec(s); s.loader.exec_module(m); print(m.digest())"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code, __file__],
            env=os.environ | {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed, threads in ((1, 1), (2, 2))
    ]
    assert outputs == [GOLDEN, GOLDEN]


class CountOperators(TorchDispatchMode):
    """Counts the operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("distinct", [False, True])
def test_the_work_is_fused(distinct: bool) -> None:
    """The number of operators depends on neither tasks nor ways nor shots; one gather fetches every image."""
    images = ClassDataset(torch.zeros(50, 20, 1, 28, 28, dtype=torch.uint8), origins=[*range(25)] * 2)
    counted = []
    augment = Augment(rotation=0.2, elastic=0.1, stroke=0.03)
    for tasks, ways, shots in ((2, 2, 2), (64, 20, 5)):
        options = {"ways": ways, "shots": shots, "tasks": tasks, "augment": augment, "distinct_origins": distinct}
        source = EpisodeSampler(images, queries=5, **options)
        with CountOperators() as mode:
            source.sample(0)
        counted.append(mode.counts)
    assert counted[0] == counted[1]
    assert counted[0]["aten::index_select"] == 1


def characters(classes: int = 6) -> ClassDataset:
    pixels = torch.randint(256, (classes, 8, 1, 12, 12), generator=torch.Generator().manual_seed(0))
    return ClassDataset(pixels.to(torch.uint8))


def test_augmentation_deforms_the_images_of_the_same_episode() -> None:
    augment = Augment(rotation=0.3, elastic=0.1, stroke=0.05)
    plain, deformed = sampler(characters(), seed=3), sampler(characters(), seed=3, augment=augment)
    one, other = plain.sample(5), deformed.sample(5)
    assert torch.equal(one.support_y, other.support_y)
    assert torch.equal(one.query_y, other.query_y)
    draws = Draws(3, 5)
    classes = draws.distinct(6, 4, 5)
    draws.distinct(8, *classes.shape, 5)
    draws.permutation(4, 10)
    draws.permutation(
        4, 15
    )  # what an episode takes; deformations are drawn after it, the support's before the queries'
    images = torch.cat([one.support_x.flatten(0, 1), one.query_x.flatten(0, 1)])
    expected = augment(images, draws)
    assert torch.equal(other.support_x.flatten(0, 1), expected[:40])
    assert torch.equal(other.query_x.flatten(0, 1), expected[40:])
    again = sampler(characters(), seed=3, augment=augment)
    again.sample(2)
    assert all(torch.equal(a, b) for a, b in zip(again.sample(5), other, strict=True))


def test_no_augmentation_and_one_of_zero_are_the_same_bits() -> None:
    for a, b in zip(sampler(characters()).sample(1), sampler(characters(), augment=Augment()).sample(1), strict=True):
        assert torch.equal(a, b)


def test_fields_are_contiguous() -> None:
    assert all(field.is_contiguous() for field in sampler(characters(), augment=Augment(shift=0.1)).sample(0))


def test_an_episode_is_a_pytree_for_vmap() -> None:
    episode = sampler().sample(0)
    mean = torch.func.vmap(lambda task: task.support_x.mean() + task.query_y.sum())(episode)
    assert mean.shape == (4,)
    assert isinstance(episode.to("cpu"), Episode)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ways": 9}, ValueError, "9 ways need 9 classes, the data set has 8; lower `ways`"),
        ({"shots": 8, "queries": 5}, ValueError, "8 shots and 5 queries need 13 samples a class, .* has 12; lower"),
        ({"ways": 0}, ValueError, "ways=0; at least 1"),
        ({"shots": -1}, ValueError, "shots=-1; at least 1"),
        ({"queries": 0}, ValueError, "queries=0; at least 1"),
        ({"tasks": 0}, ValueError, "tasks=0; at least 1"),
        ({"tasks": 2.0}, TypeError, "tasks=2.0 is a float; a positive integer"),
        ({"shots": True}, TypeError, "shots=True is a bool"),
        ({"seed": 1.5}, TypeError, "seed=1.5 is a float; an integer"),
        ({"seed": True}, TypeError, "seed=True is a bool"),
        ({"seed": "1"}, TypeError, "seed='1' is a str"),
        ({"within_groups": 1.5}, ValueError, r"within_groups=1.5; a probability in \[0, 1\]"),
        ({"within_groups": -0.1}, ValueError, "within_groups=-0.1"),
        ({"distinct_origins": 1}, TypeError, "distinct_origins=1 is a int; a bool is needed"),
        ({"distinct_origins": True, "within_groups": 0.5}, ValueError, "within_groups=0.5; .* within_groups=False"),
        ({"distinct_origins": True, "ways": 9}, ValueError, "9 ways of distinct origins need 9 origins"),
        ({"augment": Augment(shift=0.1)}, ValueError, r"augment: samples of shape \(2,\) cannot be deformed; images"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(options, error, message) -> None:
    with pytest.raises(error, match=message):
        sampler(**options)


def test_the_smallest_class_is_named() -> None:
    ragged = ClassDataset(identified(3).images, counts=[12, 4, 12], names=["x", "tiny", "z"])
    with pytest.raises(ValueError, match=r"class 1 \('tiny'\) has 4; .*dataset.select\(dataset.counts >= 5\)"):
        sampler(ragged, ways=2)
    sampler(ragged.select(ragged.counts >= 5), ways=2)  # what the message proposes works


def test_groups_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a group of at least 5 classes, the largest of the 2 groups .'a'. has 4"):
        sampler(identified(groups=["a"] * 4 + ["b"] * 4), within_groups=True)


def test_too_few_origins_are_refused() -> None:
    dataset = identified(origins=[0, 1, 2, 3] * 2)
    sampler(dataset)
    with pytest.raises(ValueError, match=r"need 5 origins, the 8 classes have 4; lower `ways`.*distinct_origins=False"):
        sampler(dataset, distinct_origins=True)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_wrong_steps_are_refused(step, error) -> None:
    with pytest.raises(error, match=f"step={step}"):
        sampler().sample(step)
