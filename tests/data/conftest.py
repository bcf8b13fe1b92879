"""The tests of theria.data build their data sets once, in a cache of their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # workers share what one of them has built
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THERIA_CACHE", str(shared / "theria-cache"))
        yield


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    """The folder with the real files, or a skip."""
    beside = Path(__file__).parents[3] / "shared" / "data" / "omniglot"
    root = Path(os.environ.get("THERIA_OMNIGLOT", beside))
    if not (root / "images_background.npz").exists():
        pytest.skip(f"no Omniglot in {root}; set THERIA_OMNIGLOT to its folder to run this test")
    return root
