"""Few-shot episodes: N-way, K-shot tasks drawn from images by class."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from theria.data.augment import Augment, check_images
from theria.data.classes import ClassDataset
from theria.data.draws import Draws


class Episode(NamedTuple):
    """A batch of T tasks; a pytree, so that `torch.func.vmap` maps over its tasks."""

    support_x: Tensor  # (T, N*K, *x)
    support_y: Tensor  # (T, N*K) int64 in [0, N), or float targets (T, K, *y)
    query_x: Tensor  # (T, N*Q, *x)
    query_y: Tensor  # (T, N*Q)

    def to(self, device: torch.device | str) -> Episode:
        """The same episode on another device."""
        return Episode(*(field.to(device) for field in self))

    def task(self, index: int) -> Episode:
        """One task of the batch, without the leading T."""
        return Episode(*(field[index] for field in self))


class TaskSource(Protocol):
    """Where tasks come from."""

    def sample(self, step: int) -> Episode:
        """The episode of a step: a pure function of (seed, step), so that resuming needs the step alone."""
        ...


class EpisodeSampler:
    """N-way, K-shot tasks with Q queries a class, T at a time.

    The classes of a task are drawn without replacement and labelled 0..N-1 in the random order of their draw; the K
    support and Q query samples of a class are drawn without replacement, so that no query is in its support. The items
    of a task are shuffled: their position tells nothing of their label. Nothing loops over images or tasks in Python.

    Args:
        dataset: the images; moved to `device` once.
        ways, shots, queries, tasks: N, K, Q and T, all at least 1.
        seed: with the step, determines the episode on every machine.
        within_groups: the probability that all classes of a task come from one group of the data set (drawn uniformly
            from the groups with at least N classes). False and True are 0 and 1.
        distinct_origins: no two classes of a task came from one class of the untransformed data set: N of its classes
            are drawn without replacement, then one class of each, uniformly. With `with_rotations` each of them is
            under one random quarter turn: so the code of Finn et al. 2017 draws all its tasks, and that of Antoniou et
            al. 2019 those of training (it tests on the characters as they are).
        shuffle: False keeps the items class by class: item i of the support has label i // K.
        augment: deforms every image of every task by draws of its own, support and queries alike; None: as they are.
            Which images a step has does not depend on it.
        device: where the images are held and the episodes are returned.

    Raises:
        TypeError, ValueError: a number that is not a positive integer, or more classes or samples than there are.
    """

    def __init__(
        self,
        dataset: ClassDataset,
        *,
        ways: int,
        shots: int,
        queries: int,
        tasks: int,
        seed: int = 0,
        within_groups: bool | float = False,
        distinct_origins: bool = False,
        shuffle: bool = True,
        augment: Augment | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in {"ways": ways, "shots": shots, "queries": queries, "tasks": tasks}.items():
            check_positive("EpisodeSampler", name, value)
        check_seed("EpisodeSampler", seed)
        if not isinstance(distinct_origins, bool):
            kind = type(distinct_origins).__name__
            raise TypeError(f"EpisodeSampler: distinct_origins={distinct_origins!r} is a {kind}; a bool is needed")
        self.distinct_origins = distinct_origins
        self._origins = _origins_of(dataset, ways) if distinct_origins else None  # (O, M) int64, (O,) int64
        _check_enough(dataset, ways, shots, queries)
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle
        self.ways, self.shots, self.queries, self.tasks = ways, shots, queries, tasks
        self.within_groups = float(within_groups)
        if not 0.0 <= self.within_groups <= 1.0:
            raise ValueError(f"EpisodeSampler: within_groups={within_groups}; a probability in [0, 1] is needed")
        if distinct_origins and self.within_groups:
            raise ValueError(
                f"EpisodeSampler: distinct_origins=True and within_groups={within_groups}; classes of distinct origins "
                "are drawn from all groups: give within_groups=False or distinct_origins=False"
            )
        self._groups = _groups_of(dataset, ways) if self.within_groups else None  # (G, C) bool
        self._samples = dataset.images.shape[1]
        ragged = int(dataset.counts.min()) < self._samples
        self._valid = torch.arange(self._samples) < dataset.counts[:, None] if ragged else None  # (C, S) bool
        self.augment = None if augment is None or augment.is_identity else augment
        if self.augment is not None:
            check_images("EpisodeSampler: augment", tuple(dataset.images.shape[2:]), dataset.images.ndim == 5)
        self._flat = dataset.images.flatten(0, 1).to(device or dataset.images.device)  # (C*S, *x)

    def sample(self, step: int) -> Episode:
        """The T tasks of a step, pure in (seed, step). x float32 (uint8 images scaled to [0, 1]), y int64."""
        check_step("EpisodeSampler", step)
        draws = Draws(self.seed, step)
        classes = self._classes(draws)  # (T, N)
        rows = classes[..., None] * self._samples + self._samples_of(draws, classes)  # (T, N, K+Q)
        labels = torch.arange(self.ways)[:, None].expand(rows.shape)
        support = self._arranged(draws, rows[..., : self.shots], labels[..., : self.shots])
        query = self._arranged(draws, rows[..., self.shots :], labels[..., self.shots :])
        numbers = torch.cat([part.flatten() for pair in zip(support, query, strict=True) for part in pair])
        index, y = _moved(numbers, self._flat).chunk(2)
        parts = [support[0].numel(), query[0].numel()]
        fields = zip(self._gathered(draws, index).split(parts), y.split(parts), strict=True)
        return Episode(*(field.unflatten(0, (self.tasks, -1)) for pair in fields for field in pair))

    def _classes(self, draws: Draws) -> Tensor:
        """(T, N) int64, distinct in each row."""
        if self._origins is not None:
            members, counts = self._origins
            origins = draws.distinct(len(counts), self.tasks, self.ways)
            places = (draws.uniform(*origins.shape) * counts[origins]).to(torch.int64)
            return members[origins, places]
        if self._groups is None:
            return draws.distinct(len(self.dataset), self.tasks, self.ways)
        group = draws.integers(len(self._groups), self.tasks)
        anywhere = draws.uniform(self.tasks) >= self.within_groups
        return draws.choose(self._groups[group] | anywhere[:, None], self.ways)

    def _samples_of(self, draws: Draws, classes: Tensor) -> Tensor:
        """(T, N, K+Q) int64, distinct samples of each class."""
        k = self.shots + self.queries
        if self._valid is None:
            return draws.distinct(self._samples, *classes.shape, k)
        return draws.choose(self._valid[classes], k)

    def _arranged(self, draws: Draws, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and labels (T, N, k) as (T, N*k), shuffled within each task if asked for."""
        rows, labels = rows.flatten(1), labels.flatten(1)
        if not self.shuffle:
            return rows, labels
        order = draws.permutation(*rows.shape)
        return rows.gather(1, order), labels.gather(1, order)

    def _gathered(self, draws: Draws, index: Tensor) -> Tensor:
        """The images (n, *x) of an index (n,), by one gather, deformed if asked for."""
        x = self._flat.index_select(0, index)
        x = x.to(torch.float32).div_(255.0) if x.dtype == torch.uint8 else x.to(torch.float32)
        return x if self.augment is None else self.augment(x, draws)


