"""The schema of every configuration: one dataclass a group option, registered with Hydra so that names and types
are checked before any work starts. The values that a run uses are in `configs/`; a field's meaning is here."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from experiments.config_learner import AdjointConfig, InnerConfig, LearnerConfig, OpsConfig


# ---------------------------------------------------------------------------------------------------------------- task
@dataclass
class TaskConfig:
    """What every family of tasks has. `name` is the option's name."""

    name: str = MISSING
    tasks: int = 4  # tasks in one outer step
    queries: int = 5  # query examples: a class for classification, a task for regression


@dataclass
class AugmentConfig:
    """Random deformation of each training image (`theria.data.Augment`): bounds of uniform draws, lengths as shares of
    the side. All zero: none."""

    rotation: float = 0.0  # largest angle in radians, either way
    scale: float = 0.0  # each axis by a factor from 1 / (1 + scale) to 1 + scale
    shear: float = 0.0  # largest slant, either way
    shift: float = 0.0  # largest shift along each axis, either way
    elastic: float = 0.0  # largest displacement of a control point of the smooth field; folds above 0.48 / elastic_grid
    elastic_grid: int = 4  # cells of that field along a side
    stroke: float = 0.0  # the most that a stroke gains or loses on each side; at 28 pixels 0.036 is one pixel


@dataclass
class FewShotConfig(TaskConfig):
    """Few-shot classification."""

    ways: int = 5  # classes in a task
    shots: int = 1  # support examples a class
    within_groups: float = 0.0  # probability that a task's classes come from one group (script, alphabet, digit)
    eval_within_groups: float | None = None  # the same in validation and test; null: as in training
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # of the training tasks only


@dataclass
class GlyphsConfig(FewShotConfig):
    """Characters rendered from matplotlib's typefaces; test classes come from scripts never trained on."""

    name: str = "glyphs"


@dataclass
class DigitsConfig(FewShotConfig):
    """scikit-learn's handwritten digits, rotations as classes."""

    name: str = "digits"


@dataclass
class OmniglotConfig(FewShotConfig):
    """Omniglot's handwritten characters."""

    name: str = "omniglot"
    root: str | None = None  # folder of the data set; null: $THERIA_OMNIGLOT, else theria.data's own place for it
    split: str = "vinyals"  # vinyals | background | small1 | small2
    train_on: str = "train"  # train | trainval: the validation classes too, for a final run; then trainer.val_every=0
    symmetries: bool = False  # training classes turned by quarters and mirrored are classes of training, too: 8x
    size: int = 28  # side of the images in pixels, at most 105
    download: bool = False  # fetch the data set into `root` when it is not there (needs torchvision and a network)


@dataclass
class SinusoidConfig(TaskConfig):
    """Regression on y = a sin(x - phase)."""

    name: str = "sinusoid"
    shots: int = 10  # support points


@dataclass
class LinearRegressionConfig(TaskConfig):
    """Regression on y = w.x with w and x standard normal."""

    name: str = "linear_regression"
    shots: int = 10  # support points
    dim: int = 5  # length of x
    noise: float = 0.0  # standard deviation added to y


# --------------------------------------------------------------------------------------------------------------- model
@dataclass
class ModelConfig:
    """What every network has. `name` is the option's name."""

    name: str = MISSING


@dataclass
class TransformerConfig(ModelConfig):
    """Image classifier: a stem that makes tokens, a pre-norm transformer, a linear head."""

    name: str = "transformer"
    stem: str = "conv"  # "patch": one linear map a patch; "conv": two convolutions; "residual": three residual blocks
    patch: int = 7  # side of a patch in pixels; it divides 28
    d_model: int = 48  # width
    n_heads: int = 4  # attention heads; d_model is a multiple of it
    n_layers: int = 2  # blocks
    d_ff: int | None = None  # width of the feed-forward part; null: 4 * d_model
    pool: str = "mean"  # "mean" of the tokens, or "cls": a learned token that reads the others


@dataclass
class ConvNetConfig(ModelConfig):
    """The four-layer convolutional network of the MAML paper."""

    name: str = "convnet"
    width: int = 64  # channels of each layer


