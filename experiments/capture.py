"""Whether the outer step is recorded as a CUDA graph (`trainer.capture`), decided before the first step and said."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from experiments.errors import UserError
from experiments.learners import Learner
from theria import meta
from theria.data import Episode
from theria.meta.capture import CapturedStep
from theria.meta.distributed import Processes
from theria.meta.imaml import IMAML
from theria.meta.implicit_adjoint import Implicit
from theria.meta.maml_plus_plus import MAMLPlusPlus

OuterStep = Callable[[Episode], Tensor]  # the loss, detached, with its gradient in `.grad`, which was None before


def outer_step(
    wanted: bool | str,
    learner: Learner,
    parameters: Sequence[nn.Parameter],
    ranks: Processes,
    say: Callable[[str], None],
) -> OuterStep:
    """The outer step by `trainer.capture`: True, False, or "auto", which records on a CUDA device what can be recorded.

    Raises:
        UserError: True for what cannot be recorded; by a step, when recording it fails.
    """
    plain: OuterStep = lambda episode: ranks.backward(learner, episode, parameters)  # noqa: E731
    cuda = parameters[0].device.type == "cuda"
    if wanted is False or (wanted == "auto" and not cuda):
        return plain
    reason = obstacle(learner, ranks)
    if reason and wanted is True:
        raise UserError(f"trainer.capture=true: {reason}; give trainer.capture=false")
    if reason:
        say(f"trainer.capture=auto: steps are not recorded as a CUDA graph, because {reason}")
        return plain
    if not cuda:
        say(f"trainer.capture=true: nothing is recorded on {parameters[0].device.type}; every step runs as it is")
    return _recorded(CapturedStep(learner, parameters))


def obstacle(learner: Learner, ranks: Processes) -> str | None:
    """Why steps of this learner cannot be one graph; None where nothing is known against it."""
    adjoint = getattr(learner, "adjoint", None)
    if ranks.size > 1:
        return f"{ranks.size} processes talk to each other in each step"
    if isinstance(learner, MAMLPlusPlus):
        return "learner=maml_plus_plus changes its step with the epoch"
    if isinstance(adjoint, Implicit):
        return "adjoint=implicit looks at the residuals of its solver"
    if isinstance(learner, IMAML) and learner.tol is not None:
        return "learner.tol looks at the inner gradient in each step"
    if isinstance(adjoint, meta.Higher):
        return "adjoint=higher was never recorded"
    return None


def _recorded(step: CapturedStep) -> OuterStep:
    def run(episode: Episode) -> Tensor:
        try:
            return step(episode)
        except RuntimeError as error:
            if "CUDA graph" in str(error):
                raise UserError(f"{error}\nGive trainer.capture=false to run the steps without recording") from error
            raise

    return run