def _moved(numbers: Tensor, beside: Tensor) -> Tensor:
    """A CPU tensor on the device of `beside`. To a GPU from pinned memory, which alone does not wait for the GPU."""
    if beside.is_cuda:
        return numbers.pin_memory().to(beside.device, non_blocking=True)
    return numbers.to(beside.device)


def check_positive(who: str, name: str, value: int) -> None:
    """Raises unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who}: {name}={value!r} is a {type(value).__name__}; a positive integer is needed")
    if value < 1:
        raise ValueError(f"{who}: {name}={value}; at least 1 is needed")


def check_seed(who: str, seed: int) -> None:
    """Raises unless `seed` is an integer."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{who}: seed={seed!r} is a {type(seed).__name__}; an integer is needed")


def check_step(who: str, step: int) -> None:
    """Raises unless `step` is an integer of at least 0."""
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"{who}: step={step!r} is a {type(step).__name__}; a non-negative integer is needed")
    if step < 0:
        raise ValueError(f"{who}: step={step}; steps count from 0")


def _check_enough(dataset: ClassDataset, ways: int, shots: int, queries: int) -> None:
    if ways > len(dataset):
        raise ValueError(
            f"EpisodeSampler: {ways} ways need {ways} classes, the data set has {len(dataset)}; lower `ways`, or add "
            "classes (dataset.with_rotations() gives four times as many)"
        )
    smallest = int(dataset.counts.argmin())
    have, need = int(dataset.counts[smallest]), shots + queries
    if need > have:
        raise ValueError(
            f"EpisodeSampler: {shots} shots and {queries} queries need {need} samples a class, class {smallest} "
            f"({dataset.names[smallest]!r}) has {have}; lower `shots` or `queries`, or drop the small classes: "
            f"dataset.select(dataset.counts >= {need})"
        )


def _origins_of(dataset: ClassDataset, ways: int) -> tuple[Tensor, Tensor] | None:
    """(O, M) int64 the classes of each origin, padded, and (O,) int64 how many they are; None: each has its own."""
    counts = dataset.origins.unique(return_counts=True)[1]
    if len(counts) < ways:
        raise ValueError(
            f"EpisodeSampler: {ways} ways of distinct origins need {ways} origins, the {len(dataset)} classes have "
            f"{len(counts)}; lower `ways`, add classes that are no turned or mirrored ones, or give "
            "distinct_origins=False"
        )
    if len(counts) == len(dataset):
        return None
    classes = dataset.origins.argsort(stable=True).split(counts.tolist())
    return pad_sequence([*classes], batch_first=True), counts


def _groups_of(dataset: ClassDataset, ways: int) -> Tensor:
    """(G, C) bool: the classes of each group that has at least `ways` of them."""
    names = sorted(set(dataset.groups))
    number = {name: i for i, name in enumerate(names)}
    group = torch.tensor([number[name] for name in dataset.groups])
    member = group == torch.arange(len(names))[:, None]
    sizes = member.sum(1)
    if int(sizes.max()) < ways:
        raise ValueError(
            f"EpisodeSampler: within_groups needs a group of at least {ways} classes, the largest of the {len(names)} "
            f"groups ({names[int(sizes.argmax())]!r}) has {int(sizes.max())}; lower `ways` or give within_groups=False"
        )
    return member[sizes >= ways]
