"""A setting that the chosen options do not read is refused, and no recipe or committed command has one."""

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
from torch import nn

from experiments import build, learners, reads, resume, store
from experiments.config import Config
from experiments.config_learner import AdjointConfig, AdjointKind, InnerConfig, InnerKind, LearnerConfig, LearnerKind
from experiments.errors import UserError
from theria.meta import MixedMode
from theria.nn import TransformerClassifier

CONFIGS = Path(store.CONFIG_DIR)
COMMAND = "python -m experiments.train "
RECIPES = [path.read_text().splitlines()[1] for path in sorted((CONFIGS / "experiment").glob("*.yaml"))]
RECORDS = [json.loads(path.read_text()) for path in sorted(CONFIGS.parent.glob("docs/benchmarks/**/results.json"))]
COMMANDS = [line.removeprefix("# ") for line in RECIPES] + [record.get("command", "") for record in RECORDS]
LEARNERS = sorted(path.stem for path in (CONFIGS / "learner").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["inner=adam", "inner.momentum=0.9"],
            "inner.momentum=0.9: inner=adam does not read it, inner=sgd does: "
            "give inner.momentum=0.0, or another inner",
        ),
        (
            ["adjoint=implicit", "adjoint.steps=9", "adjoint.scale=4"],
            "adjoint.steps=9: adjoint=implicit does not read it, adjoint=truncated does: "
            "give adjoint.steps=1, or another adjoint",
        ),
        (["adjoint=implicit", "adjoint.scale=4"], "adjoint.scale=4.0: adjoint=implicit does not read it"),
        (["adjoint=truncated", "adjoint.solver=minres"], "adjoint.solver=minres: adjoint=truncated"),
        (["adjoint=first_order", "adjoint.checkpoint_every=2"], "adjoint=unrolled | mixed_mode does"),
        (
            ["learner=maml", "learner.ridge=5"],
            "learner.ridge=5.0: learner=maml does not read it, learner=r2d2 does: "
            "give learner.ridge=1.0, or another learner",
        ),
        (["learner=protonet", "inner.steps=7"], "inner.steps=7: learner=protonet does not read it, learner=maml | "),
        (
            ["learner=protonet", "inner=metasgd"],
            "inner.lr=0.05, inner.learn_lr=true, inner.head_lr=1.0: learner=protonet does not read them",
        ),
        (["learner=r2d2", "adjoint=mixed_mode"], "give adjoint=unrolled, or another learner"),
        (["learner=reptile", "adjoint=implicit"], "adjoint=implicit: learner=reptile does not read it"),
        (["learner=maml_plus_plus", "inner.learn_lr=true"], "inner.learn_lr=true: learner=maml_plus_plus"),
        (["learner=cavia", "inner.learn_lr=true", "inner.head_lr=1"], "inner.head_lr=1.0: learner=cavia"),
        (["learner=cavia", "learner.adapt=[head]"], 'learner.adapt=["head"]: learner=cavia does not read it'),
        (["learner=incontext", "model=incontext", "learner.adapt=[head]"], "learner=incontext does not read it"),
        (["learner=incontext", "model=incontext", "learner.chunk_size=2"], "learner.chunk_size=2: learner=incontext"),
        (["learner=incontext", "model=incontext", "model.causal=true"], "task=sinusoid | linear_regression does"),
        (["task=sinusoid", "learner=incontext", "model=incontext", "model.readout=prototypes"], "task=sinusoid does"),
        (["model.patch=14"], "model.patch=14: model.stem=conv does not read it, model.stem=patch does"),
    ],
)
def test_what_an_option_does_not_read_is_refused(compose_config, overrides, message):
    with pytest.raises(UserError) as caught:
        build.check(compose_config(*overrides))
    assert message in str(caught.value)


def test_mixed_mode_takes_its_steps_again_in_pieces(compose_config):
    config = compose_config("adjoint=mixed_mode", "adjoint.checkpoint_every=3")
    build.check(config)
    learner = build.build_learner(config)
    assert isinstance(learner, learners.base.GradientLearner)
    assert learner.adjoint == MixedMode(checkpoint_every=3)


