"""From a configuration to the objects of theria. Whatever cannot work together is refused here, before any work."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import learners, protocols, reads
from experiments.config import (
    Config,
    ConvNetConfig,
    DigitsConfig,
    FewShotConfig,
    GlyphsConfig,
    InContextConfig,
    LinearRegressionConfig,
    MLPConfig,
    OmniglotConfig,
    PrototypeTransformerConfig,
    ResidualConfig,
    SinusoidConfig,
    TaskConfig,
    TransformerConfig,
)
from experiments.config_learner import LearnerKind
from experiments.errors import UserError, nearest
from experiments.evaluation import Copies
from experiments.learners import InContextLearner, InContextNetwork, Learner
from theria import data
from theria import nn as networks
from theria.data import ClassDataset, TaskSource
from theria.ops.checks import check_backend

SUBSETS = ("train", "val", "test")
# Tasks of the three subsets are drawn from streams that never meet.
SEED_STRIDE = 1_000_003


# Least values; what theria itself checks is left to it.
LEAST = {
    "task.tasks": 1,
    "inner.steps": 1,
    "inner.eval_steps": 0,
    "learner.chunk_size": 1,
    "learner.epoch_steps": 1,
    "trainer.steps": 1,
    "trainer.max_minutes": 0,
    "trainer.lr": 0,
    "trainer.warmup": 0,
    "trainer.weight_decay": 0,
    "trainer.threads": 1,
    "trainer.log_every": 1,
    "trainer.health_every": 0,
    "trainer.health_share": 0,
    "trainer.val_every": 0,
    "trainer.val_episodes": 1,
    "trainer.test_episodes": 1,
    "trainer.test_augment": 1,
    "trainer.eval_tasks": 1,
    "trainer.checkpoint_every": 1,
    "trainer.checkpoint_minutes": 0,
    "trainer.keep": 1,
    "trainer.ema": 0,
    "trainer.process_timeout": 1,
    "tracking.timeout": 0,
    "debug.nan_task": 0,
    "debug.step_seconds": 0,
}
# What has to be above 0, or null, and what null means then.
POSITIVE = {"inner.head_lr": "inner.lr", "trainer.clip": "no clipping"}
FINITE = ("trainer.lr", "trainer.weight_decay", "inner.lr", "inner.head_lr", "debug.step_seconds")
IMAGE_MODELS = ("transformer", "convnet", "residual", "incontext", "prototype_transformer")
PRECISIONS = ("highest", "high", "medium")


def check(config: Config) -> None:
    """Refuse values outside their range, and settings that would not be read.

    Raises:
        UserError: with the value and what is needed.
        UnsupportedError: a backend that cannot compute on the device.
    """
    for key, least in LEAST.items():
        value = _value(config, key)
        if value is not None and not value >= least:  # `not >=`, so that NaN is refused too
            raise UserError(f"{key}={value}: needed is at least {least}")
    for key in FINITE:
        value = _value(config, key)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{key}={value}: needed is a finite number")
    for key, otherwise in POSITIVE.items():
        value = _value(config, key)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value}: needed is a positive number, or null for {otherwise}")
    reads.check(config)
    check_seed(config.seed)
    debug, tasks = config.debug, config.task.tasks
    if debug.nan_step is not None and debug.nan_task >= tasks:
        raise UserError(
            f"debug.nan_task={debug.nan_task}: needed is at most {tasks - 1}, the last of task.tasks={tasks}"
        )
    protocols.check(config)
    build_copies(config, config.trainer.test_augment)
    if config.trainer.capture not in (True, False, "auto"):
        raise UserError(f"trainer.capture={config.trainer.capture}: needed is auto, true or false")
    every, keep, ema = config.trainer.checkpoint_every, config.trainer.keep, config.trainer.ema
    if keep is not None and keep % every:
        raise UserError(f"trainer.keep={keep}: needed is a multiple of trainer.checkpoint_every={every}, or null")
    if ema is not None and ema >= 1:
        raise UserError(f"trainer.ema={ema}: needed is a decay below 1, such as 0.999, or null for no average")
    precision = config.ops.matmul_precision
    if precision not in PRECISIONS:
        raise UserError(f"ops.matmul_precision={precision}: {nearest(precision, PRECISIONS)}")
    backend, where = config.ops.backend.value, device(config)
    if backend != "auto" and hasattr(config.model, "n_heads"):  # before there is a directory that a second try meets
        check_backend(backend, x := torch.empty(1, 1, 1, 16, device=where), x, None)


def check_seed(seed: int | None) -> None:
    """Refuse a seed whose streams have no room in a generator's 63 bits; None is no seed.

    Raises:
        UserError: with the range.
    """
    bound = 2**63 // SEED_STRIDE - 1
    if seed is not None and not -bound <= seed <= bound:
        raise UserError(f"seed={seed}: needed is a number from {-bound} to {bound}")


def chance(task: TaskConfig) -> str:
    """What guessing reaches, to be put behind a figure."""
    return f"; chance {100 / task.ways:.1f} %" if isinstance(task, FewShotConfig) else ""


def is_classification(task: TaskConfig) -> bool:
    return isinstance(task, FewShotConfig)


def loss_fn(task: TaskConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy for classes, mean squared error for real targets."""
    return F.cross_entropy if is_classification(task) else F.mse_loss


