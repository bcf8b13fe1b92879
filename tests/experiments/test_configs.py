"""Every configuration in the repository composes, builds and runs; every wrong one is refused with the right name."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments import build, checkpoint, learners, store
from experiments.config import Config
from experiments.config_learner import AdjointKind
from experiments.errors import UserError, explain
from theria.ops import UnsupportedError

CONFIGS = Path(store.CONFIG_DIR)
EVERY_EXPERIMENT = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


def lines_of(name: str) -> list[str]:
    return (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()


# Those of experiments.train; the others have a module and tests of their own.
EXPERIMENTS = [name for name in EVERY_EXPERIMENT if lines_of(name)[1].startswith("# python -m experiments.train ")]
GROUPS = sorted(folder.name for folder in CONFIGS.iterdir() if folder.is_dir() and folder.name != "experiment")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
# What an option of a group needs beside it to make a run that fits together.
WITH = {
    ("model", "mlp"): ["task=sinusoid", "learner=maml"],
    ("model", "convnet"): ["learner=maml"],
    ("model", "residual"): ["learner=maml"],
    ("model", "prototype_transformer"): ["learner=incontext"],
    ("model", "incontext"): ["learner=incontext"],
    ("learner", "incontext"): ["model=incontext"],
    ("learner", "imaml"): ["adjoint=implicit"],
    ("adjoint", "implicit"): ["inner=sgd"],  # no derivative for learned rates
    ("adjoint", "identity"): ["inner=sgd"],
    ("task", "sinusoid"): ["model=mlp", "learner=maml"],
    ("task", "linear_regression"): ["model=mlp", "learner=maml"],
}
WITHOUT_STEPS = ("protonet", "r2d2", "incontext")


def few_steps(*overrides: str) -> list[str]:
    return [
        *overrides,
        "task.tasks=2",
        "task.queries=2",
        "trainer.steps=2",
        "trainer.val_every=0",
        "trainer.log_every=1",
        "trainer.test_episodes=2",
        "trainer.eval_tasks=2",
        "trainer.pictures=false",
        "trainer.display=off",
        "tracking=off",
    ]


def shrink(config: Config) -> None:
    """Make an experiment on images one that a test can wait for: few classes, small images, a narrow network."""
    config.task.ways = min(config.task.ways, 5)  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(config.task, "size"):
        config.task.size = 28  # pyright: ignore[reportAttributeAccessIssue]
    for name, value in {"width": 4, "d_model": 8, "n_heads": 2, "n_layers": 1}.items():
        if hasattr(config.model, name):
            setattr(config.model, name, value)


def refused(compose_config, *overrides: str) -> str:
    """The message that the user reads."""
    try:
        build.check(compose_config(*overrides))
    except UserError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return explain(error)
    pytest.fail(f"{overrides} was accepted")


def needs_data(config: Config) -> bool:
    return config.task.name == "omniglot"


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_builds(compose_config, group, option):
    config = compose_config(f"{group}={option}", *WITH.get((group, option), []))
    build.check(config)
    learner = build.build_learner(config)
    assert sum(p.numel() for p in learner.parameters()) > 0
    if not needs_data(config):
        assert build.build_sources(config).keys() == {"train", "val", "test"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(compose_config, name, tmp_path, request):
    from experiments.train import train

    config = compose_config(*few_steps(f"experiment={name}"))
    assert config.name == name
    build.check(config)
    build.build_learner(config)
    if needs_data(config):
        config.task.root = str(request.getfixturevalue("omniglot_root"))
        shrink(config)
    result = train(config, tmp_path / "run", [])
    assert result.after.n == 2
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "learner"])
def test_every_learner_trains(compose_config, option, tmp_path):
    from experiments.train import train

    small = ["model.d_model=8", "model.n_heads=2", "model.n_layers=1"]
    with_it = [
        "task=digits",
        "trainer.health_every=1",
        *(() if option in WITHOUT_STEPS else ("inner=sgd", "inner.steps=2")),
        *WITH.get(("learner", option), []),
    ]
    config = compose_config(*few_steps(f"learner={option}", *with_it, *small))
    before = build.build_learner(config).state_dict()
    assert train(config, tmp_path / "run", []).after.n == 2
    state = checkpoint.load(checkpoint.saved(tmp_path / "run")[-1])["learner"]
    assert state.keys() == before.keys()
    moved = [name for name, value in before.items() if isinstance(value, torch.Tensor) and not value.equal(state[name])]
    assert moved


def test_what_anneals_follows_the_outer_steps(compose_config):
    config = compose_config("learner=maml_plus_plus", "inner=sgd", "learner.epoch_steps=10")
    learner = build.build_learner(config)
    last = config.learner.first_order_epochs  # of the two periods the longer one
    for step, epoch in ((0, 0), (9, 0), (10, 1), (49, 4), (10 * last, last), (10**6, last)):
        learners.set_epoch(learner, config.learner, step)
        assert learner.epoch == epoch


@pytest.mark.parametrize("name", EVERY_EXPERIMENT)
def test_an_experiment_begins_with_its_command(name):
    directive, command = lines_of(name)[:2]
    assert directive == "# @package _global_"
    module, option = command.removeprefix("# python -m ").split()[:2]
    assert option == f"experiment={name}"
    assert importlib.util.find_spec(module)


def test_hydra_reads_the_package_before_every_other_comment_only(tmp_path):
    """Why the command is on the second line: on the first it makes of the experiment a group of its own."""
    configs, name = tmp_path / "configs", "omniglot_20w1s_anil"
    shutil.copytree(CONFIGS, configs)
    path = configs / "experiment" / f"{name}.yaml"
    store.register()
    with initialize_config_dir(str(configs), version_base="1.3"):
        assert compose("train", [f"experiment={name}"]).task.ways == 20
        directive, command, *rest = path.read_text().splitlines()
        path.write_text("\n".join([command, directive, *rest]) + "\n")
        with pytest.raises(HydraException, match=r"'learner@experiment\.learner'"):
            compose("train", [f"experiment={name}"])
    GlobalHydra.instance().clear()


def test_the_committed_result_of_imaml_is_that_of_its_command():
    record = json.loads((CONFIGS.parent / "docs" / "benchmarks" / "imaml_omniglot" / "results.json").read_text())
    assert record["command"].startswith(lines_of("imaml_omniglot")[1].removeprefix("# "))
    assert record["episodes"] >= 600
    assert record["mean"] - record["ci95"] > 0.8 > 0.25 > record["before"]
    assert {"torch", "python", "cpu", "theria"} <= record["machine"].keys()


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("trainer.stpes=10", "did you mean trainer.steps?"),
        ("+trainer.stpes=10", "did you mean trainer.steps?"),
        ("++trainer.stpes=10", "did you mean trainer.steps?"),
        ("task.wayz=3", "did you mean task.ways?"),
        ("tranier.steps=10", "did you mean trainer?"),
        ("sede=1", "did you mean seed?"),
        ("task=glyhps", "did you mean glyphs?"),
        ("experiment=sinusoid", "did you mean sinusoid_maml?"),
        ("modle=mlp", "did you mean model?"),
        ("ops.matmul_precision=higest", "did you mean highest?"),
    ],
)
def test_a_typo_names_the_nearest(compose_config, override, hint):
    message = refused(compose_config, override)
    assert hint in message
    assert override.lstrip("+").split("=")[0].split(".")[0] in message


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("trainer.steps=many", "Integer"),
        ("trainer.steps=1.5", "Integer"),
        ("trainer.steps=null", "not Optional"),
        ("trainer.lr=fast", "Float"),
        ("trainer.pictures=perhaps", "bool"),
        ("ops.backend=flash", "auto, reference, custom, triton"),
        ("trainer.schedule=cosin", "constant, cosine"),
        ("tracking.mode=onlin", "off, offline, online"),
        ("trainer.steps=0", "at least 1"),
        ("trainer.steps=-3", "at least 1"),
        ("trainer.lr=nan", "at least 0"),
        ("trainer.clip=0", "a positive number, or null for no clipping"),
        ("trainer.clip=nan", "a positive number"),
        ("trainer.device=tpu7x", "auto, cpu, cuda"),
        ("trainer.device=meta", "auto, cpu, cuda"),
        ("trainer.device=mps", "auto, cpu, cuda"),
        ("inner.steps=0", "at least 1"),
        ("trainer.lr=inf", "finite"),
        ("inner.lr=nan", "finite"),
        ("inner.head_lr=inf", "finite"),
        ("inner.head_lr=0", "positive"),
        ("inner.head_lr=-1", "positive"),
        ("seed=9223372036854775807", "needed is a number from"),
    ],
)
def test_a_wrong_value_names_what_is_needed(compose_config, override, needed):
    message = refused(compose_config, override)
    assert override.split("=")[0] in message
    assert needed in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels can run")
def test_a_backend_that_cannot_run_here_is_refused_before_there_is_a_directory(compose_config, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match="'triton' cannot compute"):
        build.check(compose_config("ops=triton"))
    build.check(compose_config("ops=triton", "model=convnet", "learner=maml"))  # it has no attention


def test_a_gpu_that_is_not_here_is_refused(compose_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:1"):
        assert build.device(compose_config(f"trainer.device={name}")) == torch.device(name)
    with pytest.raises(UserError, match=r"trainer\.device=cuda:2: needed is a number below 2"):
        build.device(compose_config("trainer.device=cuda:2"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner=incontext"], "model=incontext"),
        (["model=incontext"], "learner=incontext"),
        (["task=sinusoid"], "model=mlp"),
        (["model=mlp"], "model=transformer"),
        (["model.d_model=10", "model.n_heads=4"], "10"),
        (["model.stem=pach"], "pach"),
        (["inner.lr=-1"], "-1"),
        (["learner=reptile", "inner=metasgd"], "learns rates"),
        (["learner=imaml", "adjoint=implicit", "inner.learn_lr=true"], "learns rates"),
        (["task=sinusoid", "model=mlp", "learner=protonet"], "protonet classifies"),
        (["model=convnet"], "learner.adapt=null adapts all"),
        (["learner.adapt=[trunk]"], "there are stem, transformer, head"),
        (["learner=unicorn_maml", "learner.adapt=[transformer]"], "add 'head'"),
    ],
)
def test_what_cannot_work_together_is_refused_before_any_work(compose_config, overrides, words):
    with pytest.raises(UserError, match=words):
        build.build_learner(compose_config(*overrides))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task=digits", "task.ways=9"], "9 ways"),
        (["task=digits", "task.shots=1000"], "1000 shots"),
        (["task=omniglot", "task.root=nowhere"], r"nowhere.*task\.root=.*THERIA_OMNIGLOT"),
    ],
)
def test_what_the_data_cannot_give_is_refused_in_its_words(compose_config, overrides, words):
    with pytest.raises(UserError, match=words):
        build.build_sources(compose_config(*overrides))


def test_a_configuration_survives_its_checkpoint(compose_config):
    config = compose_config("experiment=linear_regression_incontext", "adjoint=mixed_mode", "trainer.resume=here")
    assert store.from_container(store.container(config)) == config
    assert config.adjoint.kind is AdjointKind.mixed_mode


def test_the_seed_decides_the_parameters(compose_config):
    def parameters(seed: int) -> torch.Tensor:
        learner = build.build_learner(compose_config("task=sinusoid", "model=mlp", "learner=maml", f"seed={seed}"))
        return torch.nn.utils.parameters_to_vector(learner.parameters())

    assert torch.equal(parameters(1), parameters(1))
    assert not torch.equal(parameters(1), parameters(2))


def test_the_classifier_can_start_at_its_own_rate(compose_config):
    base = ["inner=metasgd", "inner.lr=0.1"]
    rates = {
        name: set(rate.flatten().tolist())
        for name, rate in build.build_learner(compose_config(*base, "inner.head_lr=2")).named_parameters()
        if name.startswith("rates.lr.")
    }
    assert rates.pop("rates.lr.head/weight") == rates.pop("rates.lr.head/bias") == {2.0}
    assert set().union(*rates.values()) == {torch.tensor(0.1).item()}
    with pytest.raises(UserError, match=r"inner\.learn_lr=true"):
        build.build_learner(compose_config("inner=sgd", "inner.head_lr=2"))


def test_the_subsets_share_no_task(compose_config):
    sources = build.build_sources(compose_config("task=sinusoid", "model=mlp", "task.tasks=20"))
    targets = [source.sample(0).query_y for source in sources.values()]
    assert not torch.equal(targets[0], targets[1])
    assert not torch.equal(targets[1], targets[2])


def test_a_fault_is_aimed_at_a_task_that_there_is(compose_config):
    assert "at most 2" in refused(compose_config, "task.tasks=3", "debug.nan_step=0", "debug.nan_task=3")
    build.check(compose_config("task.tasks=3", "debug.nan_step=0", "debug.nan_task=2"))


def test_the_largest_seed_works(compose_config):
    bound = 2**63 // build.SEED_STRIDE - 1
    for seed in (-bound, bound):
        config = compose_config("task=sinusoid", "model=mlp", "learner=maml", f"seed={seed}")
        build.check(config)
        build.build_learner(config)
        assert build.build_source(config, "test", tasks=2).sample(0).query_y.isfinite().all()
