"""Tracking: what reaches wandb, and that nothing of it can lose a run."""

import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import tracking
from experiments.config import TrackingConfig, TrackingMode

KEY = "0" * 40
NOWHERE = "http://127.0.0.1:9"  # the discard port: refuses at once


def test_offline_holds_config_scalars_and_pictures(process, tiny, tmp_path):
    arguments = [item for item in tiny if item != "tracking=off"]
    done = process("experiments.train", *arguments, "trainer.pictures=true", "inner.learn_lr=true", "run_dir=run")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "run/wandb").glob("offline-run-*")
    (record,) = run.glob("*.wandb")
    content = record.read_bytes()
    for name in ("train/loss", "val/mse", "gradient/norm", "gradient/second_order", "inner/lr_mean", "system/seconds"):
        assert name.encode() in content, name
    assert b"sinusoid" in content  # the configuration
    drawn = {path.stem.rsplit("_", 2)[0] for path in run.glob("files/media/images/pictures/*.png")}
    assert drawn == {"learning_curve", "inner_curve", "episode"}


@pytest.mark.parametrize("key", [{}, {"WANDB_API_KEY": KEY}], ids=["no key", "no server"])
def test_online_without_a_server_goes_on_offline(process, tiny, tmp_path, key):
    arguments = [item for item in tiny if item != "tracking=off"]
    online = ("tracking.mode=online", "tracking.timeout=2")
    done = process("experiments.train", *arguments, *online, "run_dir=run", WANDB_BASE_URL=NOWHERE, **key)
    assert done.returncode == 0, done.stderr
    assert "wandb cannot run online" in done.stdout
    assert "tracking goes on offline" in done.stdout
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 10


def test_without_wandb_the_run_says_so_and_goes_on(run_here, tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "wandb":
            raise ImportError("No module named 'wandb'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    run_here(tmp_path, "tracking.mode=offline")
    assert "wandb is not installed: only metrics.jsonl is written" in capsys.readouterr().out
    assert (tmp_path / "results.json").exists()


def test_a_failure_in_the_middle_ends_tracking_not_the_run(tmp_path):
    class Broken:
        def log(self, row):
            raise RuntimeError("the service is gone")

    said = []
    wandb = tracking.Wandb.__new__(tracking.Wandb)
    wandb.run, wandb.say = Broken(), said.append
    tracker = tracking.Tracker(tracking.JsonLines(tmp_path / "m.jsonl", 0), wandb)
    tracker.scalars(1, {"train/loss": 1.0})
    tracker.scalars(2, {"train/loss": 0.5})
    tracker.finish()
    assert len(said) == 1
    assert "the service is gone" in said[0]
    assert tracking.read(tmp_path / "m.jsonl") == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 0.5}]


def test_wandb_is_imported_only_where_it_is_used():
    code = "import sys, experiments.train, experiments.evaluate; sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = tracking.JsonLines(path, 0)
    for step in range(1, 6):
        lines.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 6, "train/lo')  # what a kill leaves
    tracking.JsonLines(path, 3).write({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_run_keeps_its_id(tmp_path):
    assert tracking._run_id(tmp_path) == tracking._run_id(tmp_path)


def test_the_default_is_offline():
    assert TrackingConfig().mode is TrackingMode.offline
