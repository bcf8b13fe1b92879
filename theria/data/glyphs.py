"""Printed characters as few-shot classes, rendered from the typefaces that matplotlib ships: nothing to download.

A class is a character; its 20 samples are its faces (DejaVu Sans, Serif and Mono, STIX, in four styles each, as far as
they have it) under random rotation, scale, shear and shift (`theria.data.typefaces`).

Two drawings are compared by d(a, b) = |a - b|^2 / max(|a|^2, |b|^2) of the slightly blurred canonical drawings, which
are fitted to one box: 0 for equal ones, about 1 or more for unrelated ones.

- Look-alikes (Latin A, Greek Alpha, Cyrillic A; o, O, omicron) are one class: pairs with d <= 0.05, and transitively.
  The class is drawn from its first member, and belongs to the first subset that has a member of it.
- A class of a later subset with d <= 0.15 to a class of an earlier one is dropped: no test class resembles a training
  class.

| subset | classes | scripts (matplotlib 3.11; `glyph_counts()` says for the installed one) |
|---|---|---|
| train | 1,770 | Canadian syllabics 362, Latin 332, pictograms 271, mathematics 264, Cyrillic 152, arrows 147, |
| | | shapes 78, Greek 51, technical 47, currency 25, Old Italic 25, digits 10, Lisu 6 |
| val | 58 | Armenian 37, Hebrew 17, Coptic 4 |
| test | 271 | Georgian 93, Arabic 83, Lao 40, Tifinagh 25, N'Ko 17, Ogham 13 |
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from theria.data.cache import cached_arrays, missing_extra
from theria.data.classes import ClassDataset
from theria.data.episodes import check_seed
from theria.data.typefaces import FACES, Typefaces

if TYPE_CHECKING:
    import numpy as np

_VERSION = 1
_SAMPLES = 20
LOOK_ALIKE = 0.05
RESEMBLES = 0.15
SUBSETS = ("train", "val", "test")
_LATER = {
    "ARMENIAN": 1,
    "COPTIC": 1,
    "HEBREW": 1,
    "ARABIC": 2,
    "GEORGIAN": 2,
    "LAO": 2,
    "NKO": 2,
    "OGHAM": 2,
    "TIFINAGH": 2,
}  # the subset of a script, an index into SUBSETS; the others, Latin's kin and the symbols, are for training


def load_glyphs(subset: str = "train", *, seed: int = 0) -> ClassDataset:
    """The characters of a subset ("train", "val" or "test"): 20 uint8 images (1, 28, 28) a class, ink = 255.

    Names are the characters (look-alikes joined: "AΑА"), groups the scripts. Deterministic in `seed`, which decides the
    affine maps. Built once (seconds) and cached. Needs matplotlib.
    """
    if subset not in SUBSETS:
        raise ValueError(f"load_glyphs: subset={subset!r}; one of {', '.join(map(repr, SUBSETS))} is needed")
    arrays = _arrays(seed)
    here = arrays["subset"] == SUBSETS.index(subset)
    images = torch.from_numpy(arrays["images"][here])
    return ClassDataset(images, None, arrays["names"][here].tolist(), arrays["scripts"][here].tolist())


def glyph_counts(seed: int = 0) -> dict[str, dict[str, int]]:
    """How many classes each script has in each subset: {"train": {"LATIN": ..., ...}, "val": ..., "test": ...}."""
    arrays = _arrays(seed)
    return {
        name: dict(Counter(arrays["scripts"][arrays["subset"] == i].tolist()).most_common())
        for i, name in enumerate(SUBSETS)
    }


def _arrays(seed: int) -> dict[str, np.ndarray]:
    check_seed("glyphs", seed)
    try:
        import matplotlib
        import PIL
    except ImportError as error:
        raise missing_extra("matplotlib", "The data set 'glyphs'", error) from error
    key = {
        "version": _VERSION,
        "seed": seed,
        "samples": _SAMPLES,
        "thresholds": [LOOK_ALIKE, RESEMBLES],
        "later": _LATER,
        "faces": FACES,
        "matplotlib": matplotlib.__version__,
        "pillow": PIL.__version__,
    }
    return cached_arrays("glyphs", key, lambda: _build(seed))


def _build(seed: int) -> dict[str, np.ndarray]:
    """images (C, 20, 1, 28, 28) uint8, subset (C,) indices into SUBSETS, names (C,) and scripts (C,)."""
    import numpy as np

    faces = Typefaces()
    scripts = faces.characters()
    characters = sorted(scripts, key=lambda c: (_LATER.get(scripts[c], 0), ord(c)))  # earlier subsets first
    subset = torch.tensor([_LATER.get(scripts[c], 0) for c in characters])
    distance = look_alike_distance(torch.from_numpy(np.stack([faces.canonical(c) for c in characters])))
    classes = _classes(distance, subset)
    firsts = [members[0] for members in classes]
    drawn = np.stack([faces.samples(characters[first], _SAMPLES, seed) for first in firsts])
    return {
        "images": drawn[:, :, None],
        "subset": subset[firsts].numpy(),
        "names": np.array(["".join(characters[m] for m in members) for members in classes]),
        "scripts": np.array([scripts[characters[first]] for first in firsts]),
    }


def look_alike_distance(drawings: Tensor) -> Tensor:
    """d(a, b) of every pair of drawings (n, 28, 28) uint8, float32 (n, n)."""
    binomial = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16  # standard deviation 1: forgives a shift of half a pixel
    x = F.conv2d(drawings[:, None] / 255.0, torch.outer(binomial, binomial)[None, None], padding=2).flatten(1)
    gram = x @ x.T
    square = gram.diagonal()
    return (square[:, None] + square - 2 * gram) / torch.maximum(square[:, None], square)


def _classes(distance: Tensor, subset: Tensor) -> list[list[int]]:
    """The characters of each class that is kept, in rising order, by the rules at the top of this file.

    Characters are sorted by subset, so that the first member of a class decides the subset of the class.
    """
    parent = list(range(len(distance)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, j in (distance <= LOOK_ALIKE).triu(1).nonzero().tolist():
        a, b = sorted((root(i), root(j)))
        parent[b] = a  # the smallest member is the root
    members: dict[int, list[int]] = {}
    for i in range(len(parent)):
        members.setdefault(root(i), []).append(i)

    home = subset[[root(i) for i in range(len(parent))]]  # the subset of the class of each character
    resembles_earlier = ((distance <= RESEMBLES) & (home[:, None] > home)).any(1)
    return [group for group in members.values() if not bool(resembles_earlier[group].any())]
