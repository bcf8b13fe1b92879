"""Hydra's store of schemas, and the way from its configuration to dataclasses and back."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from experiments.config import (
    Config,
    ConvNetConfig,
    DigitsConfig,
    EvaluateConfig,
    GlyphsConfig,
    InContextConfig,
    LinearRegressionConfig,
    MLPConfig,
    OmniglotConfig,
    PrototypeTransformerConfig,
    ResidualConfig,
    SinusoidConfig,
    TransformerConfig,
)
from experiments.errors import UserError, unknown_setting

CONFIG_DIR = str(Path(__file__).resolve().parent.parent / "configs")
TASKS = {
    schema.name: schema
    for schema in (GlyphsConfig, DigitsConfig, OmniglotConfig, SinusoidConfig, LinearRegressionConfig)
}
MODELS = {
    schema.name: schema
    for schema in (
        TransformerConfig,
        ConvNetConfig,
        ResidualConfig,
        PrototypeTransformerConfig,
        MLPConfig,
        InContextConfig,
    )
}


def register() -> None:
    """Put every schema into Hydra's store; the YAML files of `configs/` name them in their defaults lists."""
    store = ConfigStore.instance()
    _prefer_files(store)
    store.store(name="schema", node=Config)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    for group, schemas in {"task": TASKS, "model": MODELS}.items():
        for name, schema in schemas.items():
            store.store(group=f"schema/{group}", name=name, node=schema)


def _prefer_files(store: ConfigStore) -> None:
    """Take the options of Hydra's plugins that `configs/hydra` has as well out of the store: else Hydra would refuse a
    file as one that it has to check against an option of the same name."""
    Plugins.instance()  # imports the plugins, which fill the store
    for path in Path(CONFIG_DIR, "hydra").glob("*/*.yaml"):
        store.repo.get("hydra", {}).get(path.parent.name, {}).pop(path.name, None)


def to_object(cfg: DictConfig) -> Any:
    """The composed configuration as its dataclasses.

    Raises:
        UserError: for a name that `+name=value` added and no schema has; Hydra refuses the same without the plus.
    """
    _check_names(cfg, "")
    return OmegaConf.to_object(cfg)


def container(config: Config) -> dict[str, Any]:
    """The configuration as plain JSON values, enumerations by their names."""
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)  # pyright: ignore


def defaults(values: dict[str, Any]) -> dict[str, Any]:
    """What the schema gives to each setting for the task and the network that plain values name, "???" where it must
    be given."""
    schema = OmegaConf.structured(Config)
    for group, schemas in (("task", TASKS), ("model", MODELS)):
        name = values.get(group, {}).get("name")
        if name in schemas:
            schema[group] = schemas[name]
    return OmegaConf.to_container(schema, enum_to_str=True)  # pyright: ignore[reportReturnType]


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """Plain values with the schema's default for each setting that they lack."""
    return _filled(defaults(values), values)


def from_container(values: dict[str, Any]) -> Config:
    """The inverse of `container`: the run's own configuration, from its checkpoint.

    Raises:
        UserError: the checkpoint is of a version whose settings this one does not have.
    """
    try:
        schema = OmegaConf.structured(Config)
        schema.task = TASKS[values["task"]["name"]]
        schema.model = MODELS[values["model"]["name"]]
        return OmegaConf.to_object(OmegaConf.merge(schema, values))  # pyright: ignore[reportReturnType]
    except Exception as error:
        raise UserError(f"the checkpoint's configuration does not fit this version: {error}") from error


def _filled(given: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    both = {key: _filled(given[key], value) for key, value in values.items() if _is_group(given.get(key), value)}
    return {**given, **values, **both}


def _is_group(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _check_names(node: DictConfig, prefix: str) -> None:
    schema = OmegaConf.get_type(node)
    known = [f"{prefix}{item.name}" for item in fields(schema)]  # pyright: ignore[reportArgumentType]
    for name in map(str, node):
        if f"{prefix}{name}" not in known:
            raise UserError(unknown_setting(f"{prefix}{name}", known))
        if not OmegaConf.is_missing(node, name) and isinstance(node[name], DictConfig):
            _check_names(node[name], f"{prefix}{name}.")
