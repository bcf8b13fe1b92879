"""The list of wrong answers, against the evaluation of the same tasks and against a source whose images are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments import wrong_answers
from experiments.config import EvaluateConfig
from experiments.errors import UserError
from experiments.evaluate import evaluate_checkpoint
from experiments.evaluation import Evaluation
from theria.data import ClassDataset

TINY = ["task=glyphs", "task.ways=20", "task.shots=1", "task.queries=2", "task.tasks=2", "trainer.val_every=0"]
TINY += ["model=transformer_patch", "model.d_model=8", "model.n_heads=2", "model.n_layers=1", "learner=protonet"]
TINY += ["inner.lr=0.1"]  # the default: it is not for this learner


@pytest.fixture
def run(run_here, tmp_path: Path) -> Path:
    run_here(tmp_path / "run", *TINY)
    return tmp_path / "run"


def test_there_are_as_many_as_the_evaluation_of_the_same_tasks_says(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "wrong.json"
    sizes = ["--ways", "5", "--shots", "2", "--episodes", "12", "--tasks", "4", "--device", "cpu"]
    assert wrong_answers.main([str(run), *sizes, "--out", str(out), "--show", "2"]) == 0
    record = json.loads(out.read_text())
    options = EvaluateConfig(checkpoint=str(run), device="cpu", episodes=12, tasks=4, ways=5, shots=2)
    result = evaluate_checkpoint(options, run)
    assert isinstance(result, Evaluation)
    assert record["answers"] == 12 * 5 * 2
    assert record["wrong"] == round((1 - result.after.mean) * record["answers"]) > 0
    assert record["wrong"] == sum(row["wrong"] for row in record["images"])
    counts = [row["wrong"] for row in record["images"]]
    assert counts == sorted(counts, reverse=True)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{record['wrong']} of 120 answers are wrong")


@pytest.mark.parametrize("episodes", ["10", "3"])
def test_the_answers_are_of_as_many_episodes_as_asked_for(run: Path, tmp_path: Path, episodes: str, capsys) -> None:
    out = tmp_path / "wrong.json"
    arguments = [str(run), "--ways", "5", "--shots", "2", "--tasks", "4", "--device", "cpu"]
    assert wrong_answers.main([*arguments, "--episodes", episodes, "--out", str(out), "--show", "0"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    record = json.loads(out.read_text())
    options = EvaluateConfig(checkpoint=str(run), device="cpu", episodes=int(episodes), tasks=4, ways=5, shots=2)
    result = evaluate_checkpoint(options, run)
    assert isinstance(result, Evaluation)
    assert record["answers"] == int(episodes) * 5 * 2
    assert record["wrong"] == round((1 - result.after.mean) * record["answers"])


def test_without_a_number_the_tasks_are_drawn_as_in_the_run(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "wrong.json"  # trainer.eval_tasks=4
    assert wrong_answers.main([str(run), "--episodes", "8", "--device", "cpu", "--out", str(out)]) == 0
    options = EvaluateConfig(checkpoint=str(run), device="cpu", episodes=8)
    result, own = evaluate_checkpoint(options, run), json.loads((run / "results.json").read_text())
    assert result.figure == own["mean"]  # trainer.test_episodes=8: the run's own final evaluation
    record = json.loads(out.read_text())
    assert record["wrong"] == round((1 - result.figure) * record["answers"])
    assert json.loads((run / "evaluation_test_20w1s.json").read_text())["tasks"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--show", "-1"], "--show -1: needed is at least 0"),
        (["--out", "nowhere/a.json"], "--out nowhere/a.json: needed is a file in a folder that is there"),
        (["--out", "."], "--out .: needed is a file"),
    ],
)
def test_wrong_arguments_are_refused_before_the_work(capsys, arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        wrong_answers.main(["nothing", *arguments])
    assert words in capsys.readouterr().err


def test_more_shots_than_there_are_images(run: Path) -> None:
    options = EvaluateConfig(checkpoint=str(run), device="cpu", shots=1000)
    with pytest.raises(UserError, match=r"^shots=1000: needed is at most \d+: a class of subset=test has \d+ images"):
        evaluate_checkpoint(options, run)


def test_an_image_is_known_by_its_class_and_number_under_every_turn() -> None:
    images = torch.randint(256, (3, 2, 1, 4, 4), dtype=torch.uint8)
    dataset = ClassDataset(images, names=["a", "b", "c"]).with_rotations()
    known = wrong_answers.images_of(dataset)
    assert len(known) == 24
    for c, name in enumerate("abc"):
        for i in range(2):
            for quarter in range(4):
                turned = images[c, i].rot90(quarter, (-2, -1)).contiguous()
                assert known[wrong_answers.key(turned)] == (name, i)
                assert known[wrong_answers.key(turned.float().div(255.0))] == (name, i)


def test_what_cannot_be_listed_is_said(run_here, tmp_path: Path, capsys) -> None:
    assert wrong_answers.main([str(tmp_path / "nothing")]) == 2
    assert "there is no such checkpoint" in capsys.readouterr().err
    run_here(tmp_path / "sinusoid", "task=sinusoid", "model=mlp", "trainer.val_every=0")
    assert wrong_answers.main([str(tmp_path / "sinusoid"), "--device", "cpu"]) == 2
    assert "task=sinusoid classifies no images" in capsys.readouterr().err
