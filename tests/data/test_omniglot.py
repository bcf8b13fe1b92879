"""theria.data.load_omniglot: the files are the published ones or an error, the splits are what their names say."""

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from theria.data import Episode, load_omniglot, omniglot_one_shot_runs
from theria.data import omniglot_files as files
from theria.data.omniglot import SPLITS, averaged, split_classes

HAUSDORFF_ERROR = 0.388  # of the modified Hausdorff distance in the official demo
VINYALS_HEAD = [0, 1, 3, 4, 6, 9]


# --- with the real files ---------------------------------------------------------------------------------------------


def test_the_published_checksums(omniglot_root: Path) -> None:
    lines = (omniglot_root / "SHA256SUMS").read_text().splitlines()
    assert {line.split()[1]: line.split()[0] for line in lines} == files.SHA256
    for name in files.SHA256:
        assert files.verified(omniglot_root / name)


@pytest.mark.parametrize(
    ("split", "classes", "alphabets"),
    [
        ("background", (795, 169, 964, 659), (25, 5, 30, 20)),
        ("small1", (110, 26, 136, 659), (4, 1, 5, 20)),
        ("small2", (130, 26, 156, 659), (4, 1, 5, 20)),
        ("vinyals", (4400, 400, 4800, 1692), None),
    ],
)
def test_splits(omniglot_root: Path, split: str, classes: tuple, alphabets: tuple | None) -> None:
    train, val, both, test = (load_omniglot(omniglot_root, split, s) for s in ("train", "val", "trainval", "test"))
    assert tuple(map(len, (train, val, both, test))) == classes
    assert train.images.shape[1:] == (20, 1, 28, 28)
    names = [set(dataset.names) for dataset in (train, val, both, test)]
    assert [len(n) for n in names] == list(classes)  # every name is unique
    assert names[0] | names[1] == names[2]
    assert not names[0] & names[1]
    assert not names[2] & names[3]
    groups = [set(dataset.groups) for dataset in (train, val, both, test)]
    if alphabets is not None:
        assert tuple(map(len, groups)) == alphabets
        assert not groups[0] & groups[1]
        assert not groups[2] & groups[3]


def test_class_order_and_pixels_are_those_of_the_files(omniglot_root: Path) -> None:
    dataset = load_omniglot(omniglot_root, "background", "trainval")
    with np.load(omniglot_root / "images_background.npz") as file:
        ink = torch.from_numpy(~file["images"][::100])
    assert torch.equal(dataset.images[::100, :, 0], averaged(ink.flatten(0, 1), 28).view(-1, 20, 28, 28))
    assert dataset.names[0] == "Arcadian/character01"
    assert dataset.names[708] == "Alphabet_of_the_Magi/character01"  # official number 709
    assert dataset.groups[963] == "Tifinagh"
    assert 0.02 < float(dataset.images.float().mean()) / 255 < 0.12  # ink is 255, paper is 0


def test_rotations_are_of_the_same_classes(omniglot_root: Path) -> None:
    turned = load_omniglot(omniglot_root, "small1", "val", rotations=True)
    plain = load_omniglot(omniglot_root, "small1", "val")
    assert len(turned) == 4 * len(plain)
    assert torch.equal(turned.images[len(plain) * 3 + 2], plain.images[2].rot90(3, (-2, -1)))
    assert len(load_omniglot(omniglot_root, "vinyals", "train", rotations=False)) == 1100


@pytest.fixture(scope="module")
def runs(omniglot_root: Path) -> Episode:
    return omniglot_one_shot_runs(omniglot_root, size=105)


def test_one_shot_runs(runs: Episode, omniglot_root: Path) -> None:
    assert runs.support_x.shape == runs.query_x.shape == (20, 20, 1, 105, 105)
    assert torch.equal(runs.support_y, torch.arange(20).expand(20, 20))
    assert torch.equal(runs.query_y.sort().values, torch.arange(20).expand(20, 20))
    assert runs.query_y[0].tolist()[:5] == [7, 8, 1, 18, 9]  # the first lines of run01/class_labels.txt, from 0
    small = omniglot_one_shot_runs(omniglot_root)
    assert small.support_x.shape == (20, 20, 1, 28, 28)
    assert float((small.support_x.mean((2, 3, 4)) - runs.support_x.mean((2, 3, 4))).abs().max()) < 1 / 255