def build_source(
    config: Config, subset: str, *, tasks: int, seed: int | None = None, distinct_characters: bool = False
) -> TaskSource:
    """The tasks of a subset, `tasks` at a time; with `distinct_characters` none holds two turns of one character.

    Raises:
        UserError: what theria.data refuses (too many ways, a missing folder, ...), in its words; distinct characters
            of another task than Omniglot.
    """
    task = config.task
    if subset not in SUBSETS:
        raise UserError(f"subset={subset}: needed is one of {', '.join(SUBSETS)}")
    if distinct_characters and not isinstance(task, OmniglotConfig):
        raise UserError(f"distinct_characters=true: task={task.name} is not task=omniglot: needed is false")
    seed = (config.seed if seed is None else seed) * SEED_STRIDE + SUBSETS.index(subset)
    common: dict[str, Any] = {"tasks": tasks, "queries": task.queries, "seed": seed, "device": device(config)}
    try:
        match task:
            case FewShotConfig():
                dataset = build_dataset(task, subset)
                options = {"ways": task.ways, "shots": task.shots, "within_groups": task.within_groups}
                augment = build_augment(task) if subset == "train" else None
                if subset != "train" and task.eval_within_groups is not None:
                    options["within_groups"] = task.eval_within_groups
                options["distinct_origins"] = distinct_characters
                return data.EpisodeSampler(dataset, augment=augment, **options, **common)
            case SinusoidConfig():
                return data.Sinusoid(shots=task.shots, **common)
            case LinearRegressionConfig():
                return data.LinearRegression(dim=task.dim, shots=task.shots, noise=task.noise, **common)
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"task={task.name}: {error}") from error
    raise TypeError(f"no builder for {type(task).__name__}")


def build_sources(config: Config) -> dict[str, TaskSource]:
    """The tasks of training, validation and test."""
    tasks = {"train": config.task.tasks, "val": config.trainer.eval_tasks, "test": config.trainer.eval_tasks}
    sources: dict[str, TaskSource] = {subset: build_source(config, subset, tasks=tasks[subset]) for subset in SUBSETS}
    if protocols.ONE_SHOT in config.trainer.protocols:
        sources[protocols.ONE_SHOT] = build_one_shot(config)
    return sources


def build_one_shot(config: Config) -> protocols.FixedTasks:
    """The runs of Omniglot's official one-shot test.

    Raises:
        UserError: another task, a split that has seen the test, or a missing file.
    """
    task = protocols.check_one_shot(config.task)
    try:
        return protocols.FixedTasks(data.omniglot_one_shot_runs(task.root, size=task.size).to(device(config)))
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"task={task.name}: {error}") from error


def build_augment(task: FewShotConfig) -> data.Augment:
    """How training images are deformed; the identity where no bound is above zero.

    Raises:
        UserError: a bound outside its range.
    """
    try:
        return data.Augment(**asdict(task.augment))
    except ValueError as error:
        raise UserError(f"task.augment: {error}") from error


def build_copies(config: Config, number: int, seed: int | None = None) -> Copies | None:
    """What to average over with `number` copies of each held-out task, deformed like training tasks; None for one.

    Raises:
        UserError: more than one, where there is nothing to average or nothing that deforms.
    """
    if number == 1:
        return None
    if not isinstance(config.task, FewShotConfig):
        raise UserError(f"test_augment={number}: task={config.task.name} has no images to deform: needed is 1")
    augment = build_augment(config.task)
    if augment.is_identity:
        raise UserError(f"test_augment={number}: every bound of the run's task.augment is 0: needed is 1")
    seed = (config.seed if seed is None else seed) * SEED_STRIDE + len(SUBSETS)
    return Copies(augment, number, seed, isinstance(config.task, OmniglotConfig) and config.task.symmetries)


def build_dataset(task: FewShotConfig, subset: str) -> ClassDataset:
    match task:
        case GlyphsConfig():
            return data.load_glyphs(subset)
        case DigitsConfig():
            return data.load_digits(subset)
        case OmniglotConfig():
            more = task.symmetries and subset == "train"
            chosen = task.train_on if subset == "train" else subset
            options = {"size": task.size, "download": task.download, "rotations": False if more else None}
            loaded = data.load_omniglot(task.root, task.split, chosen, **options)
            return loaded.with_symmetries() if more else loaded
    raise TypeError(f"no data set for {type(task).__name__}")


