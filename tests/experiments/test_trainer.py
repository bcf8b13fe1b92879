"""The loop: what it writes, how it goes on, how it stops."""

import json
import math

import pytest
import torch
import yaml

from experiments import checkpoint, tracking
from experiments.errors import NonFiniteError, UserError


def final(run_dir) -> dict:
    return checkpoint.load(checkpoint.saved(run_dir)[-1])


def same_bits(a, b) -> bool:
    """Equality of nested states, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same_end(a, b) -> None:
    one, other = final(a), final(b)
    for key in ("step", "learner", "optimiser", "rng"):
        assert same_bits(one[key], other[key]), key


def test_a_run_leaves_its_configuration_metrics_and_results(run_here, tmp_path):
    result = run_here(tmp_path, "inner.learn_lr=true")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["trainer"]["steps"] == 6
    assert config["task"]["name"] == "sinusoid"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/mse" in row] == [0, 3, 6]
    assert [row["step"] for row in rows if "gradient/second_order" in row] == [3, 6]
    assert all(row["gradient/norm"] > 0 for row in rows if "gradient/norm" in row)
    assert {key.split("/")[0] for row in rows for key in row} <= {*tracking.GROUPS, "step"}
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["mean"] == result.after.mean
    assert record["command"] == "python -m experiments.train inner.learn_lr=true"
    assert {"torch", "python", "cpu", "theria"} <= record["machine"].keys()
    assert not (tmp_path / "wandb").exists()  # tracking=off


def test_training_learns(run_here, tmp_path):
    before = run_here(tmp_path / "a", "trainer.steps=1", "trainer.test_episodes=200", "trainer.eval_tasks=100")
    after = run_here(
        tmp_path / "b",
        "trainer.steps=300",
        "trainer.lr=0.01",
        "trainer.val_every=0",
        "task.tasks=16",
        "trainer.test_episodes=200",
        "trainer.eval_tasks=100",
    )
    assert after.after.mean + after.after.half_width < before.after.mean - before.after.half_width
    assert after.after.mean < after.curve[0].mean  # and the inner steps are what helps


def test_one_episode_can_be_learnt_by_heart(run_here, tmp_path):
    run_here(
        tmp_path,
        "debug.repeat_episode=true",
        "task.tasks=1",
        "task.queries=1",
        "trainer.steps=150",
        "trainer.lr=0.01",
        "trainer.schedule=constant",
        "trainer.val_every=0",
    )
    losses = [row["train/loss"] for row in tracking.read(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert losses[-1] < 1e-3 * losses[0]


@pytest.mark.parametrize("learn_lr", ["true", "false"])
def test_a_resumed_run_ends_bitwise_the_same(run_here, tmp_path, learn_lr):
    options = [f"inner.learn_lr={learn_lr}", "trainer.schedule=constant"]
    run_here(tmp_path / "whole", *options, "trainer.steps=6")
    run_here(tmp_path / "parts", *options, "trainer.steps=4")
    torch.rand(7)  # what happens between the parts does not matter
    run_here(tmp_path / "parts", *options, "trainer.steps=6", "trainer.resume=true")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    steps = [row["step"] for row in tracking.read(tmp_path / "parts/metrics.jsonl") if "train/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_in_another_directory(run_here, tmp_path):
    run_here(tmp_path / "whole", "trainer.schedule=constant")
    run_here(tmp_path / "first", "trainer.schedule=constant", "trainer.steps=3")
    path = checkpoint.saved(tmp_path / "first")[-1]
    run_here(tmp_path / "second", "trainer.schedule=constant", f"trainer.resume={path}")
    assert_same_end(tmp_path / "whole", tmp_path / "second")


def test_a_damaged_last_checkpoint_costs_steps_and_nothing_else(run_here, tmp_path, capsys):
    run_here(tmp_path / "whole")
    run_here(tmp_path / "broken")
    path = checkpoint.saved(tmp_path / "broken")[-1]
    path.write_bytes(path.read_bytes()[:-1000])
    run_here(tmp_path / "broken", "trainer.resume=true")
    said = capsys.readouterr()
    assert "step_00000006.pt is damaged" in said.err
    assert "resumed from" in said.out
    assert "at step 4" in said.out
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


def test_another_configuration_is_not_continued(run_here, tmp_path):
    run_here(tmp_path)
    with pytest.raises(UserError, match=r"inner\.lr: 0\.02 in the checkpoint, 0\.5 now"):
        run_here(tmp_path, "trainer.resume=true", "inner.lr=0.5")
    with pytest.raises(UserError, match=r"trainer\.steps: 6 in the checkpoint, 9 now"):
        run_here(tmp_path, "trainer.resume=true", "trainer.steps=9")  # the cosine would have been another


def test_an_earlier_run_is_not_overwritten(run_here, tmp_path):
    run_here(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.resume=true"):
        run_here(tmp_path)


def test_another_runs_checkpoint_does_not_mix_with_those_of_an_earlier_run(run_here, tmp_path):
    schedule = "trainer.schedule=constant"
    run_here(tmp_path / "long", schedule)
    run_here(tmp_path / "short", schedule, "trainer.steps=2")
    with pytest.raises(UserError, match="holds the checkpoints of an earlier run"):
        run_here(tmp_path / "long", schedule, f"trainer.resume={tmp_path / 'short'}")
    own = checkpoint.saved(tmp_path / "short")[-1]
    run_here(tmp_path / "short", schedule, f"trainer.resume={own}")
    assert_same_end(tmp_path / "long", tmp_path / "short")


def test_resuming_where_nothing_is_starts(run_here, tmp_path, capsys):
    run_here(tmp_path, "trainer.resume=true")
    assert "starting at step 0" in capsys.readouterr().err
    assert final(tmp_path)["step"] == 6


def test_a_missing_checkpoint_is_an_error(run_here, tmp_path):
    with pytest.raises(UserError, match="no such checkpoint"):
        run_here(tmp_path, f"trainer.resume={tmp_path}/step_1.pt")


def test_a_nan_names_step_task_and_checkpoint(run_here, tmp_path):
    with pytest.raises(NonFiniteError) as caught:
        run_here(tmp_path, "debug.nan_step=5", "debug.nan_task=2")
    message = str(caught.value)
    assert "step 5, task 2" in message
    good = checkpoint.saved(tmp_path)[-1]
    assert str(good) in message
    state = checkpoint.load(good)
    assert state["step"] == 5
    assert all(bool(value.isfinite().all()) for value in state["learner"].values())
    rows = tracking.read(tmp_path / "metrics.jsonl")
    assert [row["gradient/nonfinite"] > 0 for row in rows if row["step"] == 5][-1]


def test_after_a_nan_the_run_goes_on_from_the_last_good_step(run_here, tmp_path):
    run_here(tmp_path / "whole")
    with pytest.raises(NonFiniteError):
        run_here(tmp_path / "parts", "debug.nan_step=5")
    run_here(tmp_path / "parts", "trainer.resume=true")
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


def test_a_solve_that_fails_names_task_and_reason(run_here, tmp_path):
    """CG of five iterations, with which the host looks at no residual: the gradient is NaN, and it is told why."""
    implicit = ["learner=imaml", "adjoint=implicit", "adjoint.iterations=5", "trainer.health_every=0"]
    with pytest.raises(NonFiniteError, match=r"step 0, task \d: gradient norm nan.*\n.*indefinite.*learner\.strength"):
        run_here(tmp_path / "flat", *implicit, "learner.tol=null", "learner.strength=1e-6", "inner.steps=1")
    with pytest.raises(NonFiniteError, match=r"step 0, task \d: loss nan.*\n.* tol=1: .*another inner rate.*inner\.lr"):
        run_here(tmp_path / "diverging", *implicit, "inner.lr=10", "inner.steps=30")


def test_a_diverging_run_stops(run_here, tmp_path):
    with pytest.raises(NonFiniteError, match="is not finite"):
        run_here(tmp_path, "inner.lr=1e30")


@pytest.mark.parametrize("every", [1, 100])
def test_a_last_update_that_is_not_finite_is_not_kept(run_here, tmp_path, monkeypatch, every):
    def spoil(optimiser):
        optimiser.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(NonFiniteError, match=r"step 1: a parameter is not finite.*\n.*step_00000000\.pt"):
        run_here(tmp_path, "trainer.steps=1", "trainer.val_every=0", f"trainer.checkpoint_every={every}")
    assert final(tmp_path)["step"] == 0
    assert not (tmp_path / "results.json").exists()


def test_one_episode_gives_valid_json(run_here, tmp_path):
    run_here(tmp_path, "trainer.test_episodes=1")
    record = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert record["ci95"] is record["before_ci95"] is None
    assert record["curve_ci95"] == [None, None]
    assert record["mean"] > 0


def test_the_wall_clock_ends_training_early(run_here, tmp_path, capsys):
    result = run_here(tmp_path, "trainer.max_minutes=0.01", "trainer.steps=100000", "trainer.val_every=0")
    assert "trainer.max_minutes=0.01 is used up at step" in capsys.readouterr().out
    assert result.after.n == 8  # the evaluation is done all the same
    assert 0 < final(tmp_path)["step"] < 100000


def test_clipping_bounds_the_update_and_reports_the_whole_norm(run_here, tmp_path):
    run_here(tmp_path / "free", "trainer.steps=1")
    run_here(tmp_path / "bound", "trainer.steps=1", "trainer.clip=1e-9")
    norms = [tracking.read(tmp_path / name / "metrics.jsonl")[1]["gradient/norm"] for name in ("free", "bound")]
    assert norms[0] == norms[1] > 0


def test_the_second_order_share_is_that_of_a_quadratic():
    """One inner step on ½ h w² from w: g = (1 - αh)² h w, without second order g1 = (1 - αh) h w, share αh/(1 - αh)."""
    from experiments.health import second_order_share
    from theria import meta
    from theria.data import Episode

    h, alpha = 0.5, 0.4
    model = torch.nn.Linear(1, 1, bias=False).double()
    ones, zeros = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)

    def loss(prediction, target):
        return 0.5 * h * (prediction - target).square().sum()

    for adjoint in (meta.Unrolled(), meta.MixedMode()):
        learner = meta.MAML(model, loss, inner=meta.SGD(lr=alpha), steps=1, adjoint=adjoint)
        share = second_order_share(learner, Episode(ones, zeros, ones, zeros))
        assert share == pytest.approx(alpha * h / (1 - alpha * h), rel=1e-12)


def test_a_live_bar_shows_the_same_run(run_here, tmp_path, capsys):
    assert run_here(tmp_path / "bar", "trainer.display=bar") == run_here(tmp_path / "off", "trainer.display=off")
    assert "test mse" in capsys.readouterr().out


def test_plain_progress_names_loss_figure_speed_and_time_left(capsys, monkeypatch):
    from experiments.progress import Plain

    times = iter([100.0, 110.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    shown = Plain(total=30, done=0)
    shown.update(10, {"loss": "1.5", "tasks/s": "40"})
    shown.update(20, {"loss": "1.2", "accuracy": "0.5", "tasks/s": "40"})
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 10/30  loss 1.5  tasks/s 40"  # nothing is known of the speed yet
    assert second == "step 20/30  loss 1.2  accuracy 0.5  tasks/s 40  left 0:10"


def test_pictures_are_drawn(run_here, tmp_path):
    run_here(tmp_path, "trainer.pictures=true")
    names = ["episode.png", "inner_curve.png", "learning_curve.png"]
    drawn = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in drawn] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in drawn)


def test_non_finite_figures_are_null_in_json(tmp_path):
    lines = tracking.JsonLines(tmp_path / "m.jsonl", 0)
    lines.write({"step": 1, "a": math.nan, "b": math.inf, "c": [1.0, -math.inf]})
    assert tracking.read(tmp_path / "m.jsonl") == [{"step": 1, "a": None, "b": None, "c": [1.0, None]}]