def test_modified_hausdorff_distance_on_the_runs(runs: Episode) -> None:
    """Dubuisson and Jain 1994, on ink pixels relative to their mean: the official baseline errs on 38.8 %.

    All pixels give 38.8 % here too; every fourth takes a sixteenth of the time.
    """

    def points(images: torch.Tensor) -> list[torch.Tensor]:
        found = [image[0].nonzero().float() for image in images]
        return [(p - p.mean(0))[::4] for p in found]

    errors = 0
    for task in range(20):
        support, query = points(runs.support_x[task]), points(runs.query_x[task])
        for q, target in zip(query, runs.query_y[task].tolist(), strict=True):
            between = [torch.cdist(q, s) for s in support]
            distance = [max(d.min(0).values.mean(), d.min(1).values.mean()) for d in between]
            errors += int(np.argmin(distance)) != target
    assert errors / 400 == pytest.approx(HAUSDORFF_ERROR, abs=0.02)


def test_a_corrupt_copy_is_refused(omniglot_root: Path, tmp_path: Path) -> None:
    for name in files.SHA256:
        shutil.copyfile(omniglot_root / name, tmp_path / name)
    load_omniglot(tmp_path, "small1", "val")  # an intact copy works, even from the cache
    for name, load in (
        ("images_evaluation.npz", lambda: load_omniglot(tmp_path)),
        (files.ALPHABETS, lambda: load_omniglot(tmp_path)),
        (files.ONE_SHOT, lambda: omniglot_one_shot_runs(tmp_path)),
    ):
        whole = (tmp_path / name).read_bytes()
        half = len(whole) // 2
        for damaged in (whole[:half], whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{name} is damaged or another file: .*Delete it"):
                load()
        (tmp_path / name).write_bytes(whole)


def test_an_archive_packed_otherwise_is_accepted_and_other_pixels_are_not(omniglot_root: Path, tmp_path: Path) -> None:
    with np.load(omniglot_root / "images_evaluation.npz") as file:
        images = file["images"]
    path = tmp_path / "images_evaluation.npz"
    np.savez(path, images=images)
    assert np.array_equal(files.read_images(path), images)
    images[3, 4, 50, 60] ^= True
    np.savez(path, images=images)
    with pytest.raises(ValueError, match="the SHA-256 of its pixels is"):
        files.read_images(path)


# --- without them ----------------------------------------------------------------------------------------------------


def test_missing_files_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"alphabets.csv cannot be read.*download=True.*THERIA_OMNIGLOT"):
        load_omniglot(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"all_runs.zip of https://github.com/brendenlake/omniglot and save"):
        omniglot_one_shot_runs(tmp_path)
    monkeypatch.setenv("THERIA_OMNIGLOT", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        load_omniglot()
    monkeypatch.delenv("THERIA_OMNIGLOT")
    monkeypatch.setenv("THERIA_CACHE", str(tmp_path / "cached"))
    with pytest.raises(FileNotFoundError, match=r"cached/omniglot/alphabets\.csv"):
        load_omniglot()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "lake"}, ValueError, "split='lake', .*'background', 'small1', 'small2', 'vinyals'"),
        ({"subset": "dev"}, ValueError, "subset='dev'; .*'train', 'val', 'trainval', 'test'"),
        ({"size": 0}, ValueError, "size=0; at least 1"),
        ({"size": 106}, ValueError, "size=106; at most 105"),
        ({"size": 28.0}, TypeError, "size=28.0 is a float"),
    ],
)
def test_wrong_settings_are_refused(tmp_path: Path, options, error, message) -> None:
    with pytest.raises(error, match=message):
        load_omniglot(tmp_path, **options)


def test_averaging_is_over_exact_areas() -> None:
    """Against a refinement in which both grids are whole: 105 and 28 pixels divide 420."""
    ink = torch.rand(2, 105, 105, generator=torch.Generator().manual_seed(0)) < 0.3
    fine = ink.double().repeat_interleave(4, 1).repeat_interleave(4, 2)
    expected = fine.view(2, 28, 15, 28, 15).mean((2, 4)) * 255
    assert float((averaged(ink, 28) - expected).abs().max()) < 0.51
    assert torch.equal(averaged(ink, 105), ink.to(torch.uint8) * 255)


