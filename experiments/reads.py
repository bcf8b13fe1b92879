"""Which settings a run reads. A setting that its options do not read is refused where it differs from its default, and
decides nothing where an older run goes on."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from experiments.config import Config, FewShotConfig
from experiments.config_learner import AdjointConfig, AdjointKind, InnerConfig, InnerKind, LearnerKind
from experiments.errors import UserError
from experiments.store import TASKS


@dataclass(frozen=True)
class Rule:
    """Only with one of these values of `selector` are these settings read."""

    selector: str
    values: tuple[Any, ...]
    settings: tuple[str, ...]

    def reads(self, config: Config) -> bool:
        return _value(config, self.selector) in (*self.values, None)  # None: there is no such setting to decide


def _but(kinds: Iterable[LearnerKind], *others: LearnerKind) -> tuple[LearnerKind, ...]:
    return tuple(kind for kind in kinds if kind not in others)


def _every(group: str, schema: type) -> tuple[str, ...]:
    return tuple(f"{group}.{field.name}" for field in fields(schema))


_L, _A = LearnerKind, AdjointKind
_STEPS = _but(_L, _L.protonet, _L.r2d2, _L.incontext)
_IMAGES = tuple(name for name, schema in TASKS.items() if issubclass(schema, FewShotConfig))
_NUMBERS = tuple(name for name in TASKS if name not in _IMAGES)

# Whole groups first: what a message is about. A setting that no rule names is read by every option that has it.
RULES = (
    Rule("learner.kind", _STEPS, _every("inner", InnerConfig)),
    Rule("learner.kind", _but(_STEPS, _L.reptile), _every("adjoint", AdjointConfig)),
    Rule("learner.kind", _but(_STEPS, _L.reptile, _L.cavia), ("learner.adapt",)),
    Rule("learner.kind", _but(_L, _L.incontext), ("learner.chunk_size",)),
    Rule("learner.kind", (_L.imaml,), ("learner.strength", "learner.tol")),
    Rule("learner.kind", (_L.cavia,), ("learner.n_context",)),
    Rule("learner.kind", (_L.r2d2,), ("learner.ridge",)),
    Rule(
        "learner.kind",
        (_L.maml_plus_plus,),
        ("learner.epoch_steps", "learner.multi_step_epochs", "learner.first_order_epochs"),
    ),
    Rule("learner.kind", _but(_STEPS, _L.maml_plus_plus), ("inner.learn_lr",)),  # it learns one a tensor and step
    Rule("learner.kind", (_L.maml, _L.metasgd, _L.proto_maml, _L.unicorn_maml), ("inner.head_lr",)),
    Rule("inner.kind", (InnerKind.sgd,), ("inner.momentum", "inner.nesterov")),
    Rule("adjoint.kind", (_A.unrolled, _A.mixed_mode), ("adjoint.checkpoint_every",)),
    Rule("adjoint.kind", (_A.truncated,), ("adjoint.steps",)),
    Rule("adjoint.kind", (_A.implicit,), ("adjoint.solver", "adjoint.iterations")),
    Rule("adjoint.kind", (_A.identity,), ("adjoint.scale",)),
    Rule("task.name", _IMAGES, ("model.stem", "model.patch", "model.readout")),
    Rule("task.name", _NUMBERS, ("model.causal",)),
    Rule("model.stem", ("patch",), ("model.patch",)),
)


def unread(config: Config) -> set[str]:
    """The settings that decide nothing in a run of this configuration."""
    return {setting for rule in RULES if not rule.reads(config) for setting in rule.settings}


def check(config: Config) -> None:
    """Refuse a setting that the run would not read.

    Raises:
        UserError: with the option that does not read it, those that do, and what to give.
    """
    for rule in RULES:
        if not rule.reads(config) and (given := [key for key in rule.settings if _differs(config, key)]):
            raise UserError(_message(config, rule, given))


def _message(config: Config, rule: Rule, given: list[str]) -> str:
    option, (it, do) = _name(rule.selector), ("it", "does") if len(given) == 1 else ("them", "do")
    return (
        f"{', '.join(_written(key, _value(config, key)) for key in given)}: "
        f"{_written(rule.selector, _value(config, rule.selector))} does not read {it}, "
        f"{option}={' | '.join(map(_text, rule.values))} {do}: "
        f"give {' '.join(_written(key, _default(config, key)) for key in given)}, or another {option}"
    )


def _differs(config: Config, key: str) -> bool:
    return _value(config, key) != _default(config, key)


def _value(config: Config, key: str) -> Any:
    """None where the option of the group has no such setting."""
    group, name = key.split(".")
    return getattr(getattr(config, group), name, None)


def _default(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(type(getattr(config, group))(), name, None)


def _name(key: str) -> str:
    """The setting as it is given: `learner.kind` is chosen as an option of the group, `learner=...`."""
    group, name = key.split(".")
    return group if name in ("kind", "name") else key


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    return str(value) if isinstance(value, str) else json.dumps(value)  # null, true: as YAML has them


def _written(key: str, value: Any) -> str:
    return f"{_name(key)}={_text(value)}"
