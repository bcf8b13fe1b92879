"""theria.data.load_glyphs: real drawings, deterministic, and no training character among the test characters."""

import builtins
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.ft2font import FT2Font

from theria.data import ClassDataset, EpisodeSampler, glyph_counts, load_glyphs
from theria.data.glyphs import LOOK_ALIKE, RESEMBLES, SUBSETS, _classes, look_alike_distance
from theria.data.typefaces import CANONICAL, FACES, Typefaces, _drawn, script_of

BORDER_INK = 0  # a whole pixel stays free around every drawing
CORRELATION = 0.97  # measured: at most 0.964 between subsets, 1.000 between Latin, Greek and Cyrillic A
TEST_SCRIPTS = {"ARABIC", "GEORGIAN", "LAO", "NKO", "OGHAM", "TIFINAGH"}


@pytest.fixture(scope="module")
def glyphs() -> dict[str, ClassDataset]:
    return {subset: load_glyphs(subset) for subset in SUBSETS}


@pytest.fixture(scope="module")
def faces() -> Typefaces:
    return Typefaces()


def test_counts(glyphs: dict[str, ClassDataset]) -> None:
    counts = glyph_counts()
    assert {subset: len(dataset) for subset, dataset in glyphs.items()} == {
        s: sum(c.values()) for s, c in counts.items()
    }
    assert all(dataset.images.shape[1:] == (20, 1, 28, 28) for dataset in glyphs.values())
    assert all(dataset.images.dtype == torch.uint8 for dataset in glyphs.values())
    assert len(glyphs["train"]) >= 1500
    assert len(glyphs["val"]) >= 40
    assert len(glyphs["test"]) >= 200


@pytest.mark.skipif(
    not matplotlib.__version__.startswith("3.11."), reason="the docstring counts matplotlib 3.11's faces"
)
def test_counts_of_the_docstring(glyphs: dict[str, ClassDataset]) -> None:
    assert [len(glyphs[subset]) for subset in SUBSETS] == [1770, 58, 271]
    assert glyph_counts()["test"] == {"GEORGIAN": 93, "ARABIC": 83, "LAO": 40, "TIFINAGH": 25, "NKO": 17, "OGHAM": 13}


def test_scripts_are_disjoint(glyphs: dict[str, ClassDataset]) -> None:
    scripts = {subset: set(dataset.groups) for subset, dataset in glyphs.items()}
    assert scripts["test"] == TEST_SCRIPTS
    assert scripts["val"] == {"ARMENIAN", "COPTIC", "HEBREW"}
    assert not scripts["train"] & (scripts["val"] | scripts["test"])
    characters = [set("".join(dataset.names)) for dataset in glyphs.values()]
    assert not characters[0] & characters[1]
    assert not (characters[0] | characters[1]) & characters[2]
    # By the Unicode names, which no code here decides:
    words = {unicodedata.name(c).split()[0] for c in characters[2]}
    assert words == {"ARABIC", "ARABIC-INDIC", "EXTENDED", "GEORGIAN", "LAO", "NKO", "OGHAM", "TIFINAGH"}


def correlations(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The largest normalised correlation of each a (n, 28, 28) with any b (m, 28, 28), over shifts of one pixel."""
    blurred = [torch.nn.functional.avg_pool2d(x[:, None] / 255, 3, 1, 1)[:, 0] for x in (a, b)]
    right = torch.nn.functional.normalize(blurred[1].flatten(1), dim=1)
    best = torch.zeros(len(a))
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            left = torch.nn.functional.normalize(blurred[0].roll((dy, dx), (1, 2)).flatten(1), dim=1)
            best = torch.maximum(best, (left @ right.T).amax(1))
    return best


def test_no_test_character_looks_like_a_training_character(glyphs: dict[str, ClassDataset], faces: Typefaces) -> None:
    """Every member of every class counts, by this package's distance and by another measure."""
    drawings = {
        subset: torch.from_numpy(np.stack([faces.canonical(c) for c in "".join(dataset.names)]))
        for subset, dataset in glyphs.items()
    }
    for later, earlier in (("test", "train"), ("test", "val"), ("val", "train")):
        n = len(drawings[later])
        between = look_alike_distance(torch.cat([drawings[later], drawings[earlier]]))[:n, n:]
        assert float(between.min()) > RESEMBLES
        assert float(correlations(drawings[later], drawings[earlier]).max()) < CORRELATION
    latin, greek, cyrillic = (torch.from_numpy(faces.canonical(c))[None] for c in "AΑА")
    assert float(correlations(latin, greek).min()) > 0.99  # the measure sees what looks alike
    assert float(correlations(cyrillic, greek).min()) > 0.99


def test_no_image_is_in_two_subsets(glyphs: dict[str, ClassDataset]) -> None:
    seen = [{image.numpy().tobytes() for image in dataset.images.flatten(0, 1)} for dataset in glyphs.values()]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]


