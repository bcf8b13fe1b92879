"""The folder of a run: one process at a time, nothing of an earlier run replaced, the command that goes on in it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments import checkpoint, folder, launch, resume, tracking
from experiments.errors import NonFiniteError, UserError

SLOW = ("debug.step_seconds=0.05", "trainer.val_every=0", "trainer.health_every=0", "trainer.steps=100000")
BUSY = 120


def files(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------- one at a time


def test_a_folder_is_held_and_let_go(tmp_path):
    with folder.held(tmp_path / "run"):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} of .*give another run_dir"):
            folder.held(tmp_path / "run").__enter__()
        with folder.held(tmp_path / "other"):
            pass
    with folder.held(tmp_path / "run"):
        pass


def test_a_second_process_is_refused_until_the_first_is_killed(process, environment, tiny, tmp_path):
    arguments = [*tiny, *SLOW, "trainer.schedule=constant", "run_dir=run"]
    command = [sys.executable, "-m", "experiments.train", *arguments]
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + BUSY
        while not any(row["step"] >= 3 for row in tracking.read(tmp_path / "run" / tracking.METRICS)):
            assert first.poll() is None
            assert time.monotonic() < deadline, "the run makes no steps"
            time.sleep(0.05)
        second = process("experiments.train", *arguments, "trainer.resume=true")
        assert second.returncode == 2
        assert f"in use by process {first.pid} of " in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    third = process("experiments.train", *arguments, "trainer.steps=5", "trainer.resume=true")
    assert third.returncode == 0, third.stderr


# ----------------------------------------------------------------------------------------------- nothing is replaced


def test_a_finished_run_without_its_checkpoints_is_not_replaced(run_here, tmp_path):
    run_here(tmp_path)
    for path in checkpoint.saved(tmp_path):
        path.unlink()
    kept = files(tmp_path)
    for option in ("trainer.resume=false", "trainer.resume=true"):
        with pytest.raises(UserError, match=r"holds results\.json of an earlier run: give another run_dir"):
            run_here(tmp_path, option)
    (tmp_path / "results.json").unlink()
    with pytest.raises(UserError, match=r"holds metrics\.jsonl of an earlier run"):
        run_here(tmp_path)
    assert files(tmp_path) == {path: text for path, text in kept.items() if path.name != "results.json"}


@pytest.mark.parametrize("program", ["bilevel experiment=ridge_hyperparameter outer.steps=1", "deq experiment=deq"])
def test_nor_is_one_by_the_other_programs(process, program, tmp_path):
    name, *arguments = program.split()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").write_text("{}")
    done = process(f"experiments.{name}", *arguments, "run_dir=run")
    assert done.returncode == 2, done.stderr
    assert "holds results.json of an earlier run" in done.stderr
    left = {path.name for path in files(tmp_path / "run")}
    assert left <= {"results.json", ".lock"}


def test_a_refused_command_writes_nothing(process, run_here, tiny, tmp_path):
    run_here(tmp_path / "run")
    kept = files(tmp_path / "run")
    done = process("experiments.train", *tiny, "seed=5", "run_dir=run")
    assert done.returncode == 2
    assert "holds the checkpoints of an earlier run" in done.stderr
    assert files(tmp_path / "run") == kept


def test_what_failed_at_its_first_step_is_begun_anew(run_here, tmp_path):
    with pytest.raises(NonFiniteError):
        run_here(tmp_path / "run", "debug.nan_step=0", "trainer.lr=0.5")
    assert [checkpoint.step_of(path) for path in checkpoint.saved(tmp_path / "run")] == [0]
    run_here(tmp_path / "run")
    run_here(tmp_path / "whole")
    one, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole"))
    assert one["mean"] == other["mean"]
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["parts"]) == 2  # the failed one is not forgotten


def test_what_was_killed_between_two_checkpoints_is_not(run_here, tmp_path):
    run_here(tmp_path)
    (tmp_path / "results.json").unlink()
    state = checkpoint.load(checkpoint.saved(tmp_path)[-1])
    for path in checkpoint.saved(tmp_path):
        path.unlink()
    checkpoint.save(tmp_path, {**state, "step": 0})
    with pytest.raises(UserError, match=r"trainer\.resume=true"):
        run_here(tmp_path)


# --------------------------------------------------------------------------------------------------- the command

NAMES = [
    "a=b",
    "a[1]",
    "a,b",
    "it's",
    "a b",
    "a(b)",
    "{a}",
    "back\\",
    "quote\\'",
    'a"b',
    "ä",
    "~x",
    "a:b",
    "#",
]


@pytest.mark.parametrize("name", [*NAMES, "plain", "true", "1e3", "null"])
def test_a_path_comes_back_from_shell_and_hydra(name):
    for path in (Path("/runs") / name, Path(name)):
        (*_, argument, _) = shlex.split(resume.command(["seed=1"], path))
        override = OverridesParser.create().parse_override(argument)
        assert override.key_or_group == "run_dir"
        assert str(override.value()) == str(path)
        (*_, argument) = shlex.split(resume.evaluation(path))
        assert str(OverridesParser.create().parse_override(argument).value()) == str(path)


def test_a_usual_path_is_not_quoted():
    assert resume.command([], Path("/a/b-1/c_2.d")).endswith(" run_dir=/a/b-1/c_2.d trainer.resume=true")


@pytest.mark.parametrize("name", ["seed=0", "it's {a}[1]"])
def test_the_command_goes_on(process, run_here, tiny, tmp_path, name):
    run_here(tmp_path / name, "trainer.steps=2", "trainer.schedule=constant")
    overrides = [*tiny, "trainer.steps=3", "trainer.schedule=constant"]
    *_, run_dir, again = shlex.split(resume.command(overrides, tmp_path / name))
    done = process("experiments.train", *overrides, run_dir, again)
    assert done.returncode == 0, done.stderr
    assert "at step 2" in done.stdout
    assert checkpoint.step_of(checkpoint.saved(tmp_path / name)[-1]) == 3


def test_a_run_of_a_search_is_resumed_without_the_search():
    assert resume.whole(["sweep=rates", "inner.lr=0.1", "run_dir=x"]) == "python -m experiments.train inner.lr=0.1"


def test_options_come_before_settings():
    given = ["seed=0,1", "--config-name", "train", "a.b=1", "--multirun", "~debug", "hydra.output_subdir=mine"]
    options, settings = given[1:3] + given[4:5], [given[0], given[3], *given[5:]]
    assert launch.arranged(given) == [*options, *settings]