@pytest.mark.parametrize("command", sorted({text for text in COMMANDS if text.startswith(COMMAND)}))
def test_a_recipe_or_committed_command_has_no_such_setting(compose_config, command):
    build.check(compose_config(*shlex.split(command.removeprefix(COMMAND))))


@pytest.mark.parametrize("option", LEARNERS)
def test_a_learner_needs_no_more_than_its_name(compose_config, option):
    build.check(compose_config(f"learner={option}"))


def test_every_setting_of_the_table_exists(compose_config):
    known = {
        f"{group}.{name}" for group, values in store.defaults({}).items() if isinstance(values, dict) for name in values
    }
    known |= {f"model.{field.name}" for schema in store.MODELS.values() for field in fields(schema)} | {"task.name"}
    assert {name for rule in reads.RULES for name in (rule.selector, *rule.settings)} <= known


# ------------------------------------------------------------------------------------------- the table and the builders
ELSEWHERE = {"learner.epoch_steps", "inner.eval_steps"}  # read in every outer step, and in every evaluation


class Recorded:
    """Settings that remember which of them were read."""

    def __init__(self, of: Any, group: str, seen: set[str]) -> None:
        self.of, self.group, self.seen = of, group, seen

    def __getattr__(self, name: str) -> Any:
        self.seen.add(f"{self.group}.{name}")
        return getattr(self.of, name)


def all_settings(config: Config) -> set[str]:
    groups = ("learner", "inner", "adjoint")
    return {f"{group}.{field.name}" for group in groups for field in fields(getattr(config, group))}


def configured(learner: LearnerKind, inner: InnerKind, adjoint: AdjointKind) -> Config:
    groups = LearnerConfig(kind=learner), InnerConfig(kind=inner), AdjointConfig(kind=adjoint)
    return Config(store.TASKS["digits"](), store.MODELS["transformer"](), *groups)


CASES = [
    *((kind, InnerKind.sgd, AdjointKind.unrolled) for kind in LearnerKind if kind is not LearnerKind.incontext),
    *((LearnerKind.maml, kind, AdjointKind.unrolled) for kind in InnerKind),
    *((LearnerKind.imaml, InnerKind.sgd, kind) for kind in AdjointKind),
]


@pytest.mark.parametrize("kinds", CASES, ids=lambda kinds: "-".join(kind.value for kind in kinds))
def test_what_is_not_refused_is_read(kinds):
    config, seen = configured(*kinds), set[str]()
    learner, inner, adjoint = (
        cast(Any, Recorded(getattr(config, name), name, seen)) for name in ("learner", "inner", "adjoint")
    )
    model = TransformerClassifier(3, d_model=8, n_heads=2, n_layers=1, patch=14)
    learners.build(learner, inner, adjoint, model, nn.functional.cross_entropy, 3)
    assert all_settings(config) - reads.unread(config) <= seen | ELSEWHERE


def test_learning_in_context_reads_nothing_else_of_a_learner():
    config = configured(LearnerKind.incontext, InnerKind.sgd, AdjointKind.unrolled)
    assert all_settings(config) - reads.unread(config) == {"learner.kind"}


# ----------------------------------------------------------------------------------------------------------- resumption
def test_a_run_goes_on_whatever_its_checkpoint_has_of_settings_that_it_does_not_read(compose_config):
    """As older versions wrote them: of learners without inner steps those of inner=metasgd."""
    config = compose_config("learner=protonet")
    before = store.container(compose_config("learner=protonet", "inner=metasgd", "adjoint=implicit", "adjoint.scale=4"))
    resume.check_same(config, before, Path("step.pt"))
    before["learner"]["kind"] = "r2d2"
    with pytest.raises(UserError, match=r"learner\.kind: r2d2 in the checkpoint, protonet now"):
        resume.check_same(config, before, Path("step.pt"))


def test_a_setting_that_is_read_has_to_be_that_of_the_checkpoint(compose_config):
    config = compose_config("inner=adam")
    before = store.container(config)
    before["inner"]["momentum"] = 0.9
    resume.check_same(config, before, Path("step.pt"))
    before["inner"]["lr"] = 0.5
    with pytest.raises(UserError, match=r"inner\.lr: 0\.5 in the checkpoint"):
        resume.check_same(config, before, Path("step.pt"))
