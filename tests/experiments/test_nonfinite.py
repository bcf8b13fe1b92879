"""Predictions that are not finite are no answers: loud where a figure is reported, told where a run goes on."""

import json
import math

import pytest
import torch

from experiments import build, checkpoint, protocols, tracking, wrong_answers
from experiments.config import EvaluateConfig
from experiments.errors import NonFiniteError
from experiments.evaluate import evaluate_checkpoint
from experiments.evaluation import evaluate, task_metric
from experiments.train import objective
from theria.data import Episode

# A small network on digits.
FAST = ("task=digits", "task.ways=3", "task.queries=2", "task.tasks=2", "model=transformer_patch", "model.d_model=8")
FAST += ("model.n_heads=2", "model.n_layers=1", "learner=maml", "trainer.eval_tasks=4", "trainer.steps=2")


def diverging(count: int):
    """Trains well, and from the given inner step on every prediction of some tasks is NaN."""

    def trajectory(self, episode: Episode, steps: int) -> torch.Tensor:
        right = torch.nn.functional.one_hot(episode.query_y, 3).float()
        points = right.repeat(steps + 1, 1, 1, 1)
        points[2:, :count] = math.nan
        return points

    return trajectory


@pytest.fixture
def nan_predictions(monkeypatch):
    from theria.meta.maml import MAML

    return lambda count: monkeypatch.setattr(MAML, "predict_trajectory", diverging(count))


def test_no_answer_is_right():
    logits = torch.nn.functional.one_hot(torch.zeros(2, 3).long(), 3).float()
    target = torch.zeros(2, 3).long()
    assert task_metric(logits, target).tolist() == [1, 1]
    for bad in (math.nan, math.inf, -math.inf):
        logits[1, 2, 1] = bad
        figures = task_metric(logits, target).tolist()
        assert figures[0] == 1
        assert math.isnan(figures[1])
    assert math.isnan(float(task_metric(torch.full((1, 2, 1), math.nan), torch.zeros(1, 2, 1))))


def test_a_validation_counts_them_as_wrong_and_says_so_and_the_test_is_refused(
    run_here, tmp_path, capsys, nan_predictions
):
    nan_predictions(1)
    with pytest.raises(NonFiniteError) as caught:
        run_here(tmp_path, *FAST, "inner.eval_steps=3", "trainer.val_every=1")
    message = str(caught.value)
    assert message.startswith("test: 2 of 8 episodes have predictions that are not finite at inner steps 2, 3, so that")
    assert "step_00000002.pt" in message
    assert f"experiments.evaluate checkpoint={tmp_path} inner_steps=" in message
    said = capsys.readouterr().out
    assert "val accuracy 75.00 %" in said
    assert "2 of 8 episodes have predictions that are not finite at inner steps 2, 3, and count as wrong" in said
    rows = tracking.read(tmp_path / tracking.METRICS)
    assert [row["val/nonfinite"] for row in rows if "val/accuracy" in row] == [2, 2, 2]
    assert not any("test/accuracy" in row for row in rows)
    assert not (tmp_path / "results.json").exists()
    assert checkpoint.load(checkpoint.saved(tmp_path)[-1])["step"] == 2  # nothing is lost

    options = EvaluateConfig(checkpoint=str(tmp_path), device="cpu", episodes=8)
    with pytest.raises(NonFiniteError, match="inner steps 2, 3, so that there is no figure"):
        evaluate_checkpoint(options, tmp_path)
    assert wrong_answers.main([str(tmp_path), "--episodes", "8", "--device", "cpu"]) == 3
    assert "predictions after 3 inner steps are not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("evaluation*"))
    options.inner_steps = 1
    assert evaluate_checkpoint(options, tmp_path).figure == 1


def test_a_regression_that_diverges_has_no_figure(run_here, tmp_path, capsys):
    """One step, as in training, is finite; many are not."""
    with pytest.raises(NonFiniteError, match="not finite at inner steps"):
        run_here(tmp_path, "inner.lr=20", "inner.eval_steps=100", "trainer.clip=1", "trainer.steps=2")
    assert "are not finite at inner steps" in capsys.readouterr().out
    rows = [row for row in tracking.read(tmp_path / tracking.METRICS) if "val/mse" in row]
    assert rows[-1]["val/mse"] is None
    assert objective(tmp_path) == math.inf  # the worst that there is, and a number


def test_the_one_shot_test_is_refused(compose_config, nan_predictions):
    config = compose_config(*FAST)
    learner = build.build_learner(config).eval()
    runs = protocols.FixedTasks(build.build_source(config, "test", tasks=4).sample(0))
    options = {"steps": 2, "alive": lambda: None}
    nan_predictions(0)
    assert protocols.one_shot(learner, runs, **options).figure == 0
    nan_predictions(3)
    with pytest.raises(NonFiniteError, match="3 of 4 runs have predictions that are not finite after 2 inner steps"):
        protocols.one_shot(learner, runs, **options)


def test_finite_figures_are_what_they_were(compose_config):
    config = compose_config(*FAST)
    source = build.build_source(config, "test", tasks=4)
    options = {"episodes": 8, "steps": 2, "subset": "test", "alive": lambda: None}
    result = evaluate(build.build_learner(config).eval(), source, **options)
    assert result.lost == (0, 0, 0)
    assert result.nonfinite() == ""
    assert result.require_finite("") is result
    assert "test/nonfinite" not in result.scalars()
    assert json.loads(json.dumps(result.record())) == result.record()
