"""Mistakes that a user can mend end in one message and an exit status, not in a traceback."""

import sys
from pathlib import Path

import pytest

from experiments import errors
from experiments.config import EvaluateConfig, ProtocolKind
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
        (SolverError(Result.max_iterations, 0.1, 7), "adjoint.solver, adjoint.iterations, inner.lr, inner.steps"),
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
        ({"episodes": 0}, "episodes=0: needed is at least 1"),
        ({"device": "cuda:99"}, r"^device=cuda:99: (torch finds no CUDA here; give device=cpu|needed is a number)"),
        ({"device": "tpu"}, "^device=tpu: needed is auto"),
        ({"protocol": ProtocolKind.one_shot, "episodes": 600}, "^episodes=600: protocol=one_shot has the tasks"),
        ({"protocol": ProtocolKind.one_shot, "subset": "val"}, "^subset=val: protocol=one_shot has the tasks"),
        (
            {"protocol": ProtocolKind.one_shot, "distinct_characters": True},
            "^distinct_characters=true: protocol=one_shot has the tasks .*needed is the default",
        ),
    ],
)
def test_an_evaluation_refuses_wrong_values(tmp_path, settings, words):
    with pytest.raises(errors.UserError, match=words):
        evaluate_checkpoint(EvaluateConfig(**{"checkpoint": "nowhere", "run_dir": str(tmp_path), **settings}), tmp_path)


def test_a_folder_of_images_is_refused_where_there_are_none(run_here, tmp_path):
    run_here(tmp_path)
    settings = EvaluateConfig(checkpoint=str(tmp_path), run_dir=str(tmp_path), device="cpu", root="elsewhere")
    with pytest.raises(errors.UserError, match="root=elsewhere: task=sinusoid reads no folder: needed is null"):
        evaluate_checkpoint(settings, tmp_path)


@pytest.mark.parametrize(
    ("program", "experiment", "owner"),
    [
        ("experiments.bilevel", "sinusoid_maml", "experiments.train"),
        ("experiments.train", "hyper_cleaning", "experiments.bilevel"),
        ("experiments.train", "deq", "experiments.deq"),
        ("experiments.deq", "ridge_hyperparameter", "experiments.bilevel"),
    ],
)
def test_an_experiment_of_another_program_is_named_with_its_command(process, program, experiment, owner):
    done = process(program, f"experiment={experiment}")
    assert done.returncode == 2
    wanted = f"error: experiment={experiment}: it is of another program: python -m {owner} experiment={experiment}\n"
    assert done.stderr == wanted


def test_the_known_experiments_are_those_of_the_program(process):
    done = process("experiments.train", "experiment=xxxxxxxxxxxx")
    assert "experiment=xxxxxxxxxxxx: there is no such experiment; known: " in done.stderr
    assert "sinusoid_maml" in done.stderr
    assert not {"deq", "hyper_cleaning", "base"} & {*done.stderr.replace(",", " ").split()}


def test_a_setting_of_another_program_is_not_suggested_for_itself(process):
    done = process("experiments.bilevel", "experiment=ridge_hyperparameter", "task=glyphs")
    assert done.returncode == 2
    assert "task: experiments.bilevel has no such setting; --help lists those that it has" in done.stderr


@pytest.mark.parametrize("setting", ["run_dir", "hydra.sweep.dir"])
def test_a_file_system_that_has_no_such_folder(monkeypatch, capsys, setting):
    error = FileNotFoundError(2, "No such file or directory", "/proc/nope")
    code, message = ended(monkeypatch, capsys, raiser(error), f"{setting}='/proc/nope/a'")
    assert code == 2
    assert message.startswith("error: /proc/nope: No such file or directory; needed is a folder that can be written")
    with pytest.raises(FileNotFoundError):
        ended(monkeypatch, capsys, raiser(FileNotFoundError(2, "No such file", "data.npz")), f"{setting}=/proc/nope/a")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("arguments", [("experiments.train",), ("experiments.evaluate", "checkpoint=nowhere")])
def test_a_run_dir_that_cannot_be_made_is_one_line(process, arguments):
    done = process(*arguments, "run_dir=/proc/nope")
    assert done.returncode == 2
    assert done.stderr.startswith("error: /proc/nope: ")
    assert done.stderr.count("\n") == 1


def test_a_file_is_no_run_dir(process, tiny, tmp_path):
    (tmp_path / "taken").write_text("kept")
    done = process("experiments.train", *tiny, "run_dir=taken")
    assert done.returncode == 2
    assert "taken: File exists" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "taken").read_text() == "kept"