@dataclass
class ResidualConfig(ModelConfig):
    """A residual network of four blocks: 3.5 M parameters at width 64, 0.9 M at 32, 0.2 M at 16."""

    name: str = "residual"
    width: int = 64  # channels of the first block; the others have 2, 4 and 6 times as many
    norm: str = "group"  # "group": each image by itself; "batch": by the statistics of the images it comes with
    downsample: str = "max_pool"  # "max_pool", as ResNet-12, or "stride", with a quarter of the operations


@dataclass
class PrototypeTransformerConfig(ResidualConfig):
    """Attention on class prototypes of a residual network: for learner=incontext. The first settings are of that."""

    name: str = "prototype_transformer"
    d_model: int = 256  # width of the transformer
    n_heads: int = 4  # attention heads; d_model is a multiple of it
    n_layers: int = 2  # blocks; 0: prototypes alone
    d_ff: int | None = None  # width of the feed-forward part; null: 4 * d_model
    similarity: str = "euclidean"  # "euclidean": negative squared distance; "cosine"
    scale: float | None = None  # of the logits at the start, learned; null: 1 for euclidean, 10 for cosine


@dataclass
class MLPConfig(ModelConfig):
    """Fully connected network for regression; input and output widths come from the task."""

    name: str = "mlp"
    hidden: list[int] = field(default_factory=lambda: [40, 40])  # widths of the hidden layers


@dataclass
class InContextConfig(ModelConfig):
    """A transformer that reads the support set; classifier or regressor by the task."""

    name: str = "incontext"
    stem: str = "conv"  # images only: "conv", "patch" or "residual"
    patch: int = 7  # images only: side of a patch in pixels
    d_model: int = 64  # width
    n_heads: int = 4  # attention heads; d_model is a multiple of it
    n_layers: int = 3  # blocks
    d_ff: int | None = None  # width of the feed-forward part; null: 4 * d_model
    readout: str = "head"  # images only: "head", a linear map, or "prototypes": products with the classes' mean tokens
    causal: bool = False  # regression only: learn from every length of the context at once


# ------------------------------------------------------------------------------------------------------------- trainer
class Schedule(Enum):
    """The outer rate over the steps, after the warm-up."""

    constant = "constant"
    cosine = "cosine"


class Display(Enum):
    """How progress is shown."""

    auto = "auto"
    bar = "bar"
    plain = "plain"
    off = "off"


