"""theria.data.ClassDataset: what goes in comes out by class, and wrong input is refused in words."""

import numpy as np
import pytest
import torch
from PIL import Image

from theria.data import ClassDataset


def numbered(classes: int = 3, samples: int = 4, side: int = 2) -> torch.Tensor:
    """uint8 images whose first pixel is 16 * class + sample."""
    images = torch.zeros(classes, samples, 1, side, side, dtype=torch.uint8)
    images[..., 0, 0, 0] = 16 * torch.arange(classes)[:, None] + torch.arange(samples)
    return images


def test_images_without_channels_get_one_and_booleans_become_ink() -> None:
    assert ClassDataset(torch.zeros(3, 4, 5, 6)).images.shape == (3, 4, 1, 5, 6)
    assert ClassDataset(torch.zeros(3, 4, 7)).images.shape == (3, 4, 7)
    assert ClassDataset(torch.ones(2, 2, 1, 3, 3, dtype=torch.bool)).images.unique().tolist() == [255]


def test_from_pairs_sorts_by_label_and_keeps_the_order_within() -> None:
    labels = np.array([7, 3, 7, 9, 3, 7])
    images = torch.arange(6.0).view(6, 1)
    dataset = ClassDataset.from_pairs(images, labels, names=["three", "seven", "nine"])
    assert dataset.counts.tolist() == [2, 3, 1]
    got = [dataset.images[c, :n, 0].tolist() for c, n in enumerate(dataset.counts.tolist())]
    assert got == [[1.0, 4.0], [0.0, 2.0, 5.0], [3.0]]
    assert dataset.names == ("three", "seven", "nine")


class Pairs:
    """A torchvision-style data set."""

    classes = ("ant", "bee", "cat")

    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple:
        return self.items[index]


def test_from_torchvision_reads_pil_tensors_and_arrays() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    pil = ClassDataset.from_torchvision(Pairs([(Image.fromarray(pixels), 2), (Image.fromarray(pixels + 1), 0)]))
    assert pil.images.shape == (2, 1, 3, 2, 4)
    assert torch.equal(pil.images[1, 0], torch.from_numpy(pixels).permute(2, 0, 1))
    assert pil.names == ("ant", "cat")
    grey = ClassDataset.from_torchvision(Pairs([(Image.fromarray(pixels[..., 0]), 0)]))
    assert grey.images.shape == (1, 1, 1, 2, 4)
    tensors = ClassDataset.from_torchvision(Pairs([(torch.full((1, 2, 2), 0.5), 1), (np.ones((1, 2, 2), "f4"), 1)]))
    assert tensors.images.dtype == torch.float32
    assert tensors.images[0, :, 0, 0, 0].tolist() == [0.5, 1.0]


def test_select_by_indices_and_mask() -> None:
    dataset = ClassDataset(numbered(), counts=[4, 2, 3], names=["a", "b", "c"], groups=["g", "g", "h"])
    picked = dataset.select([2, 0])
    assert (picked.names, picked.groups, picked.counts.tolist()) == (("c", "a"), ("h", "g"), [3, 4])
    assert picked.images[:, 0, 0, 0, 0].tolist() == [32, 0]
    assert dataset.select(dataset.counts >= 3).names == ("a", "c")
    assert dataset.select(torch.tensor([-1, 1], dtype=torch.int16)).names == ("c", "b")


def test_origins_are_the_classes_before_the_turns() -> None:
    dataset = ClassDataset(numbered())
    assert dataset.origins.tolist() == [0, 1, 2]
    assert dataset.origins.dtype == torch.int64
    turned, eight = dataset.with_rotations(), dataset.with_symmetries()
    assert [name.split("@")[0] for name in turned.names] == [str(c) for c in turned.origins.tolist()]
    assert [name.split("@")[0].split(" ")[0] for name in eight.names] == [str(c) for c in eight.origins.tolist()]
    assert turned.select([11, 3, 1]).origins.tolist() == [2, 0, 1]
    assert dataset.select([2, 0]).with_rotations().origins.tolist() == [2, 0] * 4
    assert ClassDataset(numbered(), origins=torch.tensor([7, -1, 7], dtype=torch.int16)).origins.tolist() == [7, -1, 7]
    assert ClassDataset.from_pairs(torch.zeros(4, 2), [5, 5, 9, 9]).origins.tolist() == [0, 1]