def build_model(config: Config) -> nn.Module:
    """The network, its input and output sizes taken from the task."""
    model, task, backend = config.model, config.task, config.ops.backend.value
    images = isinstance(task, FewShotConfig)
    # The images of other tasks are of 28 pixels, the networks' default.
    sizes: dict[str, Any] = {"image_size": task.size} if isinstance(task, OmniglotConfig) else {}
    match model:
        case TransformerConfig() if images:
            return networks.TransformerClassifier(task.ways, **_arguments(model), **sizes, backend=backend)
        case ConvNetConfig() if images:
            return networks.ConvNet4(task.ways, width=model.width, **sizes)
        case PrototypeTransformerConfig() if images:
            return _prototype_transformer(model, task.ways, backend)
        case ResidualConfig() if images:
            return networks.residual_net(task.ways, **_arguments(model))
        case MLPConfig() if not images:
            return networks.MLP([_x_dim(task), *model.hidden, 1])
        case InContextConfig() if images:
            return networks.InContextClassifier(task.ways, **_arguments(model, "causal"), **sizes, backend=backend)
        case InContextConfig():
            arguments = _arguments(model, "stem", "patch", "readout")
            return networks.InContextRegressor(_x_dim(task), **arguments, backend=backend)
    fitting = IMAGE_MODELS if images else ("mlp", "incontext")
    raise UserError(f"model={model.name} cannot learn task={task.name}: needed is model={', model='.join(fitting)}")


def _prototype_transformer(model: PrototypeTransformerConfig, ways: int, backend: str) -> networks.PrototypeTransformer:
    convolutions = {name: getattr(model, name) for name in ("width", "norm", "downsample")}
    embedding = networks.residual_net(**convolutions)
    arguments = _arguments(model, *convolutions)
    return networks.PrototypeTransformer(embedding, embedding.width, ways, **arguments, backend=backend)


def build_learner(config: Config) -> Learner:
    """The learner on its device, parameters drawn from `config.seed`."""
    kind, in_context = config.learner.kind, isinstance(config.model, InContextConfig | PrototypeTransformerConfig)
    if (kind is LearnerKind.incontext) != in_context:
        raise UserError(
            f"learner={kind.value} cannot train model={config.model.name}: learner=incontext belongs together "
            "with model=incontext or model=prototype_transformer"
        )
    torch.manual_seed(config.seed)
    try:
        model = build_model(config)
        if isinstance(model, InContextNetwork):
            learner = InContextLearner(model, loss_fn(config.task))
        else:
            ways = config.task.ways if isinstance(config.task, FewShotConfig) else None
            learner = learners.build(config.learner, config.inner, config.adjoint, model, loss_fn(config.task), ways)
    except (ValueError, ImportError) as error:
        hint = "; learner.adapt=null adapts all parameters" if str(error).startswith("adapt=") else ""
        raise UserError(f"{error}{hint}") from error
    learner = learner.to(device(config))
    if protocols.ONE_SHOT in config.trainer.protocols:
        for_ways(config, learner.state_dict(), protocols.WAYS)  # raises now what it would raise after the training
    return learner


def for_ways(config: Config, state: dict[str, Any], ways: int) -> Learner:
    """A learner of tasks of `ways` classes with the state of one that was trained with `config`.

    Raises:
        UserError: parameters that depend on the number of classes.
    """
    other = deepcopy(config)
    assert isinstance(other.task, FewShotConfig)
    other.task.ways, other.trainer.protocols = ways, []
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # `build_learner` seeds the generators
        learner = build_learner(other)
    shapes = {name: getattr(value, "shape", None) for name, value in learner.state_dict().items()}
    differ = [name for name, value in state.items() if shapes.get(name) != getattr(value, "shape", None)]
    if differ or shapes.keys() != state.keys():
        raise UserError(
            f"a task of {ways} ways for learner={config.learner.kind.value}, model={config.model.name} trained with "
            f"task.ways={config.task.ways}: {', '.join(differ[:2]) or 'its state'} depends on the number of classes: "  # pyright: ignore
            f"train with task.ways={ways}, or a learner that does not care (unicorn_maml, proto_maml, protonet, r2d2)"
        )
    learner.load_state_dict(state)
    return learner


def device(config: Config) -> torch.device:
    return device_named(config.trainer.device, "trainer.device")


def device_named(name: str, key: str) -> torch.device:
    """The device that the setting `key` names.

    Raises:
        UserError: one that there is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(name)
        known = chosen.type in ("cpu", "cuda")
    except RuntimeError:
        chosen, known = torch.device("cpu"), False
    if not known:
        raise UserError(f"{key}={name}: needed is auto, cpu, cuda or cuda:<number>")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}={name}: torch finds no CUDA here; give {key}=cpu")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{key}={name}: needed is a number below {torch.cuda.device_count()}, the GPUs here")
    return chosen


def _arguments(model: Any, *without: str) -> dict[str, Any]:
    return {f.name: getattr(model, f.name) for f in fields(model) if f.name not in ("name", *without)}


def _value(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def _x_dim(task: TaskConfig) -> int:
    return task.dim if isinstance(task, LinearRegressionConfig) else 1