class Precision(Enum):
    """What the outer step computes in. Parameters, their gradients and the optimiser are float32, evaluation too."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class TrainerConfig:
    """The outer loop. Everything that decides the parameters is counted in steps, so that a resumed run is exact."""

    steps: int = 1000  # outer steps
    max_minutes: float | None = None  # stop training earlier after this wall-clock time (summed over resumed parts)
    lr: float = 1e-3  # outer rate of Adam
    schedule: Schedule = Schedule.cosine  # cosine: down to zero at `steps`
    warmup: int = 0  # steps of linear warm-up
    weight_decay: float = 0.0  # decoupled (AdamW)
    clip: float | None = None  # largest norm of the meta-gradient; null: no clipping
    device: str = "auto"  # auto: cuda where there is one | cpu | cuda | cuda:1
    threads: int | None = None  # torch's CPU threads; null: torch's choice
    precision: Precision = Precision.float32  # bfloat16: matrix products and attention of the outer step (autocast)
    compile: bool = False  # compile the outer step: a minute or a few before the first one, then fewer, larger kernels
    capture: bool | str = False  # record the outer step as a CUDA graph: true | false | auto, on CUDA where it can be
    log_every: int = 10  # steps between metric lines
    health_every: int = 0  # steps between the panels, at a step that is logged: gradients, curvature, ...; 0: never
    health_share: float = 0.05  # of the run's time that the panels may take, beyond a few seconds
    val_every: int = 250  # steps between validations; 0: never
    val_episodes: int = 100  # episodes of a validation
    test_episodes: int = 600  # episodes of the final evaluation; 600 or more for a figure worth reporting
    test_augment: int = 1  # final evaluation: copies of a task, all but one deformed by task.augment, that are averaged
    protocols: list[str] = field(default_factory=list)  # further final evaluations: one_shot (see ProtocolKind)
    eval_tasks: int = 20  # tasks evaluated at once
    checkpoint_every: int = 100  # steps between checkpoints; the last two are kept
    checkpoint_minutes: float | None = None  # most minutes of wall clock without one; null: steps alone decide
    keep: int | None = None  # keep those at its multiples for good, a multiple of checkpoint_every; null: none of them
    ema: float | None = None  # decay of an average of the parameters, evaluated in their place; null: none
    process_timeout: float = 600.0  # under torchrun: seconds that a process waits for another before the run ends
    resume: bool | str = False  # true: from the newest checkpoint of run_dir | a checkpoint file or run directory
    pictures: bool = True  # draw the learning curve and an episode
    display: Display = Display.auto  # auto: a live bar on a terminal, plain lines elsewhere


# ------------------------------------------------------------------------------------------------------ tracking, debug
class TrackingMode(Enum):
    """Where scalars go besides metrics.jsonl."""

    off = "off"
    offline = "offline"
    online = "online"


@dataclass
class TrackingConfig:
    """Weights & Biases. metrics.jsonl is written whatever stands here."""

    mode: TrackingMode = TrackingMode.offline  # offline: a folder for `wandb sync`; online: the server as well
    project: str = "theria"  # project on the server
    entity: str | None = None  # team or user on the server; null: the key's default
    tags: list[str] = field(default_factory=list)  # labels of the run
    timeout: float = 20.0  # seconds to wait for the server before going on offline


@dataclass
class DebugConfig:
    """Faults and shortcuts for tests of the trainer itself."""

    nan_step: int | None = None  # put a NaN into this step's episode
    nan_task: int = 0  # and into this task of it
    repeat_episode: bool = False  # train on one episode for ever: the loss must go to zero
    step_seconds: float = 0.0  # sleep in every step, so that a signal can be aimed


@dataclass
class Config:
    """One run."""

    task: TaskConfig = MISSING
    model: ModelConfig = MISSING
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    adjoint: AdjointConfig = field(default_factory=AdjointConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    name: str = MISSING  # the folder under outputs/ and the group of the tracker
    seed: int = 0  # of the parameters and of the tasks
    run_dir: str = MISSING  # where everything of the run is written


class ProtocolKind(Enum):
    """What is evaluated."""

    episodes = "episodes"  # random tasks of a subset of the classes
    one_shot = "one_shot"  # Omniglot's official test: 20 runs of within-alphabet 20-way 1-shot


@dataclass
class EvaluateConfig:
    """`python -m experiments.evaluate`."""

    checkpoint: str = MISSING  # a checkpoint file, or a run directory (its newest good checkpoint)
    protocol: ProtocolKind = ProtocolKind.episodes  # episodes | one_shot, for runs that never saw its alphabets
    episodes: int | None = None  # null: 600; that many or more for a figure worth reporting
    subset: str | None = None  # train | val | test; null: test
    seed: int | None = None  # of the episodes; null, with tasks=null: those of the run's own final evaluation
    ways: int | None = None  # classes in a task, for learners whose head is not fixed; null: as in the run
    shots: int | None = None  # support examples a class; null: as in the run
    distinct_characters: bool = False  # of Omniglot: no two classes of a task are turns of one character
    test_augment: int = 1  # copies of a task, all but one deformed as in the run's training, that are averaged
    inner_steps: int | None = None  # steps of adaptation; null: as in the run
    tasks: int | None = None  # evaluated at once; decides which tasks are drawn; null: trainer.eval_tasks of the run
    device: str = "auto"  # auto: cuda where there is one | cpu | cuda
    root: str | None = None  # folder of Omniglot where it is not that of the run; null: as in the run
    run_dir: str = MISSING  # where evaluation_<tasks>.json is written; the run's own folder is one