def test_look_alikes_are_one_class(glyphs: dict[str, ClassDataset]) -> None:
    class_of = {c: name for name in glyphs["train"].names for c in name}
    for alike in ("AΑА", "OoΟοОо", "PΡР", "XxΧх", "HΗН", "∑Σ"):
        assert len({class_of[c] for c in alike}) == 1, alike
    for different in ("AB", "EF", "OQ", "ЖX", "CG", "68", "uv"):
        assert len({class_of[c] for c in different}) == 2, different


def test_classes_merge_transitively_and_keep_later_subsets_clean() -> None:
    """Six characters of two subsets: 0~1~2 chain; 3 looks like 2, so it is in train; 4 resembles 0; 5 is alone."""
    distance = torch.ones(6, 6)
    for i, j, d in ((0, 1, LOOK_ALIKE), (1, 2, 0.0), (2, 3, LOOK_ALIKE), (0, 4, RESEMBLES)):
        distance[i, j] = distance[j, i] = d
    distance.fill_diagonal_(0.0)
    assert _classes(distance, torch.tensor([0, 0, 0, 2, 2, 2])) == [[0, 1, 2, 3], [5]]
    assert _classes(distance, torch.tensor([0, 0, 0, 0, 0, 2])) == [[0, 1, 2, 3], [4], [5]]


def test_every_image_has_ink_and_none_is_cropped(glyphs: dict[str, ClassDataset]) -> None:
    images = torch.cat([dataset.images.flatten(0, 2) for dataset in glyphs.values()])
    assert int(images.amax((1, 2)).min()) > 60
    assert float(images.float().mean((1, 2)).min()) > 2.0  # of 255: 6 full pixels
    border = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]])
    assert int(border.max()) <= BORDER_INK


def test_no_image_is_the_box_of_a_missing_character(faces: Typefaces) -> None:
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for face in FACES:
        charmap = FT2Font(str(folder / f"{face}.ttf")).get_charmap()
        assert all(charmap[code] != 0 for code in faces._covered[face])
    missing = _drawn("\U0010fffe", faces._fonts[CANONICAL])
    assert missing is not None
    boxes = [c for c in faces.characters() if _drawn(c, faces._fonts[CANONICAL]) == missing]
    assert boxes == []


def test_samples_of_a_class_differ_and_share_its_shape(glyphs: dict[str, ClassDataset]) -> None:
    for dataset in glyphs.values():
        flat = dataset.images.flatten(2) / 255
        per_class = torch.stack([torch.cdist(x, x).fill_diagonal_(torch.inf).min() for x in flat])
        assert float(per_class.min()) > 0.1
    # Nearest neighbours among 271 classes, one sample of each as the support: far above chance, far below perfect.
    flat = glyphs["test"].images.flatten(2) / 255
    hits = torch.cdist(flat[:, 1], flat[:, 0]).argmin(1) == torch.arange(len(flat))
    assert 0.1 < float(hits.float().mean()) < 0.9


def test_the_same_in_every_process(faces: Typefaces) -> None:
    code = (
        "import hashlib; from theria.data.typefaces import Typefaces; f = Typefaces()\n"
        "print(hashlib.sha256(b''.join(f.samples(c, 20, 3).tobytes() for c in 'Aლب∑')).hexdigest())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in (1, 2)
    }
    assert len(outputs) == 1
    assert np.array_equal(faces.samples("A", 20, 3), faces.samples("A", 20, 3))
    assert not np.array_equal(faces.samples("A", 20, 3), faces.samples("A", 20, 4))


@pytest.mark.parametrize(
    ("character", "script"),
    [
        ("A", "LATIN"), ("é", None), ("ﬁ", None), ("𝔸", None), ("Ж", "CYRILLIC"), ("ლ", "GEORGIAN"), ("٣", "ARABIC"),
        ("۳", "ARABIC"), ("7", "DIGIT"), ("→", "ARROWS"), ("∮", "MATHEMATICS"), ("☃", "PICTOGRAMS"), ("█", None),
        ("⠿", None), ("!", None), (" ", None), ("\u0301", None), ("€", "CURRENCY"),
    ],
)  # fmt: skip
def test_script_of(character: str, script: str | None) -> None:
    assert script_of(character) == script


def test_twenty_ways_from_every_subset(glyphs: dict[str, ClassDataset]) -> None:
    for dataset in glyphs.values():
        episode = EpisodeSampler(dataset, ways=20, shots=5, queries=15, tasks=1).sample(0)
        assert episode.query_x.shape == (1, 300, 1, 28, 28)
        assert float(episode.query_x.max()) == 1.0


def test_an_unknown_subset_is_refused() -> None:
    with pytest.raises(ValueError, match="subset='dev'; one of 'train', 'val', 'test'"):
        load_glyphs("dev")
    with pytest.raises(TypeError, match=r"seed=1\.5 is a float; an integer"):
        load_glyphs(seed=1.5)  # pyright: ignore


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"needs matplotlib, .*pip install -e \"\.\[experiments\]\""):
        load_glyphs()
