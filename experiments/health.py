"""Is the meta-gradient sound, and does its second-order part matter?"""

from typing import Any

import torch
from torch import Tensor, nn

from experiments.learners import Learner, attributes, takes_steps
from theria import meta
from theria.data import Episode
from theria.meta.distributed import ALONE, Processes


def nonfinite_count(learner: nn.Module) -> int:
    """Entries of the gradient that are NaN or infinite."""
    return sum(int((~p.grad.isfinite()).sum()) for p in learner.parameters() if p.grad is not None)


def inner_rates(learner: nn.Module) -> tuple[float, float] | None:
    """Mean and least of the learned inner rates; None where none are learned."""
    rates = [p.detach().flatten() for name, p in learner.named_parameters() if name.startswith("rates.")]
    return (float(torch.cat(rates).mean()), float(torch.cat(rates).min())) if rates else None


def bad_task(learner: Learner, episode: Episode) -> int | None:
    """The first task whose own loss or gradient is not finite; None when only their sum is not."""
    for index in range(episode.query_y.shape[0]):
        loss = learner(Episode(*(field[index : index + 1] for field in episode)))
        grads = torch.autograd.grad(loss, _trainable(learner), allow_unused=True)
        if not all(bool(value.isfinite().all()) for value in [loss, *grads] if value is not None):
            return index
    return None


def second_order_share(learner: Learner, episode: Episode, processes: Processes = ALONE) -> float | None:
    """|g - g1| / |g|: g the full meta-gradient of the episode, g1 what is left when the inner gradients are taken as
    constants. None for learners without inner steps, and where g is 0. All processes call it, each with all tasks."""
    if not takes_steps(learner):
        return None
    own = learner.adjoint
    full = _gradient(learner, episode, meta.Unrolled() if isinstance(own, meta.FirstOrder) else own, processes)
    first = _gradient(learner, episode, meta.FirstOrder(), processes)
    norm = float(full.norm())
    return float((full - first).norm()) / norm if norm > 0 else None


def _gradient(learner: Learner, episode: Episode, adjoint: Any, processes: Processes) -> Tensor:
    """The meta-gradient as one vector; leaves every `.grad` as it is."""
    with attributes(learner, adjoint=adjoint):
        parameters = _trainable(learner)
        _, grads = processes.gradient(learner, episode, parameters)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def _trainable(learner: nn.Module) -> list[Tensor]:
    return [p for p in learner.parameters() if p.requires_grad]