def test_splits_cover_every_class_once() -> None:
    alphabets = [f"a{c // 32}" for c in range(964)] + [f"b{c // 33}" for c in range(659)]
    parts = [split_classes("vinyals", subset, alphabets) for subset in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1100, 100, 423]
    assert sorted([*parts[0], *parts[1], *parts[2]]) == list(range(1623))
    assert parts[0][:6] == VINYALS_HEAD  # frozen: a published number belongs to this permutation
    for split in SPLITS[:3]:
        assert split_classes(split, "test", alphabets) == list(range(964, 1623))


def draw_tree(root: Path, drawers: int = 20) -> dict[int, np.ndarray]:
    """Three characters of two alphabets, whose official numbers are not in alphabetical order."""
    generator, drawn = np.random.default_rng(0), {}
    for number, alphabet, character in ((7, "Zeta", 1), (8, "Zeta", 2), (9, "Alpha", 1)):
        folder = root / alphabet / f"character{character:02d}"
        folder.mkdir(parents=True)
        drawn[number] = generator.random((20, 105, 105)) < 0.9
        for drawer in reversed(range(drawers)):
            Image.fromarray(drawn[number][drawer]).save(folder / f"{number:04d}_{drawer + 1:02d}.png")
    return drawn


def test_convert_sorts_by_the_official_number(tmp_path: Path) -> None:
    drawn = draw_tree(tmp_path / "whole")
    images, alphabets = files.convert(tmp_path / "whole")
    assert np.array_equal(images, np.stack([drawn[7], drawn[8], drawn[9]]))
    assert alphabets == [("Zeta", 0, 2), ("Alpha", 2, 1)]
    draw_tree(tmp_path / "part", drawers=19)
    with pytest.raises(ValueError, match=r"57 drawings .* missing \(class, drawer\): \[\(7, 20\)"):
        files.convert(tmp_path / "part")


class FakeOmniglot:
    """torchvision.datasets.Omniglot as far as it is used, delivering the tree of `draw_tree`."""

    error: Exception | None = None

    def __init__(self, root: str, background: bool, download: bool) -> None:
        assert download
        if self.error:
            raise self.error
        self.target_folder = f"{root}/omniglot-py/images_{'background' if background else 'evaluation'}"
        self.drawn = draw_tree(Path(self.target_folder))


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> type[FakeOmniglot]:
    module = types.ModuleType("torchvision.datasets")
    fake = type("Omniglot", (FakeOmniglot,), {})
    module.Omniglot = fake  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    return fake


def test_a_download_becomes_the_three_files(torchvision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.stack(list(draw_tree(tmp_path / "tree").values()))
    monkeypatch.setattr(files, "PIXEL_SHA256", dict.fromkeys(files.PIXEL_SHA256, files.pixel_sha256(pixels)))
    folder = tmp_path / "omniglot"
    files.download(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files.PIXEL_SHA256, files.ALPHABETS])
    assert np.array_equal(files.read_images(folder / "images_evaluation.npz"), pixels)
    assert (folder / files.ALPHABETS).read_text().splitlines() == [
        "alphabet,split,first_class,num_classes",
        "Zeta,background,0,2",
        "Alpha,background,2,1",
        "Zeta,evaluation,0,2",
        "Alpha,evaluation,2,1",
    ]
    torchvision.error = AssertionError("downloaded twice")
    files.download(folder)


def test_a_download_of_other_pixels_is_refused(torchvision, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the downloaded pixels have the SHA-256"):
        load_omniglot(tmp_path / "omniglot", download=True)
    assert list((tmp_path / "omniglot").iterdir()) == []


def test_a_failed_download_says_what_to_do(torchvision, tmp_path: Path) -> None:
    torchvision.error = OSError("no route to host")
    with pytest.raises(ConnectionError, match=r"background set \(no route to host\)\. Try again, or point `root`"):
        load_omniglot(tmp_path / "omniglot", download=True)


def test_without_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # import of it fails
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"Downloading Omniglot needs torchvision, .*\.\[vision\]"):
        load_omniglot(tmp_path, download=True)
