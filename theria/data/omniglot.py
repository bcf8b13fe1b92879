"""Omniglot: 1,623 handwritten characters of 50 alphabets, each drawn once by 20 people (Lake, Salakhutdinov and
Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015).

| split | train | val | test | rotations |
|---|---|---|---|---|
| background | 25 background alphabets, 795 classes | 5 others, 169 classes | the 20 evaluation alphabets, 659 | no |
| small1 | Balinese, Early Aramaic, Greek, Korean: 110 | Latin: 26 | the same 659 | no |
| small2 | Greek, Japanese (katakana), Sanskrit, Tagalog: 130 | Latin: 26 | the same 659 | no |
| vinyals | 1,100 random classes | 100 | 423 | as classes: 4,400, 400 and 1,692 |

`trainval` is train and val together: the official training sets of 964, 136 and 156 classes, and the 1,200 of `vinyals`
(Vinyals et al. 2016 give no list of their classes; here it is the permutation that seed 0 draws).
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from theria.data import omniglot_files as files
from theria.data.cache import cached_arrays, missing_extra
from theria.data.classes import ClassDataset
from theria.data.draws import Draws
from theria.data.episodes import Episode, check_positive

_VERSION = 1
_SMALL = {
    "small1": ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"),
    "small2": ("Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog"),
}
_HELD_OUT = {
    "background": ("Early_Aramaic", "Futurama", "Gujarati", "Korean", "N_Ko"),
    "small1": ("Latin",),
    "small2": ("Latin",),
}
SPLITS = ("background", "small1", "small2", "vinyals")
SUBSETS = ("train", "val", "trainval", "test")
_VINYALS_SEED, _VINYALS_TRAIN, _VINYALS_TRAINVAL = 0, 1100, 1200
_RUNS = _WAYS = 20


def load_omniglot(
    root: str | os.PathLike[str] | None = None,
    split: str = "background",
    subset: str = "train",
    *,
    size: int = 28,
    rotations: bool | None = None,
    download: bool = False,
) -> ClassDataset:
    """A subset of Omniglot as classes of 20 uint8 images (1, size, size), ink = 255.

    Names are like "Greek/character03", groups are the alphabets.

    Args:
        root: the folder of the files (`theria.data.omniglot_files`). Default: $THERIA_OMNIGLOT, else `omniglot` in the
            cache folder.
        split, subset: see the table above; a subset is "train", "val", "trainval" or "test".
        size: at most 105; the drawings of 105 pixels are averaged over areas.
        rotations: whether every class turned by 90, 180 and 270 degrees is a class too. Default: only for "vinyals".
        download: get missing files through torchvision.

    Raises:
        FileNotFoundError, ValueError: a file is missing or is not the published one; the message says how to get it.
    """
    if split not in SPLITS or subset not in SUBSETS:
        raise ValueError(
            f"load_omniglot: split={split!r}, subset={subset!r}; one of {SPLITS} and of {SUBSETS} is needed"
        )
    _check_size("load_omniglot", size)
    folder = files.folder_of(root)
    if download:
        files.download(folder)
    alphabets = _alphabet_of_each_class(folder)
    images = _images(folder, size)
    classes = split_classes(split, subset, alphabets)
    firsts = {alphabet: alphabets.index(alphabet) for alphabet in set(alphabets)}
    chosen = ClassDataset(
        images[classes],
        None,
        [f"{alphabets[c]}/character{c - firsts[alphabets[c]] + 1:02d}" for c in classes],
        [alphabets[c] for c in classes],
    )
    return chosen.with_rotations() if (split == "vinyals" if rotations is None else rotations) else chosen


def split_classes(split: str, subset: str, alphabets: list[str]) -> list[int]:
    """The classes (0 to 1,622) of a subset of a split in rising order, given the alphabet of each class."""
    background = files.CLASSES["background"]
    if split == "vinyals":
        order = Draws(_VINYALS_SEED).permutation(len(alphabets)).tolist()
        ends = {
            "train": (0, _VINYALS_TRAIN),
            "val": (_VINYALS_TRAIN, _VINYALS_TRAINVAL),
            "trainval": (0, _VINYALS_TRAINVAL),
            "test": (_VINYALS_TRAINVAL, None),
        }
        return sorted(order[slice(*ends[subset])])
    if subset == "test":
        return list(range(background, len(alphabets)))
    members = set(_SMALL.get(split, alphabets[:background]))
    held_out = set(_HELD_OUT[split])
    wanted = {"train": members - held_out, "val": held_out, "trainval": members}[subset]
    return [c for c in range(background) if alphabets[c] in wanted]


def omniglot_one_shot_runs(root: str | os.PathLike[str] | None = None, *, size: int = 28) -> Episode:
    """The official one-shot test: 20 runs of within-alphabet 20-way, 1-shot classification with 20 test images each.

    An Episode of T = 20 tasks: x float32 (20, 20, 1, size, size), ink = 1; support item i is class i; queries are in
    the order of the run's list. `root` as in `load_omniglot`. People err on 4.5 %, chance on 95 %.
    """
    _check_size("omniglot_one_shot_runs", size)
    path = files.verified(files.folder_of(root) / files.ONE_SHOT)
    support, query, target = [], [], []
    with zipfile.ZipFile(path) as archive:
        for run in range(1, _RUNS + 1):
            lines = archive.read(f"run{run:02d}/class_labels.txt").decode().split()
            tests, trainings = lines[0::2], lines[1::2]
            classes = sorted(set(trainings))
            support += [_drawing(archive, name) for name in classes]
            query += [_drawing(archive, name) for name in tests]
            target.append([classes.index(name) for name in trainings])

    def stacked(drawings: list[Tensor]) -> Tensor:
        return averaged(torch.stack(drawings), size).view(_RUNS, _WAYS, 1, size, size).to(torch.float32).div_(255.0)

    labels = torch.arange(_WAYS).repeat(_RUNS, 1)
    return Episode(stacked(support), labels, stacked(query), torch.tensor(target))


def _drawing(archive: zipfile.ZipFile, name: str) -> Tensor:
    """(105, 105) bool, True is ink."""
    try:
        import numpy as np
        from PIL import Image
    except ImportError as error:
        raise missing_extra("matplotlib (for pillow)", "Reading the one-shot runs", error) from error
    with Image.open(io.BytesIO(archive.read(name))) as image:
        return ~torch.from_numpy(np.array(image.convert("1")))


def averaged(ink: Tensor, size: int) -> Tensor:
    """Drawings (n, 105, 105) bool to (n, size, size) uint8: the mean ink of each cell of an exact size x size grid."""
    edges = torch.arange(size + 1, dtype=torch.float64) * (ink.shape[-1] / size)
    pixel = torch.arange(ink.shape[-1], dtype=torch.float64)
    # overlap of cell [edges[i], edges[i+1]] with pixel [j, j+1]
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    weight = (overlap.clamp(min=0.0) * (size / ink.shape[-1])).to(torch.float32)  # (size, 105), rows sum to 1
    return torch.cat(
        [(weight @ part.to(torch.float32) @ weight.T).mul_(255).round_().to(torch.uint8) for part in ink.split(1000)]
    )


def _images(folder: Path, size: int) -> Tensor:
    """uint8 (1623, 20, 1, size, size); verified when they are reduced, and kept under the checksums of their files."""
    paths = [folder / files.images_name(half) for half in files.CLASSES]
    digests = [files.file_sha256(path) for path in paths]

    def build() -> dict:
        halves = [~torch.from_numpy(files.read_images(path)) for path in paths]
        return {"images": torch.cat([averaged(ink.flatten(0, 1), size) for ink in halves]).numpy()}

    arrays = cached_arrays("omniglot", {"version": _VERSION, "size": size, "files": digests}, build)
    return torch.from_numpy(arrays["images"]).view(-1, files.DRAWERS, 1, size, size)


def _alphabet_of_each_class(folder: Path) -> list[str]:
    """1,623 names: those of the background set, then those of the evaluation set."""
    with files.verified(folder / files.ALPHABETS).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["alphabet"] for half in files.CLASSES for row in rows if row["split"] == half for _ in _span(row)]


def _span(row: dict[str, str]) -> range:
    return range(int(row["num_classes"]))


def _check_size(who: str, size: int) -> None:
    check_positive(who, "size", size)
    if size > files.PIXELS:
        raise ValueError(f"{who}: size={size}; at most {files.PIXELS}, the size of the drawings, is possible")
