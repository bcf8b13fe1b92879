"""Images by class: the one container that every few-shot data set of this package is brought into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROTATIONS = ("", "@90", "@180", "@270")
_MIRRORED = " mirrored"
SYMMETRIES = 8  # of the square


def symmetry(images: Tensor, index: int) -> Tensor:
    """Square images (..., H, H) under one of the eight symmetries of the square, in the order of `with_symmetries`.

    Turned counter-clockwise by `index` % 4 quarters, and from 4 on then mirrored, left and right exchanged.
    """
    turned = images.rot90(index % 4, (-2, -1))
    return turned if index < 4 else turned.flip(-1)


class ClassDataset:
    """Samples arranged by class.

    Args:
        images: (classes, samples, *x), uint8 (0..255), bool or floating. Images of rank 4, (classes, samples, H, W),
            get a channel axis and become (classes, samples, 1, H, W).
        counts: (classes,) how many samples of each class are real, for ragged classes padded to the longest one.
        names: one name a class. Default: its number.
        groups: one group a class (an alphabet, a script), for tasks drawn within one group. Default: one group.
        origins: (classes,) which class of the untransformed data set each class came from, for tasks in which no two
            classes came from one. Default: each its own number.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; the message says which and what is needed.
    """

    def __init__(
        self,
        images: Tensor,
        counts: Tensor | Sequence[int] | None = None,
        names: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        origins: Tensor | Sequence[int] | None = None,
    ) -> None:
        self.images = _checked_images(images)
        classes, samples = self.images.shape[:2]
        self.counts = _checked_counts(counts, classes, samples)
        self.names = _checked_labels("names", names, [str(c) for c in range(classes)])
        self.groups = _checked_labels("groups", groups, [""] * classes)
        self.origins = _checked_origins(origins, classes)

    def __len__(self) -> int:
        """The number of classes."""
        return self.images.shape[0]

    def __repr__(self) -> str:
        low, high = int(self.counts.min()), int(self.counts.max())
        samples = f"{low}" if low == high else f"{low} to {high}"
        shape, groups = tuple(self.images.shape[2:]), len(set(self.groups))
        return f"ClassDataset({len(self)} classes of {samples} samples {shape}, {groups} groups, {self.images.dtype})"

    @classmethod
    def from_pairs(cls, images: Any, labels: Any, names: Sequence[str] | None = None) -> ClassDataset:
        """From n samples in any order: images (n, *x) and integer labels (n,), arrays or tensors.

        The classes are the distinct labels in rising order; `names`, if given, has one name for each of them.
        Samples keep their order within a class. Classes of different sizes are padded (see `counts`).
        """
        images, labels = torch.as_tensor(images), torch.as_tensor(labels).cpu()
        if labels.ndim != 1 or labels.is_floating_point() or images.ndim < 1 or len(labels) != len(images):
            raise ValueError(
                f"from_pairs: labels of shape {tuple(labels.shape)} and type {labels.dtype} for images of shape "
                f"{tuple(images.shape)}; needed: one integer label for each of the n samples, images (n, *x) and "
                "labels (n,)"
            )
        if len(labels) == 0:
            raise ValueError("from_pairs: no samples were given; at least one is needed")
        _, class_of, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        order = class_of.argsort(stable=True)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(labels)) - first[class_of[order]]
        grid = images.new_zeros((len(counts), int(counts.max()), *images.shape[1:]))
        grid[class_of[order], place] = images[order]
        return cls(grid, counts, names)

    @classmethod
    def from_torchvision(cls, dataset: Any) -> ClassDataset:
        """From a map-style data set of (image, label) pairs, as torchvision's are, with its own transforms.

        An image is a tensor (kept as it is), an array (kept) or a PIL image (to uint8, channels first). All images
        need one shape: give the data set a `Resize` transform otherwise. Reads every sample once.
        """
        if len(dataset) == 0:
            raise ValueError("from_torchvision: the data set is empty; at least one (image, label) pair is needed")
        images, labels = [], []
        for index in range(len(dataset)):
            image, label = dataset[index]
            images.append(_image_tensor(image))
            labels.append(int(label))
            if images[-1].shape != images[0].shape:
                raise ValueError(
                    f"from_torchvision: image {index} has shape {tuple(images[-1].shape)}, image 0 has "
                    f"{tuple(images[0].shape)}; one shape is needed: give the data set a Resize transform"
                )
        known = getattr(dataset, "classes", None)
        present = sorted(set(labels))
        names = [str(known[c]) for c in present] if known is not None and present[-1] < len(known) else None
        return cls.from_pairs(torch.stack(images), torch.tensor(labels), names)

    def select(self, classes: Tensor | Sequence[int]) -> ClassDataset:
        """The data set of the given classes only: indices in the wanted order, or a boolean mask (classes,).

        Raises:
            ValueError: neither of both, an index that is no class, or no class at all.
        """
        chosen = torch.as_tensor(classes).cpu()
        given = f"select: classes has shape {tuple(chosen.shape)} and type {chosen.dtype}"
        if chosen.dtype == torch.bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"{given}; a mask has one entry for each of the {len(self)} classes")
            chosen = chosen.nonzero().flatten()
        if chosen.numel() == 0:
            raise ValueError(f"select: no class was chosen of the {len(self)}; at least one is needed")
        if chosen.ndim != 1 or chosen.is_floating_point() or chosen.is_complex():
            raise ValueError(f"{given}; a list of integers, the indices of classes, or a boolean mask is needed")
        chosen = chosen.to(torch.int64)
        if int(chosen.min()) < -len(self) or int(chosen.max()) >= len(self):
            raise ValueError(
                f"select: indices run from {int(chosen.min())} to {int(chosen.max())}; each must lie between 0 and "
                f"{len(self) - 1}, or count from the end, down to {-len(self)}"
            )
        indices = chosen.tolist()
        return ClassDataset(
            self.images[chosen],
            self.counts[chosen],
            [self.names[c] for c in indices],
            [self.groups[c] for c in indices],
            self.origins[chosen],
        )

    def with_rotations(self) -> ClassDataset:
        """Every class also turned by 90, 180 and 270 degrees, as classes of their own: 4x classes, 4x memory.

        Class r * len(self) + c is class c turned by r * 90 degrees counter-clockwise (Santoro et al. 2016). A turned
        class stays in the group of the class that it came from, and keeps its origin.
        """
        self._check_square("with_rotations")
        turned = torch.cat([symmetry(self.images, quarter) for quarter in range(4)])
        names = [name + suffix for suffix in _ROTATIONS for name in self.names]
        return ClassDataset(turned, self.counts.repeat(4), names, self.groups * 4, self.origins.repeat(4))

    def with_symmetries(self) -> ClassDataset:
        """Every class under the eight symmetries of the square, as classes of their own: 8x classes, 8x memory.

        Those of `with_rotations`, then the mirror images (left and right exchanged) of all four. A group under a
        symmetry is a group of its own: the characters of a task from one group all face the same way, and a character
        that looks like its mirror image does not meet it there under another label.
        """
        self._check_square("with_symmetries")
        turned = self.with_rotations()
        groups = [group + suffix for suffix in _ROTATIONS for group in self.groups]
        return ClassDataset(
            torch.cat([turned.images, turned.images.flip(-1)]),
            turned.counts.repeat(2),
            [*turned.names, *(name + _MIRRORED for name in turned.names)],
            [*groups, *(group + _MIRRORED for group in groups)],
            turned.origins.repeat(2),
        )

    def _check_square(self, who: str) -> None:
        height, width = self.images.shape[-2:]
        if self.images.ndim < 5 or height != width:
            raise ValueError(
                f"{who}: samples of shape {tuple(self.images.shape[2:])}; square images (C, H, H) are needed"
            )


def _checked_images(images: Tensor) -> Tensor:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"ClassDataset: images is a {type(images).__name__}; a tensor is needed: torch.as_tensor(images)"
        )
    if images.ndim < 3 or 0 in images.shape:
        raise ValueError(
            f"ClassDataset: images has shape {tuple(images.shape)}; (classes, samples, *x) with no empty axis is needed"
        )
    if images.dtype == torch.bool:
        images = images.to(torch.uint8).mul_(255)
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"ClassDataset: images is {images.dtype}; uint8 (0..255), bool or a floating type is needed")
    return images.unsqueeze(2) if images.ndim == 4 else images


def _checked_counts(counts: Tensor | Sequence[int] | None, classes: int, samples: int) -> Tensor:
    if counts is None:
        return torch.full((classes,), samples)
    counts = torch.as_tensor(counts)
    if counts.shape != (classes,) or counts.is_floating_point():
        raise ValueError(
            f"ClassDataset: counts has shape {tuple(counts.shape)} and type {counts.dtype}; {classes} integers are "
            "needed, one a class"
        )
    if int(counts.min()) < 1 or int(counts.max()) > samples:
        raise ValueError(
            f"ClassDataset: counts run from {int(counts.min())} to {int(counts.max())}; each must lie between 1 and "
            f"{samples}, the length of the samples axis"
        )
    return counts.to(torch.int64)


def _checked_origins(origins: Tensor | Sequence[int] | None, classes: int) -> Tensor:
    if origins is None:
        return torch.arange(classes)
    origins = torch.as_tensor(origins)
    if origins.shape != (classes,) or origins.is_floating_point() or origins.dtype == torch.bool:
        raise ValueError(
            f"ClassDataset: origins has shape {tuple(origins.shape)} and type {origins.dtype}; {classes} integers are "
            "needed, one a class"
        )
    return origins.to(torch.int64)


def _checked_labels(what: str, given: Sequence[str] | None, default: list[str]) -> tuple[str, ...]:
    labels = tuple(default if given is None else given)
    if len(labels) != len(default):
        raise ValueError(f"ClassDataset: {len(labels)} {what} for {len(default)} classes; one a class is needed")
    return labels


def _image_tensor(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if hasattr(image, "getbands"):  # a PIL image
        import numpy as np

        pixels = torch.from_numpy(np.array(image))
        pixels = pixels.unsqueeze(-1) if pixels.ndim == 2 else pixels
        return pixels.movedim(-1, 0)
    return torch.as_tensor(image)
