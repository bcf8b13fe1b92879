"""The schema of `python -m experiments.bilevel`. The values that a run uses are in `configs/`."""

from dataclasses import dataclass, field
from enum import Enum

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ProblemConfig:
    """What every problem has. `name` is the option's name."""

    name: str = MISSING


@dataclass
class HyperCleaningConfig(ProblemConfig):
    """scikit-learn's digits with wrong labels: a weight for every training sample, learned on clean samples."""

    name: str = "hyper_cleaning"
    train: int = 900  # training samples
    validation: int = 300  # clean samples that the weights are learned on; the rest is the test set
    corrupted: float = 0.5  # share of the training labels that is replaced by another class
    penalty: float = 1e-3  # c of the inner loss: mean weight * cross-entropy + c |W|^2
    start: float = 0.0  # every weight is the sigmoid of this at first


@dataclass
class RidgeConfig(ProblemConfig):
    """scikit-learn's diabetes data: the penalty of ridge regression, one for all features or one for each."""

    name: str = "ridge_hyperparameter"
    train: int = 200  # training samples
    validation: int = 120  # samples that the penalty is learned on; the rest is the test set
    start: float = 0.0  # the logarithm of every penalty at first
    grid: int = 201  # points of the grid search that the single penalty is compared with
    grid_from: float = -8.0  # logarithm of the least penalty of the grid
    grid_to: float = 4.0  # and of the largest


class MethodKind(Enum):
    """How the hypergradient is computed."""

    aid = "aid"
    itd = "itd"


@dataclass
class MethodConfig:
    """The inner optimisation and its derivative."""

    kind: MethodKind = MethodKind.aid  # aid: implicit, with warm starts; itd: through the inner steps
    inner_steps: int = 20  # inner steps an evaluation, from where the last one ended (itd: from the start)
    inner_rate: float | None = None  # null: 1 / (largest eigenvalue of the inner Hessian), bounded by the problem
    momentum: float = 0.9  # Nesterov's, of the inner steps
    rtol: float = 1e-3  # aid: relative tolerance of the linear solve
    max_iterations: int = 50  # aid: its bound; what is reached by then is used


class OuterKind(Enum):
    """The outer optimiser."""

    adam = "adam"
    lbfgs = "lbfgs"


@dataclass
class OuterConfig:
    """The outer optimisation."""

    kind: OuterKind = OuterKind.adam
    steps: int = 200  # steps; of lbfgs evaluations
    lr: float = 0.1  # rate of adam


@dataclass
class BilevelConfig:
    """One run."""

    problem: ProblemConfig = MISSING
    method: MethodConfig = field(default_factory=MethodConfig)
    outer: OuterConfig = field(default_factory=OuterConfig)
    name: str = MISSING  # the folder under outputs/
    seed: int = 0  # of the split and of the wrong labels
    threads: int | None = None  # torch's CPU threads; null: torch's choice
    log_every: int = 10  # evaluations between lines of metrics.jsonl
    run_dir: str = MISSING  # where everything of the run is written


def register() -> None:
    """Put the schemas into Hydra's store."""
    store = ConfigStore.instance()
    store.store(name="bilevel_schema", node=BilevelConfig)
    for schema in (HyperCleaningConfig, RidgeConfig):
        store.store(group="schema/problem", name=schema.name, node=schema)
