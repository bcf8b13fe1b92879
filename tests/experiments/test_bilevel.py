"""`python -m experiments.bilevel`: both experiments run and find what they should, and mistakes are named."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments import bilevel, bilevel_cleaning, bilevel_config, store
from experiments.bilevel_config import HyperCleaningConfig
from experiments.errors import NonFiniteError, UserError, explain

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ("hyper_cleaning", "ridge_hyperparameter")
FEW = ("outer.steps=2", "method.inner_steps=3", "log_every=1")


@pytest.fixture
def composed():
    """Overrides -> the configuration as its dataclasses."""
    bilevel_config.register()
    with initialize_config_dir(store.CONFIG_DIR, version_base="1.3"):
        yield lambda *overrides: store.to_object(compose("bilevel", [*overrides, "run_dir=unused"]))
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("kind", ["aid", "itd"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(composed, name, kind, tmp_path, capsys):
    config = composed(f"experiment={name}", f"method.kind={kind}", *FEW)
    assert config.name == name == config.problem.name
    results = bilevel.run(config, tmp_path / "run", [f"experiment={name}", "run_dir=elsewhere"])
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert results["command"] == f"python -m experiments.bilevel experiment={name}"
    assert {"torch", "python", "cpu", "scikit-learn"} <= results["machine"].keys()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == sum(results["evaluations"].values())
    assert (tmp_path / "run" / "config.yaml").exists()
    assert "everything is in" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_begins_with_its_command_and_its_result_is_committed(name):
    directive, command = (ROOT / "configs" / "experiment" / f"{name}.yaml").read_text().splitlines()[:2]
    assert directive == "# @package _global_"
    assert command == f"# python -m experiments.bilevel experiment={name}"
    results = json.loads((ROOT / "docs" / "benchmarks" / name / "results.json").read_text())
    assert results["command"] == command.removeprefix("# ")


def test_the_hypergradient_finds_the_penalty_of_the_grid_search(composed, tmp_path):
    """To within the grid, with a smaller validation error than its best point, in far fewer evaluations."""
    config = composed("experiment=ridge_hyperparameter", "outer.steps=8", "method.inner_steps=200")
    results = bilevel.run(config, tmp_path, [])
    penalty = results["log_penalty"]
    assert abs(penalty["learned"] - penalty["grid"]) <= penalty["step"]
    assert results["validation_error"]["single"] <= results["validation_error"]["grid"]
    assert results["hypergradient_left"]["single"] < 1e-6
    assert results["evaluations"]["single"] <= 8
    assert results["validation_error"]["per_feature"] < results["validation_error"]["single"]


def test_both_methods_find_the_same_penalty(composed, tmp_path):
    """Through 200 inner steps from zero, and by implicit differentiation with warm starts."""
    learned = [
        bilevel.run(
            composed(
                "experiment=ridge_hyperparameter", "outer.steps=8", f"method.kind={kind}", "method.inner_steps=200"
            ),
            tmp_path / kind,
            [],
        )["log_penalty"]["learned"]
        for kind in ("aid", "itd")
    ]
    assert learned[0] == pytest.approx(learned[1], abs=1e-4)  # what 200 steps from zero leave of the inner problem


def test_weights_separate_wrong_labels_and_cleaning_helps(composed, tmp_path):
    config = composed("experiment=hyper_cleaning", "problem.train=300", "problem.validation=60", "outer.steps=20")
    results = bilevel.run(config, tmp_path, [])
    assert results["auc_of_the_weights"] > 0.8
    assert results["mean_weight"]["right"] > 2 * results["mean_weight"]["wrong"]
    accuracy = results["test_accuracy"]
    assert accuracy["cleaned"] > accuracy["all_training_labels"] + 0.03
    assert accuracy["oracle_without_the_wrong_labels"] > accuracy["cleaned"]
    assert 100 < results["wrong_labels"] < 200


def test_labels_are_wrong_as_often_as_asked_and_never_by_chance_right():
    config = HyperCleaningConfig(train=1000, validation=50, corrupted=0.3)
    stage = bilevel.build(config, 3).stages["weights"]
    right = bilevel.build(HyperCleaningConfig(train=1000, validation=50, corrupted=0.0), 3).stages["weights"]
    W, x = torch.randn(65, 10, dtype=torch.float64), stage.outer0
    # The inner losses' gradients in the weights say which samples' labels differ.
    differ = torch.func.grad(stage.problem.g, 1)(W, x) != torch.func.grad(right.problem.g, 1)(W, x)
    figure = stage.figures((~differ).double(), W)
    assert figure["auc"] == 1.0
    assert 0.25 < differ.double().mean() < 0.35


def test_auc_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    score, positive = torch.randint(5, (200,)).double(), torch.rand(200) < 0.4
    assert bilevel_cleaning.auc(score, positive) == pytest.approx(metrics.roc_auc_score(positive, score), abs=1e-12)
    assert bilevel_cleaning.auc(score, torch.ones(200).bool()) == 0.5


def test_softmax_regression_is_that_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    X, y = torch.randn(120, 5, dtype=torch.float64), torch.arange(120) % 10
    share, penalty = torch.rand(120, dtype=torch.float64), 0.01
    W = bilevel_cleaning.Softmax(X, y).fit(share, penalty)
    peer = linear.LogisticRegression(
        C=1 / (2 * penalty * 120), fit_intercept=False, tol=1e-10, solver="newton-cholesky"
    )
    peer.fit(X.numpy(), y.numpy(), sample_weight=share.numpy())
    torch.testing.assert_close(W.T, torch.from_numpy(peer.coef_), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("outer.steps=0", "outer.steps=0: needed is at least 1"),
        ("outer.lr=0", "positive"),
        ("method.rtol=-1", "positive"),
        ("method.momentum=1", r"\[0, 1\)"),
        ("method.kind=unrolled", "aid, itd"),
        ("problem.train=1797", "left to test on"),
        ("problem.corrupted=1", "share"),
        ("problem.penalty=0", "positive"),
        ("problem.trian=5", "did you mean problem.train"),
        ("outer.stepz=5", "did you mean outer.steps"),
    ],
)
def test_a_mistake_is_named(composed, override, words, tmp_path):
    with pytest.raises(UserError, match=words):  # noqa: PT012
        try:
            config = composed("experiment=hyper_cleaning", override)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from error
        bilevel.run(config, tmp_path, [])


def test_a_diverging_inner_loop_ends_with_advice(composed, tmp_path):
    overrides = ("method.inner_rate=1e6", "method.inner_steps=200", "method.kind=itd", "problem.penalty=10")
    with pytest.raises(NonFiniteError, match=r"method\.inner_rate"):
        bilevel.run(composed("experiment=hyper_cleaning", *overrides), tmp_path, [])


def test_the_command(process, tmp_path):
    done = process("experiments.bilevel", "experiment=ridge_hyperparameter", *FEW, "run_dir=mine")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "results.json").exists()
    missing = process("experiments.bilevel")
    assert missing.returncode == 2
    assert "experiment=hyper_cleaning" in missing.stderr
