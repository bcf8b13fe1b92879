"""theria.data.cache: whole files or none, whoever writes, crashes or corrupts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from theria.data.cache import atomic_path, cache_dir, cached_arrays

ARRAYS = {"x": np.arange(5000).reshape(50, 100), "names": np.array(["ა", "bc"])}


class Build:
    """Builds ARRAYS and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return ARRAYS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THERIA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(arrays: dict[str, np.ndarray]) -> bool:
    return arrays.keys() == ARRAYS.keys() and all(np.array_equal(arrays[k], ARRAYS[k]) for k in ARRAYS)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THERIA_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_dir() == Path("/a/b")
    monkeypatch.delenv("THERIA_CACHE")
    assert cache_dir() == Path("/c/theria")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert cache_dir() == Path("/home/x/.cache/theria")


def test_built_once_for_a_key(folder: Path) -> None:
    build = Build()
    assert same(cached_arrays("t", {"v": 1}, build))
    assert same(cached_arrays("t", {"v": 1}, build))
    assert build.calls == 1
    cached_arrays("t", {"v": 2}, build)
    cached_arrays("u", {"v": 1}, build)
    assert build.calls == 3
    assert len(list(folder.iterdir())) == 3  # and no temporary file is left


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "text"])
def test_a_corrupt_file_is_built_again(folder: Path, damage: str) -> None:
    build = Build()
    cached_arrays("t", {}, build)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(b ^ 0xFF for b in whole[middle : middle + 8]) + whole[middle + 8 :]
    path.write_bytes({"empty": b"", "truncated": whole[:middle], "flipped": flipped, "text": b"not an archive"}[damage])
    assert same(cached_arrays("t", {}, build))
    assert build.calls == 2
    assert same(cached_arrays("t", {}, build))
    assert build.calls == 2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_path(path) as part:
        part.write_text("new, but \ud800", encoding="utf-8")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = (
        "import os, signal, sys, pathlib; from theria.data.cache import atomic_path\n"
        "with atomic_path(pathlib.Path(sys.argv[1])) as part:\n"
        "    part.write_text('new, but')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_several_processes_build_at_once(folder: Path) -> None:
    code = (
        "import numpy as np; from theria.data.cache import cached_arrays\n"
        "for turn in range(30):\n"
        "    got = cached_arrays('t', {'turn': turn}, lambda: {'x': np.full((200, 200), turn)})\n"
        "    assert (got['x'] == turn).all() and got['x'].shape == (200, 200)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], env=os.environ.copy()) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(list(folder.iterdir())) == 30


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("THERIA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="t was built but not cached: .*Set THERIA_CACHE"):
        assert same(cached_arrays("t", {}, Build()))
