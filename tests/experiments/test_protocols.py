"""The official one-shot test, copies at test time, other sizes of tasks for a checkpoint: figures and refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from experiments import build, checkpoint, resume, store
from experiments.config import DigitsConfig, EvaluateConfig, ProtocolKind
from experiments.errors import UserError
from experiments.evaluate import evaluate_checkpoint, task_of
from experiments.evaluation import Copies, Evaluation, curves, mean_predictions
from experiments.protocols import FixedTasks, OneShot, one_shot, wilson
from theria.data import Augment, Episode, EpisodeSampler, load_omniglot

EXACT = 1e-12  # float64, a few operations
ROUNDED_QUANTILE = 1e-5  # the intervals here take 1.96 for 1.95996
# A run on the smallest training set, of small images: prototypes of a tiny transformer.
SMALL = (
    "task=omniglot",
    "task.split=small1",
    "task.size=14",
    "task.queries=1",
    "model=transformer_patch",
    "model.d_model=8",
    "model.n_heads=2",
    "model.n_layers=1",
    "learner=protonet",
    "inner=sgd",
    "inner.lr=0.1",  # its default: it is not for this learner
    "task.augment.rotation=0.2",
    "task.augment.elastic=0.05",
    "trainer.steps=2",
    "trainer.val_every=0",
    "trainer.health_every=0",
)


class Scripted(nn.Module):
    """Answers every query with its label, read from the last pixel, but for a scripted number of each task's first
    queries. The task's number is in the first pixel."""

    def __init__(self, wrong: list[int]) -> None:
        super().__init__()
        self.model, self.wrong = None, wrong

    def predict(self, episode: Episode) -> torch.Tensor:
        task, label = episode.query_x[:, 0, 0].long(), episode.query_x[..., -1].long()
        first = torch.arange(label.shape[1]) < torch.tensor(self.wrong)[task][:, None]
        return nn.functional.one_hot((label + first) % 20, 20).float()


def scripted_runs() -> FixedTasks:
    labels = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(t)) for t in range(20)])
    number = torch.arange(20)[:, None].expand(20, 20)
    x = torch.stack([number, labels], -1).float()
    return FixedTasks(Episode(x, torch.arange(20).repeat(20, 1), x, labels))


def quiet() -> None:
    pass


# -------------------------------------------------------------------------------------------------------------- wilson
@pytest.mark.parametrize(("k", "n"), [(0, 400), (5, 400), (200, 400), (399, 400), (400, 400), (1, 1)])
def test_the_interval_is_wilsons(k, n):
    low, high = wilson(k, n)
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=ROUNDED_QUANTILE)
    for bound in {low, high} - {0.0, 1.0}:  # where the score test of p = bound is just passed
        assert abs(k / n - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), abs=EXACT)


def test_no_errors_have_an_upper_bound_all_the_same():
    assert wilson(0, 400) == (0.0, pytest.approx(1.96**2 / (400 + 1.96**2), abs=EXACT))


# ------------------------------------------------------------------------------------------------------------ one_shot
def test_errors_are_counted_run_by_run():
    wrong = [0, 3, 0, 20, 1] + [0] * 14 + [2]
    result = one_shot(Scripted(wrong), scripted_runs(), steps=0, alive=quiet)  # pyright: ignore
    assert result.wrong == tuple(wrong)
    assert (result.trials, result.figure) == (400, 26 / 400)
    record = result.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["run_errors"] == [n / 20 for n in wrong]
    assert (record["error_low"], record["error_high"]) == wilson(26, 400)
    assert result.text().startswith("one-shot error 6.50 % (95 % interval 4.47 to 9.35, 26 of 400 in 20 runs)")


def test_the_runs_are_those_of_the_official_test(compose_config, omniglot_root):
    from theria.data import omniglot_one_shot_runs

    config = compose_config(*SMALL, f"task.root={omniglot_root}", "trainer.protocols=[one_shot]")
    runs = build.build_sources(config)["one_shot"]
    assert isinstance(runs, FixedTasks)
    for ours, official in zip(runs.episode, omniglot_one_shot_runs(omniglot_root, size=14), strict=True):
        assert torch.equal(ours, official)


