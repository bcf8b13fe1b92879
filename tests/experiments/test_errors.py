"""Mistakes that a user can mend end in one message and an exit status, not in a traceback."""

import sys

import pytest

from experiments import errors
from experiments.config import EvaluateConfig
from experiments.evaluate import evaluate_checkpoint
from theria.meta.solvers import Result, SolverError
from theria.ops import UnsupportedError


def ended(monkeypatch, capsys, entry, *arguments: str) -> tuple[int, str]:
    """Exit status and message of a program with this entry point."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as caught:
        errors.run(entry)
    assert isinstance(caught.value.code, int)
    return caught.value.code, capsys.readouterr().err


def raiser(error: Exception):
    def entry() -> None:
        raise error

    return entry


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run_dir="], "run_dir: a value is needed"),
        (["run_dir=''"], "run_dir: a value is needed"),
        (["checkpoint="], "checkpoint: a value is needed"),
        (["--multirun", "seed=0,1", "run_dir=here"], "hydra.sweep.dir=here"),
        (["-m", "run_dir=here"], "hydra.sweep.dir=here"),
    ],
)
def test_a_path_that_would_be_misunderstood(monkeypatch, capsys, arguments, words):
    code, message = ended(monkeypatch, capsys, lambda: pytest.fail("work began"), *arguments)
    assert code == 2
    assert words in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UnsupportedError("backend 'triton' cannot compute this call: no GPU."), "'triton' cannot compute"),
        (SolverError(Result.max_iterations, 0.1, 7), "adjoint.solver, adjoint.iterations, inner.steps, learner=imaml"),
        (PermissionError(13, "Permission denied", "/runs/a"), "/runs/a: Permission denied"),
        (FileExistsError(17, "File exists", "a"), "a: File exists"),
        (NotADirectoryError(20, "Not a directory", "a/b"), "another run_dir"),
    ],
)
def test_what_fails_while_running_is_one_message(monkeypatch, capsys, error, words):
    code, message = ended(monkeypatch, capsys, raiser(error))
    assert code == 2
    assert words in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file", "a"), NotImplementedError("b"), OSError("c")])
def test_other_errors_keep_their_traceback(monkeypatch, error):
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(type(error)):
        errors.run(raiser(error))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inner_steps": -1}, "inner_steps=-1: needed is at least 0"),
        ({"seed": 2**63}, "needed is a number from"),
        ({"checkpoint": ""}, "checkpoint: a value is needed"),
    ],
)
def test_an_evaluation_refuses_wrong_values(tmp_path, settings, words):
    with pytest.raises(errors.UserError, match=words):
        evaluate_checkpoint(EvaluateConfig(**{"checkpoint": "nowhere", "run_dir": str(tmp_path), **settings}), tmp_path)


def test_a_file_is_no_run_dir(process, tiny, tmp_path):
    (tmp_path / "taken").write_text("kept")
    done = process("experiments.train", *tiny, "run_dir=taken")
    assert done.returncode == 2
    assert "taken: File exists" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "taken").read_text() == "kept"
