"""Runs as processes, stopped by real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import checkpoint, tracking

SLOW = ("debug.step_seconds=0.05", "trainer.val_every=0", "trainer.health_every=0", "inner.learn_lr=true")
STEPS = 24


@pytest.fixture(scope="module")
def whole() -> dict[str, Path]:
    """The uninterrupted run of this module, made when first needed."""
    return {}


@pytest.fixture
def arguments(tiny) -> list[str]:
    return [*tiny, *SLOW, f"trainer.steps={STEPS}"]


def stopped_at(run_dir: Path, step: int, command: list[str], sent: signal.Signals, **options) -> tuple[int, str]:
    """Start a run, send a signal once `step` is in its metrics; its exit status and output."""
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    try:
        deadline = time.monotonic() + 60
        while not any(row["step"] >= step for row in tracking.read(run_dir / "metrics.jsonl")):
            assert run.poll() is None, run.communicate()[0]
            assert time.monotonic() < deadline, "the run makes no steps"
            time.sleep(0.02)
        os.killpg(run.pid, sent)  # as a terminal does: to the whole group, wandb's service included
        output = run.communicate(timeout=60)[0]
    finally:
        if run.poll() is None:
            run.kill()
            run.communicate()
    return run.returncode, output


def parameters(run_dir: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(checkpoint.saved(run_dir)[-1])
    assert state["step"] == STEPS
    return state["learner"]


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=lambda value: str(value)
)
def test_a_stopped_run_resumes_to_the_same_bits(
    process, arguments, environment, tmp_path, tmp_path_factory, whole, sent, code
):
    if not whole:
        whole["run"] = tmp_path_factory.mktemp("whole") / "run"
        assert process("experiments.train", *arguments, f"run_dir={whole['run']}").returncode == 0
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", *arguments, f"run_dir={run_dir}"]
    returned, output = stopped_at(run_dir, 7, command, sent, env=environment, cwd=tmp_path, start_new_session=True)
    assert returned == code, output
    reached = checkpoint.load(checkpoint.saved(run_dir)[-1])["step"]
    assert 6 <= reached < STEPS
    if sent is not signal.SIGKILL:
        assert f"stopped at step {reached}" in output
        assert "Traceback" not in output
        resume = output.split("resume: ")[1].splitlines()[0].split()
        assert resume[:3] == ["python", "-m", "experiments.train"]
        arguments = resume[3:]  # the command that was told is the one that works
    else:
        arguments = [*arguments, f"run_dir={run_dir}", "trainer.resume=true"]
    resumed = process("experiments.train", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert f"at step {reached}" in resumed.stdout
    a, b = parameters(whole["run"]), parameters(run_dir)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [row["step"] for row in tracking.read(run_dir / "metrics.jsonl") if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))


def test_a_typo_ends_before_any_work(process, tmp_path):
    done = process("experiments.train", "trainer.stpes=10", "run_dir=run")
    assert done.returncode == 2
    assert done.stderr == "error: trainer.stpes: there is no such setting; did you mean trainer.steps?\n"
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_nan_ends_with_status_3(process, tiny):
    done = process("experiments.train", *tiny, "debug.nan_step=2", "run_dir=run")
    assert done.returncode == 3
    assert "error: step 2, task 0" in done.stderr
    assert "run/checkpoints/step_00000002.pt" in done.stderr
    assert "Traceback" not in done.stderr


def test_multirun_then_evaluate(process, tiny, tmp_path):
    done = process("experiments.train", "--multirun", *tiny, "seed=0,1", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning, of Hydra or of anyone
    runs = [tmp_path / "sweep" / name for name in ("0", "1")]
    states = [checkpoint.load(checkpoint.saved(run)[-1]) for run in runs]
    assert [state["config"]["seed"] for state in states] == [0, 1]
    assert not torch.equal(*[next(iter(state["learner"].values())) for state in states])

    told = next(line for line in done.stdout.splitlines() if line.startswith("test mse"))
    again = process("experiments.evaluate", "checkpoint=sweep/0", "episodes=8", "tasks=4", "run_dir=evaluation")
    assert again.returncode == 0, again.stderr
    assert told in again.stdout  # the same tasks, the same parameters, the same figures
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["evaluation_test_5s.json"]  # and no .hydra
    wrong = process("experiments.evaluate", "checkpoint=sweep/0", "subset=tset")
    assert wrong.returncode == 2
    assert "train, val, test" in wrong.stderr


def test_a_sweep_with_a_typo_starts_no_run(process, tiny, tmp_path):
    done = process("experiments.train", "--multirun", *tiny, "task=sinusoid,sinusiod", "hydra.sweep.dir=sweep")
    assert done.returncode == 2
    assert "did you mean sinusoid?" in done.stderr
    assert not list(tmp_path.glob("sweep/*/metrics.jsonl"))


def test_the_real_default_in_miniature(process, tmp_path):
    """The default task and network, a handful of steps, everything switched on."""
    done = process("experiments.train", "debug=fast", "tracking=wandb", "tracking.mode=offline", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert "without adaptation" in done.stdout
    assert "chance 20.0 %" in done.stdout
    assert sorted(path.name for path in (tmp_path / "run/pictures").iterdir()) == [
        "attention.png",
        "episode.png",
        "inner_curve.png",
        "learning_curve.png",
    ]
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