# -------------------------------------------------------------------------------------------------------------- copies
def episode(seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    support, query = (torch.rand(2, n, 1, 12, 12, generator=generator) for n in (5, 10))
    return Episode(support, torch.arange(5).repeat(2, 1), query, torch.arange(5).repeat(2, 2))


def same(a: Episode, b: Episode) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_copies_are_the_task_and_deformations_of_it():
    copies = Copies(Augment(shift=0.2), 3, seed=1)
    task = episode()
    first, *others = copies.of(task, 4)
    assert first is task
    assert len(others) == 2
    for other in others:
        assert torch.equal(other.query_y, task.query_y)
        assert not torch.equal(other.support_x, task.support_x)
        assert not torch.equal(other.query_x, task.query_x)
    assert not torch.equal(others[0].query_x, others[1].query_x)
    assert all(same(a, b) for a, b in zip(copies.of(task, 4), [first, *others], strict=True))  # pure in the batch
    seen = [copies.of(task, batch)[i].query_x for batch in range(3) for i in (1, 2)]
    assert len({float(x.sum()) for x in seen}) == 6  # and no draws are used twice


class Linear(nn.Module):
    """Logits that are linear in the image: what averaging does to them is known."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None
        self.weight = torch.randn(144, 5, generator=torch.Generator().manual_seed(9))

    def predict(self, task: Episode) -> torch.Tensor:
        return task.query_x.flatten(2) @ self.weight


def test_the_mean_is_of_log_probabilities_and_answers_as_the_mean_of_logits():
    learner, tasks = Linear(), Copies(Augment(shift=0.2), 5, seed=1).of(episode(), 0)
    logits = torch.stack([learner.predict(task) for task in tasks])
    (mean,) = mean_predictions(learner, tasks, 0)  # pyright: ignore[reportArgumentType]
    product = logits.softmax(-1).prod(0) ** (1 / 5)  # the geometric mean of the probabilities
    assert torch.allclose(mean.exp(), product, rtol=1e-4)
    assert torch.equal(mean.argmax(-1), logits.mean(0).argmax(-1))
    assert torch.equal(mean_predictions(learner, tasks[:1], 0), logits[:1])  # pyright: ignore[reportArgumentType]


def test_an_evaluation_averages_over_its_copies():
    learner, tasks = Linear(), episode()
    copies = Copies(Augment(shift=0.2), 4, seed=2)
    figures, metric = curves(learner, FixedTasks(tasks), episodes=4, steps=0, alive=quiet, copies=copies)  # pyright: ignore
    expected = []
    for batch in range(2):
        logits = torch.stack([learner.predict(copy) for copy in copies.of(tasks, batch)]).mean(0)
        expected.append((logits.argmax(-1) == tasks.query_y).double().mean(1))
    assert metric == "accuracy"
    assert torch.equal(figures[0], torch.cat(expected))


# ------------------------------------------------------------------------------------------------------------- sources
def test_only_training_images_are_deformed(compose_config):
    config = compose_config("task=digits", "task.augment.shear=0.2")
    sources = build.build_sources(config)
    augments = {name: source.augment for name, source in sources.items() if isinstance(source, EpisodeSampler)}
    assert augments == {"train": Augment(shear=0.2), "val": None, "test": None}


def test_held_out_figures_are_of_images_as_they_are(compose_config):
    """Also those of the training classes, when a checkpoint is evaluated on them."""
    run = compose_config("task=digits", "task.augment.shear=0.2")
    task = task_of(EvaluateConfig(subset="train", shots=3), run)
    assert isinstance(task, DigitsConfig)
    assert (task.ways, task.shots) == (run.task.ways, 3)
    assert build.build_augment(task).is_identity
    assert not build.build_augment(run.task).is_identity  # which the copies of test_augment are made with


def test_a_run_may_go_on_with_other_evaluations_but_not_with_other_tasks(compose_config):
    def check(*overrides: str) -> None:
        base = ["task=omniglot", "task.split=background", "learner=protonet", "inner=sgd"]
        resume.check_same(compose_config(*base, *overrides), store.container(compose_config(*base)), Path("there"))

    check("trainer.protocols=[one_shot]", "trainer.test_augment=16")
    for override, named in (
        ("task.augment.elastic=0.1", r"task\.augment\.elastic: 0\.0 in the checkpoint, 0\.1 now"),
        ("task.size=56", r"task\.size: 28"),
        ("task.train_on=trainval", r"task\.train_on: train in"),
    ):
        with pytest.raises(UserError, match=named):
            check(override)


def test_size_and_training_classes_reach_the_data_and_the_network(compose_config, omniglot_root):
    settings = [*SMALL, f"task.root={omniglot_root}"]
    for overrides, classes in (
        (["task.train_on=train"], 110),
        (["task.train_on=trainval"], 136),
        (["task.train_on=trainval", "task.symmetries=true"], 8 * 136),
    ):
        config = compose_config(*settings, *overrides)
        build.check(config)
        source = build.build_source(config, "train", tasks=2)
        assert isinstance(source, EpisodeSampler)
        assert len(source.dataset) == classes
        assert source.sample(0).support_x.shape == (2, 5, 1, 14, 14)
        assert len(build.build_source(config, "test", tasks=2).dataset) == 659  # pyright: ignore
    build.build_learner(config).predict(source.sample(0))  # 4 patches, not 16


def test_distinct_characters_are_no_turns_of_one_another(compose_config, omniglot_root):
    """By the names of the classes whose images the tasks hold."""
    config = compose_config(*SMALL, f"task.root={omniglot_root}", "task.split=vinyals", "task.ways=20")
    dataset = load_omniglot(omniglot_root, "vinyals", "test", size=14)
    drawings = zip(dataset.names, dataset.images.flatten(2).tolist(), strict=True)
    character_of = {tuple(drawing): name.split("@")[0] for name, samples in drawings for drawing in samples}

    def repeats(**options: bool) -> int:
        tasks = build.build_source(config, "test", tasks=50, **options).sample(0).support_x.flatten(2)
        characters = [[character_of[tuple(x)] for x in task] for task in tasks.mul(255).round().int().tolist()]
        return sum(len(set(task)) < 20 for task in characters)

    assert repeats(distinct_characters=True) == 0
    assert repeats() > 5  # of 50 tasks, a third is expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.protocols=[oneshot]"], "trainer.protocols=.oneshot.: .*did you mean one_shot"),
        (["trainer.protocols=[one_shot]"], "task=glyphs: the one_shot protocol is of task=omniglot"),
        (["task=omniglot", "trainer.protocols=[one_shot]"], "task.split=vinyals: .*alphabets.*=background, small1 or"),
        (["task=omniglot", "task.train_on=all"], "task.train_on=all: known: train, trainval"),
        (["task=omniglot", "task.train_on=trainval"], "validation classes are trained on.* trainer.val_every=0"),
        (["trainer.test_augment=0"], "trainer.test_augment=0: needed is at least 1"),
        (["trainer.test_augment=4"], "test_augment=4: every bound of the run's task.augment is 0"),
        (["task=sinusoid", "model=mlp", "trainer.test_augment=4"], "task=sinusoid has no images to deform"),
    ],
)
def test_what_would_measure_nothing_is_refused_before_any_work(compose_config, overrides, words):
    with pytest.raises(UserError, match=words):
        build.check(compose_config(*overrides))


def test_a_bound_outside_its_range_is_refused(compose_config):
    with pytest.raises(UserError, match=r"task\.augment: .*rotation=-1.* at least 0"):
        build.build_sources(compose_config("task=digits", "task.augment.rotation=-1"))


# ---------------------------------------------------------------------------------------------------------- other ways
@pytest.mark.parametrize("learner", [["learner=protonet"], ["learner=r2d2"]])
def test_an_embedding_does_not_care_for_the_number_of_ways(compose_config, learner):
    config = compose_config("task=digits", "inner=sgd", *learner)
    state = build.build_learner(config).state_dict()
    before = torch.get_rng_state()
    other = build.for_ways(config, state, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    source = build.build_source(compose_config("task=digits", "task.ways=3"), "test", tasks=2)
    assert other.predict(source.sample(0)).shape == (2, 15, 3)


@pytest.mark.parametrize("options", [["learner=maml"], ["model=incontext", "learner=incontext"]])
def test_a_fixed_head_is_refused(compose_config, options):
    config = compose_config("task=digits", "inner=sgd", *options)
    with pytest.raises(UserError, match=r"20 ways for .*task\.ways=5: .*head.* train with task\.ways=20"):
        build.for_ways(config, build.build_learner(config).state_dict(), 20)


def test_a_protocol_that_the_learner_cannot_have_is_refused_before_the_training(compose_config):
    options = ["task=omniglot", "task.split=background", "trainer.protocols=[one_shot]", "learner=maml"]
    with pytest.raises(UserError, match="20 ways"):
        build.build_learner(compose_config(*options))
    build.build_learner(compose_config(*options, "task.ways=20"))


# ------------------------------------------------------------------------------------------------------------ together
def evaluated(run_dir, out, **settings) -> tuple[Evaluation | OneShot, dict]:
    out.mkdir()
    options = EvaluateConfig(**{"checkpoint": str(run_dir), "run_dir": str(out), "device": "cpu", **settings})
    result = evaluate_checkpoint(options, out)
    (written,) = out.iterdir()
    return result, json.loads(written.read_text())


@pytest.mark.parametrize("kind", ["proto_maml", "unicorn_maml"])
def test_it_is_evaluated_at_other_ways_and_shots_each_in_a_file_of_its_own(run_here, tmp_path, kind):
    """Trained at 20 ways and 1 shot; beside it, the learner with its parameters built for those tasks."""
    run = tmp_path / "run"
    options = ["task=glyphs", "task.ways=20", "task.shots=1", "task.queries=2", "task.tasks=2", "trainer.val_every=0"]
    options += ["model=transformer_patch", "model.d_model=8", "model.n_heads=2", "model.n_layers=1", "inner.steps=2"]
    options += [f"learner={kind}", "learner.adapt=[transformer,head]", "inner.lr=0.1", "inner.learn_lr=true"]
    run_here(run, *options, "trainer.lr=0.1")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    saved = checkpoint.find(run)[1]
    asked = [{}, {"ways": 5}, {"shots": 5}, {"ways": 5, "shots": 5}, {"ways": 5, "shots": 5, "seed": 3}]
    means = set()
    for sizes in asked:
        options = EvaluateConfig(checkpoint=str(run), run_dir=str(run), device="cpu", episodes=6, tasks=3, **sizes)
        result = evaluate_checkpoint(options, run)
        config = store.from_container(saved["config"])
        config.task = replace(config.task, **{key: value for key, value in sizes.items() if key != "seed"})
        learner = build.build_learner(config)
        learner.load_state_dict(saved["learner"])
        source = build.build_source(config, "test", tasks=3, seed=sizes.get("seed"))
        figures, _ = curves(learner.eval(), source, episodes=6, steps=2, alive=quiet)
        assert isinstance(result, Evaluation)
        assert [point.mean for point in result.curve] == figures.mean(1).tolist()
        means.add(result.after.mean)
    assert len(means) == len(asked)
    assert all(path.read_bytes() == content for path, content in before.items())
    written = {path.name: json.loads(path.read_text()) for path in run.glob("evaluation*.json")}
    names = ["test_20w1s", "test_5w1s", "test_20w5s", "test_5w5s", "test_5w5s_2"]
    assert written.keys() == {f"evaluation_{name}.json" for name in names}
    record = written["evaluation_test_5w5s_2.json"]
    wanted = {"protocol": "episodes", "ways": 5, "shots": 5, "seed": 3, "step": 6, "episodes": 6, "metric": "accuracy"}
    assert wanted.items() <= record.items()
    results = json.loads((run / "results.json").read_text())
    assert record.keys() >= results.keys() - {"command"}  # mean, ci95, machine, seconds, peak memory and the rest
    assert record["inner_steps"] == 2
    assert record["seconds"] >= 0
    assert record["peak_memory_mb"] > 0
    assert written["evaluation_test_20w1s.json"]["seed"] == 0


def test_an_evaluation_on_distinct_characters_has_a_file_of_its_own(run_here, tmp_path, omniglot_root):
    run = tmp_path / "run"
    run_here(run, *SMALL, f"task.root={omniglot_root}", "task.split=vinyals")
    saved = checkpoint.find(run)[1]
    learner = build.for_ways(store.from_container(saved["config"]), saved["learner"], 20).eval()
    # Of the run's seed, 0, the stream of the test.
    sizes: dict[str, Any] = {"ways": 20, "shots": 5, "queries": 1, "tasks": 10, "seed": 2}
    dataset, found = load_omniglot(omniglot_root, "vinyals", "test", size=14), []
    for distinct, name in ((False, "test_20w5s"), (True, "test_20w5s_distinct"), (True, "test_20w5s_distinct_2")):
        options = EvaluateConfig(checkpoint=str(run), device="cpu", episodes=50, tasks=10, ways=20)
        found.append(evaluate_checkpoint(replace(options, distinct_characters=distinct), run))
        record = json.loads((run / f"evaluation_{name}.json").read_text())
        assert record["distinct_characters"] is distinct
        source = EpisodeSampler(dataset, distinct_origins=distinct, **sizes)
        figures, _ = curves(learner, source, episodes=50, steps=0, alive=quiet)
        assert record["mean"] == figures[-1].mean()
    assert found[0] != found[1] == found[2]


def test_distinct_characters_change_nothing_without_turns(run_here, tmp_path, omniglot_root):
    run_here(tmp_path / "run", *SMALL, f"task.root={omniglot_root}")
    sizes = {"episodes": 20, "tasks": 10}
    (plain, _), (distinct, record) = (
        evaluated(tmp_path / "run", tmp_path / name, distinct_characters=name == "distinct", **sizes)
        for name in ("plain", "distinct")
    )
    assert plain == distinct
    assert record["distinct_characters"] is True


def test_distinct_characters_are_of_omniglot(run_here, compose_config, tmp_path):
    run_here(tmp_path / "sinusoid")
    with pytest.raises(UserError, match=r"^distinct_characters=true: task=sinusoid is not task=omniglot: needed"):
        evaluated(tmp_path / "sinusoid", tmp_path / "a", distinct_characters=True)
    with pytest.raises(UserError, match="distinct_characters=true: task=digits is not"):
        build.build_source(compose_config("task=digits"), "test", tasks=2, distinct_characters=True)


def test_distinct_characters_within_groups_are_refused(run_here, compose_config, tmp_path, omniglot_root):
    run_here(tmp_path / "run", *SMALL, f"task.root={omniglot_root}", "task.eval_within_groups=0.5")
    with pytest.raises(UserError, match=r"^task=omniglot: EpisodeSampler: distinct_origins=True and within_groups="):
        evaluated(tmp_path / "run", tmp_path / "a", distinct_characters=True)
    assert not list((tmp_path / "a").iterdir())
    trained_so = [*SMALL, f"task.root={omniglot_root}", "task.within_groups=0.5", "task.eval_within_groups=0.0"]
    build.build_source(compose_config(*trained_so), "test", tasks=2, distinct_characters=True)


def test_a_run_records_the_official_test_and_its_checkpoint_gives_the_same(run_here, tmp_path, omniglot_root):
    options = [*SMALL, f"task.root={omniglot_root}", "trainer.protocols=[one_shot]", "trainer.test_augment=3"]
    run_here(tmp_path / "run", *options)
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["test_augment"] == record["one_shot"]["test_augment"] == 3
    assert len(record["one_shot"]["run_errors"]) == 20
    assert 0.2 < record["one_shot"]["error"] <= 1.0  # two steps are not enough to learn it: chance is 0.95
    result, again = evaluated(tmp_path / "run", tmp_path / "a", protocol=ProtocolKind.one_shot, test_augment=3, tasks=7)
    assert isinstance(result, OneShot)
    assert {key: again[key] for key in record["one_shot"]} == record["one_shot"]
    same_batches = {"episodes": 8, "tasks": 4}
    result, again = evaluated(tmp_path / "run", tmp_path / "b", test_augment=3, **same_batches)
    assert again["mean"] == record["mean"]
    result, plain = evaluated(tmp_path / "run", tmp_path / "c", **same_batches, ways=20, shots=2)
    assert isinstance(result, Evaluation)
    assert plain["test_augment"] == 1
    assert plain["mean"] < again["mean"]  # 20 ways are harder than 5


def test_an_evaluation_that_would_mislead_is_refused(run_here, tmp_path, omniglot_root):
    root = f"task.root={omniglot_root}"
    run_here(tmp_path / "final", *SMALL, root, "task.train_on=trainval")
    with pytest.raises(UserError, match=r"subset=val: the run was trained on it too .*needed is test"):
        evaluated(tmp_path / "final", tmp_path / "a", subset="val")
    run_here(tmp_path / "seen", *SMALL, root, "task.split=vinyals")
    with pytest.raises(UserError, match=r"task\.split=vinyals: .*never trained on"):
        evaluated(tmp_path / "seen", tmp_path / "b", protocol=ProtocolKind.one_shot)
    with pytest.raises(UserError, match=r"ways=5, shots=1: protocol=one_shot has the tasks of the official test"):
        evaluated(tmp_path / "seen", tmp_path / "e", protocol=ProtocolKind.one_shot, ways=5, shots=1)
    with pytest.raises(UserError, match="inner_steps=3: learner=protonet takes no inner steps"):
        evaluated(tmp_path / "seen", tmp_path / "f", inner_steps=3)
    run_here(tmp_path / "sinusoid")
    with pytest.raises(UserError, match="ways=3: task=sinusoid has no classes"):
        evaluated(tmp_path / "sinusoid", tmp_path / "c", ways=3)
    with pytest.raises(UserError, match="test_augment=0: needed is at least 1"):
        evaluated(tmp_path / "sinusoid", tmp_path / "d", test_augment=0)
