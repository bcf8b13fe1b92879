"""learn2learn: the pure-Python part, found without running the package's `__init__`s, which need its C extension."""
# pyright: reportMissingImports=false

import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from given import Given
from torches import Inner, gradient, leaf, losses, start


def _bare(name: str, folder: Path) -> None:
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


_spec = importlib.util.find_spec("learn2learn")
if _spec is None or not _spec.submodule_search_locations:
    raise ModuleNotFoundError("learn2learn is not installed")
_folder = Path(_spec.submodule_search_locations[0])
_bare("learn2learn", _folder)
_bare("learn2learn.algorithms", _folder / "algorithms")

from learn2learn import _version  # noqa: E402
from learn2learn.algorithms.maml import MAML  # noqa: E402

VERSION = _version.__version__


def adapted(given: Given) -> np.ndarray:
    inner, outer = losses(given)
    x = leaf(given.outer0)
    z0 = start(given, x)
    learner = MAML(Inner(z0.detach(), inner), lr=given.rate, allow_unused=True).clone()
    if given.starts_at_outer:
        learner.module._parameters["z"] = z0
    for _ in range(given.steps):
        learner.adapt(learner(x))
    return gradient(outer(learner.module.z, x), x)


def methods(given: Given) -> Mapping[str, Callable[[], np.ndarray]]:
    return {"MAML.adapt": partial(adapted, given)}
