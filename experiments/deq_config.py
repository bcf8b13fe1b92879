"""The schema of `python -m experiments.deq`. The values that a run uses are in `configs/`."""

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class NetworkConfig:
    """What the networks share: the 8 rows of pixels as tokens, a core, the mean of its tokens, a linear classifier."""

    d_model: int = 32  # width
    n_heads: int = 4  # attention heads; d_model is a multiple of it
    d_ff: int = 64  # width of the feed-forward part
    layers: list[int] = field(default_factory=lambda: [1, 3])  # blocks of the transformers compared with; 1: as large
    tol: float = 1e-3  # of the equilibrium and of its derivative's linear system, in training
    max_iter: int = 60  # its bound


@dataclass
class TrainingConfig:
    """Adam on the cross-entropy of the same batches for every network."""

    samples: int = 1297  # of 1,797; the others are the test set
    steps: int = 500
    batch: int = 32
    lr: float = 3e-3  # half a cosine down to zero at `steps`
    weight_decay: float = 0.01  # decoupled (AdamW)
    clip: float = 1.0  # largest norm of the gradient
    contraction: float = 12.0  # weight of the penalty that keeps the equilibrium's block a contraction


@dataclass
class GradientConfig:
    """The derivative of the equilibrium beside backpropagation through steps, in float64."""

    batch: int = 64
    tol: float = 1e-10  # of the equilibrium and of its derivative's linear system
    max_iter: int = 300  # its bound
    unrolled: list[int] = field(default_factory=lambda: [3, 10, 30, 100])  # numbers of steps
    repeats: int = 3  # times are medians of as many


@dataclass
class DeqConfig:
    """One run."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    gradient: GradientConfig = field(default_factory=GradientConfig)
    name: str = "deq"  # the folder under outputs/
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # of split, parameters and batches, a training each
    threads: int | None = None  # torch's CPU threads; null: torch's choice
    log_every: int = 50  # steps between lines of metrics.jsonl
    run_dir: str = MISSING  # where everything of the run is written


def register() -> None:
    """Put the schema into Hydra's store."""
    ConfigStore.instance().store(name="deq_schema", node=DeqConfig)
