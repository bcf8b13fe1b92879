"""The schema of how a task is learnt: learner, inner optimiser, adjoint, attention. Part of `experiments.config`.

Which option reads which setting is in `experiments.reads`: one that it does not read is refused."""

from dataclasses import dataclass
from enum import Enum


class LearnerKind(Enum):
    """How a task is learnt."""

    maml = "maml"
    metasgd = "metasgd"
    maml_plus_plus = "maml_plus_plus"
    imaml = "imaml"
    reptile = "reptile"
    cavia = "cavia"
    protonet = "protonet"
    proto_maml = "proto_maml"
    unicorn_maml = "unicorn_maml"
    r2d2 = "r2d2"
    incontext = "incontext"


class AdjointKind(Enum):
    """How the inner solution is differentiated."""

    unrolled = "unrolled"
    mixed_mode = "mixed_mode"
    first_order = "first_order"
    truncated = "truncated"
    implicit = "implicit"
    identity = "identity"
    higher = "higher"


class SolverKind(Enum):
    """How an implicit adjoint solves with the Hessian."""

    cg = "cg"
    minres = "minres"


class InnerKind(Enum):
    """What an inner step is."""

    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"
    rmsprop = "rmsprop"


class Backend(Enum):
    """Backends of theria.ops.sdpa."""

    auto = "auto"
    reference = "reference"
    custom = "custom"
    triton = "triton"


@dataclass
class LearnerConfig:
    """The algorithm that learns to learn."""

    kind: LearnerKind = LearnerKind.maml  # maml: gradient steps on the support set; incontext: read it in one pass
    adapt: list[str] | None = None  # maml and its kin: modules or parameters that the inner steps move; null: all
    chunk_size: int | None = None  # tasks under one vmap; null: all of them
    strength: float = 2.0  # imaml: weight of the proximal term
    tol: float | None = 1.0  # imaml: the inner gradient after the steps, at most, as a share; null: do not look
    n_context: int = 20  # cavia: length of the context
    ridge: float = 1.0  # r2d2: where the learned regularisation begins
    epoch_steps: int = 500  # maml_plus_plus: outer steps in an epoch
    multi_step_epochs: int = 15  # maml_plus_plus: epochs until only the last inner step's loss counts
    first_order_epochs: int = 50  # maml_plus_plus: epochs of the first-order gradient


@dataclass
class InnerConfig:
    """The optimiser of the support loss. Momentum is that of sgd."""

    kind: InnerKind = InnerKind.sgd  # what a step is
    lr: float = 0.1  # rate; the starting value where it is learned
    momentum: float = 0.0  # 0: none
    nesterov: bool = False  # Nesterov's form of momentum
    learn_lr: bool = False  # one learned rate a parameter entry (Meta-SGD)
    head_lr: float | None = None  # with learn_lr: another starting value for the classifier; null: lr
    steps: int = 1  # steps while training
    eval_steps: int | None = None  # steps while evaluating; null: as many as in training

    @property
    def evaluated_steps(self) -> int:
        """Steps while evaluating."""
        return self.steps if self.eval_steps is None else self.eval_steps


@dataclass
class AdjointConfig:
    """How to differentiate through the inner steps."""

    kind: AdjointKind = AdjointKind.unrolled  # the gradients of unrolled, mixed_mode and higher are equal
    checkpoint_every: int | None = None  # unrolled, mixed_mode: steps that are taken again together; null: stored
    steps: int = 1  # truncated: the last inner steps that are differentiated
    solver: SolverKind = SolverKind.cg  # implicit: cg refuses negative curvature, minres takes it
    iterations: int | None = None  # implicit: of the solver, and what they give is taken; null: to its tolerance
    scale: float = 0.1  # identity: of the inverse Hessian, near the inner rate


@dataclass
class OpsConfig:
    """The attention operator."""

    backend: Backend = Backend.auto  # a named backend never becomes another one
    matmul_precision: str = "highest"  # float32 matrix products on CUDA: highest | high | medium
