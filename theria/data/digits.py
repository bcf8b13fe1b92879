"""scikit-learn's digits, 1,797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak 1998, UCI), as few-shot classes.

A class is a digit turned by some angle. A 0, 1 or 8 turned by 180 degrees is one again, and a 6 turned by 180 degrees
is a 9: two such classes could not be told apart, so these five digits are turned by 0 and 90 degrees only, the other
five by 0, 90, 180 and 270. That makes 30 classes. The nearest neighbour in pixels tells them apart with an accuracy of
98.1 % (leave one out); its most frequent confusion is a 2 with a 2 turned by 180 degrees, 3 % of them.

The subsets hold different digits, so that test digits are never seen in training; 6 and 9 are in the same one.

| subset | digits | classes |
|---|---|---|
| train | 0, 2, 5, 7, 8 | 16 |
| val | 1, 4 | 6 |
| test | 3, 6, 9 | 8 |

With so few classes this is a check that a learner runs and learns, on real handwriting; it is no benchmark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from theria.data.cache import cached_arrays, missing_extra
from theria.data.classes import ClassDataset

if TYPE_CHECKING:
    import numpy as np

_VERSION = 1
_SIZE = 28
_HALF_TURN_TWINS = (0, 1, 6, 8, 9)
DIGITS = {"train": (0, 2, 5, 7, 8), "val": (1, 4), "test": (3, 6, 9)}


def _quarters(digit: int) -> tuple[int, ...]:
    """By how many quarter turns the digit is turned to make its classes."""
    return (0, 1) if digit in _HALF_TURN_TWINS else (0, 1, 2, 3)


def load_digits(subset: str = "train") -> ClassDataset:
    """The digits of a subset ("train", "val" or "test") as classes of uint8 images (1, 28, 28), ink = 255.

    174 to 183 samples a class. Names are like "3@90" (counter-clockwise), groups and origins are the digits. Needs
    scikit-learn.
    """
    if subset not in DIGITS:
        raise ValueError(f"load_digits: subset={subset!r}; one of {', '.join(map(repr, DIGITS))} is needed")
    arrays = cached_arrays("digits", {"version": _VERSION, "size": _SIZE}, _build)
    images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    classes = [(digit, quarter) for quarter in range(4) for digit in DIGITS[subset] if quarter in _quarters(digit)]
    parts = [images[labels == digit].rot90(quarter, (-2, -1)) for digit, quarter in classes]
    counts = torch.tensor([len(part) for part in parts])
    return ClassDataset(
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True),
        counts,
        [f"{digit}@{90 * quarter}" if quarter else str(digit) for digit, quarter in classes],
        [str(digit) for digit, _ in classes],
        [digit for digit, _ in classes],
    )


def _build() -> dict[str, np.ndarray]:
    """All digits, 28x28 by bilinear interpolation: images (1797, 1, 28, 28) uint8, labels (1797,) int64."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise missing_extra("scikit-learn", "The data set 'digits'", error) from error
    images, labels = datasets.load_digits(return_X_y=True)
    small = torch.from_numpy(images).view(-1, 1, 8, 8) / 16.0  # ink 0..16
    large = F.interpolate(small, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
    return {"images": large.mul(255).round().to(torch.uint8).numpy(), "labels": labels.astype("int64")}
