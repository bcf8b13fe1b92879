"""Runs of several processes: the run of one, written by one, and what happens when one of them stops."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experiments import checkpoint, tracking
from tests.ports import free_port

STEPS = 6
# Figures in float32 of the same parameters up to the order of a sum over five tasks.
FIGURES = 1e-4
# Adam's first steps divide a gradient by its own size: roundings of entries near zero count in full, times the rate
# of 1e-3 and six steps.
PARAMETERS = 1e-4
# Seconds for what takes ten on a machine with nothing else to do.
BUSY = 300
SLOW = ("debug.step_seconds=0.05", "trainer.val_every=0", "trainer.health_every=0", "trainer.steps=100000")

Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def arguments(tiny) -> list[str]:
    """5 tasks a step: the shares of two processes differ."""
    return [*tiny, "task.tasks=5", "trainer.test_episodes=10"]


@pytest.fixture
def start(environment, tmp_path) -> Iterator[Start]:
    """(number, module, overrides) -> so many processes of one run, by rank."""
    running: list[subprocess.Popen[str]] = []

    def begin(number: int, module: str, *overrides: str) -> list[subprocess.Popen[str]]:
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number)}
        for rank in map(str, range(number)):
            variables = {**environment, **told, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(number)}
            command = [sys.executable, "-W", "error", "-m", module, *overrides]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            running.append(subprocess.Popen(command, env=variables, cwd=tmp_path, **pipes))
        return running[-number:]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen[str]], timeout: float = BUSY) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def wait_for_step(run_dir: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + BUSY
    while not any(row["step"] >= step for row in tracking.read(run_dir / "metrics.jsonl")):
        assert all(process.poll() is None for process in processes), ends(processes)
        assert time.monotonic() < deadline, "the run makes no steps"
        time.sleep(0.02)


def final(run_dir: Path) -> dict:
    return checkpoint.load(checkpoint.saved(run_dir)[-1])


def figures(run_dir: Path) -> list[dict]:
    """What was measured, without what depends on the machine, nor the test figures of a run that went on later."""
    rows = [r for r in tracking.read(run_dir / "metrics.jsonl") if r["step"] == STEPS or "test/mse" not in r]
    return [{key: value for key, value in row.items() if not key.startswith("system/")} for row in rows]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = final(one), final(other)
    assert a["step"] == b["step"] == STEPS
    assert a["learner"].keys() == b["learner"].keys()
    for name, value in a["learner"].items():
        torch.testing.assert_close(b["learner"][name], value, rtol=PARAMETERS, atol=PARAMETERS * 1e-2)
    assert len(figures(one)) == len(figures(other))
    for row, copy in zip(figures(one), figures(other), strict=True):
        assert copy == pytest.approx(row, rel=FIGURES)


def torchrun(number: int, environment: dict[str, str], cwd: Path, module: str, *overrides: str):
    """As a user types it."""
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", "-m"]
    command = [*program, module, *overrides]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=BUSY)


def test_a_run_of_two_processes_is_that_of_one(run_here, arguments, environment, tmp_path):
    alone = run_here(tmp_path / "alone", *arguments)
    done = torchrun(2, environment, tmp_path, "experiments.train", *arguments)
    assert done.returncode == 0, done.stderr
    (together,) = tmp_path.glob("outputs/default/*")  # one directory, though its name is the time
    assert_same_run(tmp_path / "alone", together)
    written = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (tmp_path / "alone", together)]
    assert written[1] == written[0]
    assert done.stdout.count("test mse") == 1  # one of them speaks
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "outputs"}

    again = torchrun(
        2, environment, tmp_path, "experiments.evaluate", f"checkpoint={together}", "episodes=10", "tasks=4"
    )
    assert again.returncode == 0, again.stderr
    told = next(line for line in done.stdout.splitlines() if line.startswith("test mse"))
    assert again.stdout.count(told) == 1  # the same tasks, the same parameters, the same figures
    assert alone.after.n == 10


def test_a_run_goes_on_with_another_number_of_processes_one_without_a_task(run_here, arguments, start, tmp_path):
    options = [*arguments, "task.tasks=2", "trainer.schedule=constant", "trainer.val_every=2"]
    run_here(tmp_path / "whole", *options)
    run_here(tmp_path / "parts", *options, "trainer.steps=4")
    results = ends(start(3, "experiments.train", *options, f"run_dir={tmp_path / 'parts'}", "trainer.resume=true"))
    assert [code for code, _, _ in results] == [0, 0, 0], results
    assert "at step 4" in results[0][1]
    assert [output for _, *outputs in results[1:] for output in outputs] == [""] * 4  # one of them speaks
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_process_ends_the_run_and_the_last_checkpoint_stays(arguments, start, tmp_path):
    run_dir = tmp_path / "run"
    processes = start(2, "experiments.train", *arguments, *SLOW, f"run_dir={run_dir}")
    wait_for_step(run_dir, 5, processes)
    os.kill(processes[0].pid, signal.SIGKILL)
    begun = time.monotonic()
    results = ends(processes)
    assert time.monotonic() - begun < 120  # and not the 600 seconds of trainer.process_timeout
    code, _, stderr = results[1]
    last = checkpoint.saved(run_dir)[-1]
    assert code == 4
    assert "process 1 of 2, " in stderr
    assert "another process is gone" in stderr
    assert f"last checkpoint: {last}" in stderr
    assert "resume: torchrun --nproc-per-node=2 -m experiments.train" in stderr
    assert "Traceback" not in stderr
    assert checkpoint.load(last)["step"] >= 4


def test_a_process_that_hangs_ends_the_run_within_the_timeout(arguments, start, tmp_path):
    run_dir = tmp_path / "run"
    options = [*arguments, *SLOW, "trainer.process_timeout=5", f"run_dir={run_dir}"]
    processes = start(2, "experiments.train", *options)
    wait_for_step(run_dir, 5, processes)
    processes[1].send_signal(signal.SIGSTOP)
    try:
        ((code, _, stderr),) = ends(processes[:1])
    finally:
        processes[1].kill()
    assert code == 4, stderr
    assert "another process is gone or did not answer" in stderr


def test_a_signal_to_any_process_stops_all_at_one_step(arguments, start, tmp_path):
    run_dir = tmp_path / "run"
    processes = start(2, "experiments.train", *arguments, *SLOW, f"run_dir={run_dir}")
    wait_for_step(run_dir, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = ends(processes)
    assert [code for code, _, _ in results] == [143, 143], results
    assert f"stopped at step {final(run_dir)['step']}:" in results[0][2]
    assert "stopped" not in results[1][2]
    assert "resume: torchrun --nproc-per-node=2 -m experiments.train" in results[0][2]
    assert "error" not in results[1][2]


def test_what_is_not_finite_is_named_by_its_number_among_all_tasks(arguments, start, tmp_path):
    run_dir = tmp_path / "run"
    options = [*arguments, "debug.nan_step=3", "debug.nan_task=4", f"run_dir={run_dir}"]
    results = ends(start(2, "experiments.train", *options))
    assert [code for code, _, _ in results] == [3, 3], results
    assert "error: step 3, task 4" in results[0][2]
    assert "error" not in results[1][2]
    assert final(run_dir)["step"] == 3


def test_a_mistake_is_said_once(run_here, arguments, start, tmp_path):
    run_here(tmp_path / "run", *arguments)
    results = ends(start(2, "experiments.train", *arguments, f"run_dir={tmp_path / 'run'}"))
    assert [code for code, _, _ in results] == [2, 2]
    assert "holds the checkpoints of an earlier run" in results[0][2]
    assert "error" not in results[1][2]
    results = ends(start(2, "experiments.train", "--multirun", *arguments, "seed=0,1"))
    assert [code for code, _, _ in results] == [2, 2]
    assert "several processes train one run at a time" in results[0][2]
