"""run.json: the command, commit and versions of each part of a run."""

import json
import subprocess

import torch

from experiments import provenance


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_the_commit_is_that_of_the_checkout(tmp_path):
    assert provenance.commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert provenance.commit(tmp_path) is None  # nothing committed yet
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "one")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert provenance.commit(tmp_path) == {"hash": head, "dirty": False}
    (tmp_path / "new.py").write_text("2")  # an output, say
    assert provenance.commit(tmp_path) == {"hash": head, "dirty": False}
    (tmp_path / "code.py").write_text("3")
    assert provenance.commit(tmp_path) == {"hash": head, "dirty": True}
    (tmp_path / "inside").mkdir()
    assert provenance.commit(tmp_path / "inside") is None  # somebody else's repository


def test_without_git_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None


def test_every_part_of_a_run_says_how_it_began(run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "commit", lambda: {"hash": "abc", "dirty": True})
    schedule = "trainer.schedule=constant"
    run_here(tmp_path, schedule, "trainer.steps=2")
    run_here(tmp_path, schedule, "trainer.steps=4", "trainer.resume=true")
    first, second = json.loads((tmp_path / "run.json").read_text())["parts"]
    assert first["command"] == f"python -m experiments.train {schedule} trainer.steps=2"
    assert (first["step"], second["step"]) == (0, 2)
    assert first["machine"]["torch"] == torch.__version__
    assert second["commit"] == {"hash": "abc", "dirty": True}
    (tmp_path / "run.json").write_text("{")
    provenance.record(tmp_path, "again", 4)
    assert [part["command"] for part in json.loads((tmp_path / "run.json").read_text())["parts"]] == ["again"]
