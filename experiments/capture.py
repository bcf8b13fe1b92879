"""How an outer step runs: `trainer.capture`, `trainer.compile` and `trainer.precision`, decided before the first."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from experiments.config import Precision, TrainerConfig
from experiments.errors import UserError
from experiments.learners import Learner
from theria import meta
from theria.data import Episode
from theria.meta.capture import CapturedStep
from theria.meta.distributed import Processes, count_tasks
from theria.meta.imaml import IMAML
from theria.meta.implicit_adjoint import Implicit
from theria.meta.maml_plus_plus import MAMLPlusPlus

OuterStep = Callable[[Episode], Tensor]  # the loss of all tasks, detached, with its gradient in `.grad`
AUTOCAST = {Precision.float32: None, Precision.bfloat16: torch.bfloat16}


def outer_step(
    trainer: TrainerConfig,
    learner: Learner,
    parameters: Sequence[nn.Parameter],
    ranks: Processes,
    say: Callable[[str], None],
) -> OuterStep:
    """The outer step: of this process's tasks as the trainer's settings say, then summed over the processes.

    Raises:
        UserError: a setting of True for what cannot be recorded or compiled; by a step, when that fails.
    """
    record = _recorded(trainer.capture, learner, parameters[0].device.type == "cuda", say)
    if trainer.compile and (reason := obstacle(learner) or _changes(learner)):
        raise UserError(f"trainer.compile=true: {reason}; give trainer.compile=false")
    step = CapturedStep(
        learner, parameters, record=record, compile=trainer.compile, autocast=AUTOCAST[trainer.precision]
    )
    own = _explained(step) if record or trainer.compile else step

    def run(episode: Episode) -> Tensor:
        tasks, loss, grads = count_tasks(episode), None, [None] * len(parameters)
        if ranks.share(tasks):
            loss = own(ranks.part(episode))
            grads = [p.grad for p in parameters]
        loss, grads = ranks.combine(loss, grads, parameters, tasks)
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        return loss

    return run


def _recorded(wanted: bool | str, learner: Learner, cuda: bool, say: Callable[[str], None]) -> bool:
    """Whether steps are recorded: as told, or for "auto" on a CUDA device what can be recorded."""
    if wanted is False or (wanted == "auto" and not cuda):
        return False
    reason = obstacle(learner)
    if reason and wanted is True:
        raise UserError(f"trainer.capture=true: {reason}; give trainer.capture=false")
    if reason:
        say(f"trainer.capture=auto: steps are not recorded as a CUDA graph, because {reason}")
        return False
    if not cuda:
        say("trainer.capture=true: nothing is recorded without a CUDA device; every step runs as it is")
    return True


def obstacle(learner: Learner) -> str | None:
    """Why steps of this learner cannot be one graph; None where nothing is known against it."""
    adjoint = getattr(learner, "adjoint", None)
    if isinstance(adjoint, Implicit) and adjoint.throw:
        return "adjoint=implicit looks at the residuals of its solver (with adjoint.iterations=5 it would not)"
    if isinstance(learner, IMAML) and learner.tol is not None and not isinstance(adjoint, Implicit):
        return "learner.tol looks at the inner gradient in each step (learner.tol=null does not)"
    if isinstance(adjoint, meta.Higher):
        return "adjoint=higher was never recorded"
    return None


def _changes(learner: Learner) -> str | None:
    """Why a step would be compiled again and again, for minutes each time. To record it anew takes seconds."""
    return "learner=maml_plus_plus changes its step with the epoch" if isinstance(learner, MAMLPlusPlus) else None


def _explained(step: CapturedStep) -> OuterStep:
    def run(episode: Episode) -> Tensor:
        try:
            return step(episode)
        except (RuntimeError, ArithmeticError, ValueError) as error:
            for setting, words in (("capture", "CUDA graph"), ("compile", "compile=False")):
                if words in str(error):
                    raise UserError(f"{error}\nIn this trainer: trainer.{setting}=false") from error
            raise

    return run
