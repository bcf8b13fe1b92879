"""The files of Omniglot on disk: where they are, whether they are whole, and how to get them.

A folder holds `images_background.npz` and `images_evaluation.npz` (array `images`, bool (classes, 20, 105, 105), True
is paper), `alphabets.csv` (alphabet,split,first_class,num_classes) and, for the official one-shot test,
`one_shot_classification_all_runs.zip`. Classes are in the order of the official drawing numbers 1 to 1,623.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from theria.data.cache import atomic_path, cache_dir, missing_extra

if TYPE_CHECKING:
    import numpy as np

CLASSES = {"background": 964, "evaluation": 659}
DRAWERS = 20
PIXELS = 105
ALPHABETS = "alphabets.csv"
ONE_SHOT = "one_shot_classification_all_runs.zip"
SHA256 = {
    "images_background.npz": "8bf84167413cd00beacdce3fe582f780ab538d8dbef043a6d688f2527bbce199",
    "images_evaluation.npz": "0b84c7ffd94c4841c0040e529c86a82eaaccb986d8eadad5673f7991b7475276",
    ALPHABETS: "bba46699ebd6c862fa9053b433c42e730d9186e1844e2552bde897e1c6ad05ea",
    ONE_SHOT: "437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325",
}
# Of np.packbits(images): an archive written here is not the same file byte by byte (zlib differs), its pixels are.
PIXEL_SHA256 = {
    "images_background.npz": "50ac3e2043f457516ed8e84151b2d85718f4bbccc0a17ad355cd3b6f0c4ed5f3",
    "images_evaluation.npz": "03b046317776af65e56eb1a168e35feb5e254765b51ce5fd1383ec242a5767f3",
}
_schemas: Any = None  # keeps the operators that `_torchvision_omniglot` defines alive


def images_name(half: str) -> str:
    """The file of a half, "background" or "evaluation"."""
    return f"images_{half}.npz"


def folder_of(root: str | os.PathLike[str] | None) -> Path:
    """`root` if given, else $THERIA_OMNIGLOT, else the folder `omniglot` of the cache."""
    given = root or os.environ.get("THERIA_OMNIGLOT")
    return Path(given).expanduser() if given else cache_dir() / "omniglot"


def _how_to_get(path: Path) -> str:
    if path.name == ONE_SHOT:
        return (
            "Take python/one-shot-classification/all_runs.zip of https://github.com/brendenlake/omniglot and save it "
            f"as {path}."
        )
    return (
        "load_omniglot(root, ..., download=True) (task.download=true) downloads it through torchvision; or point `root`"
        f" (task.root=...) or THERIA_OMNIGLOT at a folder that holds {', '.join(list(SHA256)[:3])}."
    )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file of Omniglot; FileNotFoundError says how to get it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise FileNotFoundError(f"Omniglot: {path} cannot be read ({error}). {_how_to_get(path)}") from error


def corrupt(path: Path, found: str) -> ValueError:
    """The error for a file that is there but is not the published one."""
    return ValueError(
        f"Omniglot: {path} is damaged or another file: {found}, SHA-256 {SHA256[path.name]} is needed. Delete it. "
        f"{_how_to_get(path)}"
    )


def verified(path: Path) -> Path:
    """`path`, if its bytes are the published ones; else raises."""
    digest = file_sha256(path)
    if digest != SHA256[path.name]:
        raise corrupt(path, f"its SHA-256 is {digest}")
    return path


def read_images(path: Path) -> np.ndarray:
    """bool (classes, 20, 105, 105), True is paper; the published pixels or an error."""
    import numpy as np

    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            images = file["images"]
    except Exception as error:  # whatever zip, zlib and npy make of damaged bytes
        raise corrupt(path, f"it cannot be unpacked ({error})") from error
    digest = pixel_sha256(images)
    if digest != PIXEL_SHA256[path.name]:
        raise corrupt(path, f"the SHA-256 of its pixels is {digest}")
    return images


def pixel_sha256(images: np.ndarray) -> str:
    """The SHA-256 of the images' bits."""
    import numpy as np

    return hashlib.sha256(np.packbits(images).tobytes()).hexdigest()


def download(folder: Path) -> None:
    """Makes the image files and `alphabets.csv` in `folder`, through torchvision; does nothing if they are there."""
    names = [*map(images_name, CLASSES), ALPHABETS]
    if all((folder / name).exists() for name in names):
        return
    import numpy as np

    omniglot = _torchvision_omniglot()
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["alphabet,split,first_class,num_classes"]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        for half in CLASSES:
            try:
                raw = omniglot(temporary, background=half == "background", download=True).target_folder
            except (OSError, RuntimeError) as error:
                raise ConnectionError(
                    f"Omniglot: torchvision could not download the {half} set ({error}). Try again, or point `root` or "
                    f"THERIA_OMNIGLOT at a folder that holds {', '.join(names)}."
                ) from error
            images, alphabets = convert(Path(raw))
            path = folder / images_name(half)
            if pixel_sha256(images) != PIXEL_SHA256[path.name]:
                raise corrupt(path, f"the downloaded pixels have the SHA-256 {pixel_sha256(images)}")
            rows += [f"{alphabet},{half},{first},{count}" for alphabet, first, count in alphabets]
            with atomic_path(path) as part, part.open("wb") as file:
                np.savez_compressed(file, images=images)
    with atomic_path(folder / ALPHABETS) as part:
        part.write_bytes(("\n".join(rows) + "\n").encode())


def convert(raw: Path) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """The images of `raw`/<alphabet>/<character>/<number>_<drawer>.png and (alphabet, first class, number of classes).

    Sorted by the number in the file's name, which is the official class number, and by drawer: whatever order the
    file system lists them in.
    """
    import numpy as np
    from PIL import Image

    found: dict[tuple[int, int], Path] = {}
    for path in raw.glob("*/*/*.png"):
        match = re.fullmatch(r"(\d+)_(\d+)", path.stem)
        if match:
            found[int(match[1]), int(match[2])] = path
    numbers = sorted({number for number, _ in found})
    missing = [(n, d) for n in numbers for d in range(1, DRAWERS + 1) if (n, d) not in found]
    if not numbers or missing:
        raise ValueError(
            f"Omniglot: {raw} has {len(found)} drawings named <class number>_<drawer>.png; {DRAWERS} of each class "
            f"are needed; missing (class, drawer): {missing[:3]}"
        )
    images = np.empty((len(numbers), DRAWERS, PIXELS, PIXELS), dtype=bool)
    alphabets: dict[str, list[int]] = {}
    for index, number in enumerate(numbers):
        for drawer in range(DRAWERS):
            with Image.open(found[number, drawer + 1]) as image:
                images[index, drawer] = np.asarray(image.convert("1"))
        alphabets.setdefault(found[number, 1].parts[-3], []).append(index)
    return images, [(alphabet, members[0], len(members)) for alphabet, members in alphabets.items()]


def _torchvision_omniglot() -> Any:
    """torchvision's Omniglot class.

    Beside a CPU build of torch, torchvision's compiled extension may not load; its import then fails on the operators
    torchvision::nms and, since 0.28, qnms, of which it only needs the schemas (both take the same arguments). Then the
    schemas are defined here and the import is tried again.
    """
    global _schemas
    try:
        return importlib.import_module("torchvision.datasets").Omniglot
    except ImportError as error:
        raise missing_extra("torchvision", "Downloading Omniglot", error, extra="vision") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # the failed import left some of its modules behind
        _schemas = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.import_module("torchvision.datasets").Omniglot
