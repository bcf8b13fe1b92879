"""A cache of arrays on disk that several processes may build, read and lose at once without harm."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def missing_extra(package: str, purpose: str, error: ImportError, extra: str = "experiments") -> ImportError:
    """The error for an optional package that is not installed: what it is for and how to get it."""
    return ImportError(f'{purpose} needs {package}, which is not installed ({error}): pip install -e ".[{extra}]"')


def cache_dir() -> Path:
    """$THERIA_CACHE, else $XDG_CACHE_HOME/theria, else ~/.cache/theria. Not created."""
    given = os.environ.get("THERIA_CACHE")
    if given:
        return Path(given).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "theria"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends, and is removed when the block fails.

    Readers see the old file or the whole new one; of several writers the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{path.suffix}")  # readable as the umask says
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_arrays(
    name: str, key: Mapping[str, Any], build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that `build()` returns, kept as `<cache_dir>/<name>-<digest of key>.npz`.

    `key` (JSON values) holds everything that the arrays depend on: another key is another file. A file that cannot be
    read is built again. A cache that cannot be written is a warning: the arrays are returned all the same.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise missing_extra("numpy", f"The data set {name!r}", error) from error
    text = json.dumps(dict(key), sort_keys=True)
    path = cache_dir() / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    # Damaged bytes raise whatever the broken part of zip, zlib or npy makes of them; all of it means: build again.
    # Each read is checked against the archive's CRC-32.
    with contextlib.suppress(Exception), path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        return {field: file[field] for field in file.files}
    arrays = build()
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        warnings.warn(
            f"{name} was built but not cached: {path} cannot be written ({error}). "
            "Set THERIA_CACHE to a folder that can be written to build it only once.",
            stacklevel=2,
        )
    return arrays