def test_with_rotations_turns_counter_clockwise() -> None:
    image = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(1, 1, 1, 2, 2)
    turned = ClassDataset(image, names=["x"], groups=["g"]).with_rotations()
    assert turned.images[:, 0, 0].tolist() == [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    assert turned.names == ("x", "x@90", "x@180", "x@270")
    assert turned.groups == ("g",) * 4
    assert "4 classes of 1 samples" in repr(turned)


def test_with_symmetries_has_each_symmetry_once_and_keeps_groups_apart() -> None:
    images = torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(1, 1, 1, 2, 2).repeat(2, 1, 1, 1, 1)
    images[1] += 4
    eight = ClassDataset(images, names=["x", "y"], groups=["g", "g"]).with_symmetries()
    corners = [tuple(image.flatten().tolist()) for image in eight.images[:, 0, 0]]
    assert set(corners[0::2]) == {
        (1, 2, 3, 4), (2, 4, 1, 3), (4, 3, 2, 1), (3, 1, 4, 2), (2, 1, 4, 3), (4, 2, 3, 1), (3, 4, 1, 2), (1, 3, 2, 4)
    }  # fmt: skip
    assert corners[1::2] == [tuple(pixel + 4 for pixel in corner) for corner in corners[0::2]]
    assert eight.images[8, 0, 0].tolist() == [[2, 1], [4, 3]]
    assert (eight.names[8], eight.groups[8]) == ("x mirrored", "g mirrored")
    assert all(a == b for a, b in zip(eight.groups[0::2], eight.groups[1::2], strict=True))
    assert len(set(eight.groups)) == 8


SMALL = ClassDataset(torch.zeros(3, 4, 2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClassDataset(np.zeros((2, 2, 2))), TypeError, "ndarray; a tensor is needed"),  # pyright: ignore
        (lambda: ClassDataset(torch.zeros(3, 4)), ValueError, r"\(3, 4\); \(classes, samples, \*x\)"),
        (lambda: ClassDataset(torch.zeros(3, 0, 2)), ValueError, "no empty axis"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2, dtype=torch.int64)), TypeError, "int64; uint8"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2), counts=[1, 2]), ValueError, "3 integers are needed"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2), counts=[1, 2, 5]), ValueError, "from 1 to 5; .* between 1 and 4"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2), counts=[0, 2, 4]), ValueError, "from 0 to 4"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2), origins=[0, 1]), ValueError, r"origins .*\(2,\).*3 integers are"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2), origins=torch.zeros(3)), ValueError, "float32; 3 integers are"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2), origins=[True] * 3), ValueError, "bool; 3 integers are"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2), names=["a"]), ValueError, "1 names for 3 classes"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2), groups=["a"]), ValueError, "1 groups for 3 classes"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2)).select([]), ValueError, "no class was chosen of the 3"),
        (lambda: SMALL.select([True, False]), ValueError, r"\(2,\) and type torch.bool; .* each of the 3 classes"),
        (lambda: SMALL.select(torch.ones(4).bool()), ValueError, r"\(4,\) and type torch.bool; .*the 3 classes"),
        (lambda: SMALL.select(torch.ones(3, 1).bool()), ValueError, r"\(3, 1\) and type torch.bool"),
        (lambda: SMALL.select([1.7]), ValueError, r"\(1,\) and type torch.float32; a list of integers"),  # pyright: ignore
        (lambda: SMALL.select([0.0, 1.0]), ValueError, "a list of integers"),  # pyright: ignore
        (lambda: SMALL.select(torch.tensor(1)), ValueError, r"shape \(\) and type torch.int64; a list of integers"),
        (lambda: SMALL.select([0, 3]), ValueError, "from 0 to 3; each must lie between 0 and 2"),
        (lambda: SMALL.select([-4, 1]), ValueError, "from -4 to 1; .*down to -3"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2, 3)).with_rotations(), ValueError, "square images"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2)).with_rotations(), ValueError, "square images"),
        (lambda: ClassDataset(torch.zeros(3, 4, 2, 3)).with_symmetries(), ValueError, "with_symmetries: .*square"),
        (lambda: ClassDataset.from_pairs(torch.zeros(3, 2), torch.zeros(3)), ValueError, "one integer label"),
        (lambda: ClassDataset.from_pairs(torch.zeros(3, 2), torch.zeros(2).long()), ValueError, r"\(2,\).*\(3, 2\)"),
        (lambda: ClassDataset.from_pairs(torch.zeros(0, 2), torch.zeros(0).long()), ValueError, "no samples"),
        (lambda: ClassDataset.from_torchvision(Pairs([])), ValueError, "the data set is empty"),
        (
            lambda: ClassDataset.from_torchvision(Pairs([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 3), 0)])),
            ValueError,
            "image 1 has shape .*Resize transform",
        ),
    ],
)
def test_wrong_input_is_refused_in_words(make, error, message) -> None:
    with pytest.raises(error, match=message):
        make()
