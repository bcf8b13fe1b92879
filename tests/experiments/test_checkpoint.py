"""Checkpoints: whole or absent, two of them, and every generator comes back."""

import random

import numpy as np
import pytest
import torch

from experiments import checkpoint
from experiments.errors import UserError


def save(run_dir, *steps: int) -> None:
    for step in steps:
        checkpoint.save(run_dir, {"step": step, "weights": torch.full((1000,), float(step))})


def test_the_last_two_are_kept(tmp_path):
    save(tmp_path, 1, 2, 30)
    assert [path.name for path in checkpoint.saved(tmp_path)] == ["step_00000002.pt", "step_00000030.pt"]
    assert len(list(checkpoint.directory(tmp_path).iterdir())) == 2  # and no temporary file


def test_a_failed_write_leaves_the_old_ones(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path, {"step": 2, "weights": lambda: None})
    assert [path.name for path in checkpoint.directory(tmp_path).iterdir()] == ["step_00000001.pt"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "text"])
def test_a_damaged_one_falls_back_to_the_one_before(tmp_path, damage):
    save(tmp_path, 1, 2)
    path = checkpoint.saved(tmp_path)[-1]
    whole = path.read_bytes()
    middle = len(whole) // 2
    weight = whole.index(torch.full((8,), 2.0).numpy().tobytes())  # not the padding between the members of the archive
    flipped = whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1 :]
    path.write_bytes({"cut": whole[:middle], "empty": b"", "flipped": flipped, "text": b"no checkpoint"}[damage])
    said = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None
    assert found[1]["step"] == 1
    assert len(said) == 1
    assert "step_00000002.pt is damaged" in said[0]
    assert "the checkpoint before it" in said[0]


def test_when_all_are_damaged_nothing_is_loaded(tmp_path):
    save(tmp_path, 1, 2)
    for path in checkpoint.saved(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        checkpoint.newest(tmp_path, lambda _: None)


def test_a_missing_one_says_so(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    with pytest.raises(UserError, match="there is no such checkpoint"):
        checkpoint.find(tmp_path / "step_00000001.pt")


def test_another_format_is_refused(tmp_path):
    torch.save({"format": 0}, tmp_path / "old.pt")
    with pytest.raises(UserError, match="checkpoint format 0; this version reads format 1"):
        checkpoint.load(tmp_path / "old.pt")


def test_it_names_the_versions(tmp_path):
    save(tmp_path, 1)
    assert checkpoint.load(checkpoint.saved(tmp_path)[0])["versions"]["torch"] == str(torch.__version__)


def test_every_generator_comes_back(tmp_path):
    def draw() -> tuple:
        legacy = np.random.normal()  # noqa: NPY002 - the global generator is what is kept
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), legacy

    draw()  # the Gaussian generators hold a spare number now
    save(tmp_path, 1)
    state = checkpoint.load(checkpoint.saved(tmp_path)[0])["rng"]
    expected = draw()
    assert draw() != expected
    checkpoint.restore_rng(state)
    assert draw() == expected
