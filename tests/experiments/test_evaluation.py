"""The figures: their interval against a closed form, and what they are taken over."""

import math

import pytest
import torch

from experiments import build
from experiments.config import Schedule, TrainerConfig
from experiments.evaluation import Copies, estimate, mean_predictions, predict, task_curve, task_metric
from experiments.trainer import learning_rate
from theria.data import Augment, Episode

EXACT = 1e-12  # float64 sums of a few terms


def test_interval_of_a_closed_form():
    # 0, 1, ..., 9: mean 4.5, sample variance n(n + 1)/12 = 55/6.
    figure = estimate(torch.arange(10))
    assert figure.mean == pytest.approx(4.5, abs=EXACT)
    assert figure.half_width == pytest.approx(1.96 * math.sqrt(55 / 6) / math.sqrt(10), abs=EXACT)
    assert figure.n == 10


def test_interval_of_coin_flips():
    # k ones of n: sample variance n/(n - 1) p (1 - p).
    n, k = 600, 450
    figure = estimate((torch.arange(n) < k).double())
    p = k / n
    assert figure.half_width == pytest.approx(1.96 * math.sqrt(p * (1 - p) / (n - 1)), abs=EXACT)


def test_interval_covers_the_truth_19_times_in_20():
    generator = torch.Generator().manual_seed(0)
    figures = [estimate(torch.rand(100, generator=generator, dtype=torch.float64)) for _ in range(1000)]
    covered = sum(abs(figure.mean - 0.5) <= figure.half_width for figure in figures)
    assert 930 <= covered <= 970  # binomial(1000, 0.95): standard deviation 6.9, a bound at 2.9 of them


def test_one_episode_has_no_interval():
    assert estimate(torch.ones(1)).half_width == math.inf


def test_text_of_an_estimate():
    figure = estimate(torch.tensor([0.0, 1.0] * 300))
    assert figure.text(percent=True) == "50.00 % ± 4.00"
    assert figure.text(percent=False) == "0.5 ± 0.04"


def test_metric_of_a_task_is_its_share_of_right_answers():
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 1, 2, 2], [1, 1, 1, 1]]), 3).float()
    target = torch.tensor([[0, 1, 2, 0], [0, 0, 0, 1]])
    assert task_metric(logits, target).tolist() == [0.75, 0.25]


def test_metric_of_a_regression_is_its_mean_squared_error():
    prediction, target = torch.tensor([[[1.0], [2.0]], [[0.0], [0.0]]]), torch.tensor([[[0.0], [0.0]], [[3.0], [0.0]]])
    assert task_metric(prediction, target).tolist() == [2.5, 4.5]


def test_result_is_over_the_episodes_asked_for(run_here, tmp_path):
    result = run_here(tmp_path, "trainer.test_episodes=10", "trainer.eval_tasks=4", "inner.eval_steps=3")
    assert result.after.n == 10  # not 12, the next multiple of the batch
    assert len(result.curve) == 4  # before adaptation, and after each of three steps
    assert result.before == result.curve[0]
    assert result.after == result.curve[-1]


PARTS = "learner.adapt=[transformer,head]"  # and not the stem
LEARNERS = {
    "maml": ["learner=maml"],
    "a fixed stem": ["learner=maml", PARTS],
    "mixed mode": ["learner=maml", "adjoint=mixed_mode", "inner.momentum=0.9"],
    "anil": ["learner=maml", "learner.adapt=[head]"],
    "metasgd": ["learner=metasgd"],
    "maml++": ["learner=maml_plus_plus"],
    "imaml": ["learner=imaml", "adjoint=implicit"],
    "reptile": ["learner=reptile"],
    "cavia": ["learner=cavia"],
    "proto_maml": ["learner=proto_maml", PARTS],
    "unicorn_maml": ["learner=unicorn_maml", PARTS],
    "protonet": ["learner=protonet"],
}


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("options", LEARNERS.values(), ids=list(LEARNERS))
def test_the_curve_is_of_an_adaptation_for_each_number_of_steps(compose_config, options, copies):
    config = compose_config("task=digits", "model.n_layers=1", "inner=sgd", "inner.lr=0.3", "inner.steps=3", *options)
    learner = build.build_learner(config).eval()
    task = build.build_source(config, "test", tasks=2).sample(0)
    tasks = Copies(Augment(shift=0.2), copies, seed=1).of(task, 0)
    points = range(4) if "protonet" not in options[0] else [0]
    with torch.no_grad():
        each = [torch.stack([predict(learner, one, t) for t in points]) for one in tasks]
        mean = each[0] if copies == 1 else sum(x.log_softmax(-1) for x in each) / copies
        assert torch.equal(mean_predictions(learner, tasks, 3), mean)
        wanted = torch.stack([task_metric(point, task.query_y) for point in mean])
        assert torch.equal(task_curve(learner, tasks, 3), wanted)
    assert points == [0] or not torch.allclose(mean[0], mean[-1])


def test_copies_go_through_the_symmetries_of_the_square():
    support, query = torch.rand(2, 3, 1, 4, 4), torch.rand(2, 5, 1, 4, 4)
    labels = torch.zeros(2, 3), torch.zeros(2, 5)
    episode = Episode(support, labels[0], query, labels[1])
    copies = Copies(Augment(), 9, seed=1, symmetries=True).of(episode, 0)
    for name, x in (("support_x", support), ("query_x", query)):
        seen = [getattr(copy, name) for copy in copies]
        assert torch.equal(seen[1], x.transpose(-2, -1).flip(-2))  # a quarter counter-clockwise
        assert torch.equal(seen[2], x.flip(-2, -1))
        assert torch.equal(seen[4], x.flip(-1))
        assert torch.equal(seen[7], x.transpose(-2, -1))
        assert torch.equal(seen[8], x)
        assert len({tuple(image.flatten().tolist()) for image in seen}) == 8
        as_they_are = Copies(Augment(), 9, seed=1).of(episode, 0)
        assert all(torch.equal(getattr(copy, name), x) for copy in as_they_are)


@pytest.mark.parametrize("trained", [False, True])
def test_they_do_where_the_classes_of_training_did(compose_config, trained):
    config = compose_config("experiment=omniglot_small1_prototransformer", f"task.symmetries={str(trained).lower()}")
    copies = build.build_copies(config, 2)
    assert copies is not None
    assert copies.symmetries is trained


def test_the_batch_changes_no_figure(run_here, tmp_path):
    """Each batch draws other tasks, but a batch of all tasks gives one mean: that of its tasks."""
    one = run_here(tmp_path / "a", "trainer.eval_tasks=8")
    again = run_here(tmp_path / "b", "trainer.eval_tasks=8")
    assert one == again


def test_outer_rate():
    warm = TrainerConfig(steps=110, warmup=10, lr=2.0, schedule=Schedule.cosine)
    assert [learning_rate(warm, step) for step in (0, 4, 9)] == [0.2, 1.0, 2.0]
    assert learning_rate(warm, 10) == pytest.approx(2.0)
    assert learning_rate(warm, 60) == pytest.approx(1.0)  # half of the cosine
    assert learning_rate(warm, 110) == pytest.approx(0.0, abs=EXACT)
    assert learning_rate(TrainerConfig(steps=10, lr=2.0, schedule=Schedule.constant), 9) == 2.0
