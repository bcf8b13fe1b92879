"""Is the meta-gradient sound, and does its second-order part matter?"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.learners import Learner, attributes, takes_steps
from theria import meta
from theria.data import Episode
from theria.meta.distributed import ALONE, Processes
from theria.meta.implicit_adjoint import Implicit
from theria.meta.maml_plus_plus import MAMLPlusPlus
from theria.meta.reptile import Reptile
from theria.meta.solvers import SolverError


def nonfinite_count(learner: nn.Module) -> int:
    """Entries of the gradient that are NaN or infinite."""
    return sum(int((~p.grad.isfinite()).sum()) for p in learner.parameters() if p.grad is not None)


def inner_rates(learner: nn.Module) -> tuple[float, float] | None:
    """Mean and least of the learned inner rates; None where none are learned."""
    rates = [p.detach().flatten() for name, p in learner.named_parameters() if name.startswith("rates.")]
    return (float(torch.cat(rates).mean()), float(torch.cat(rates).min())) if rates else None


def layer_rates(learner: nn.Module) -> dict[str, float]:
    """The mean learned inner rate of each layer, by the layer's name; {} without any."""
    layers: dict[str, list[Tensor]] = {}
    for name, rate in learner.named_parameters():
        if name.startswith("rates."):
            path = name.split(".", 2)[2].split("/")  # rates.<kind>.<parameter, "/" for its dots>
            layers.setdefault(".".join(path[:-1]) or path[0], []).append(rate.detach().flatten())
    return {layer: float(torch.cat(rates).mean()) for layer, rates in layers.items()}


class BadTask(NamedTuple):
    """A task whose own loss or gradient is not finite.

    Attributes:
        task: its number.
        reason: what its solver says, if it is the solver that failed; "" where nothing says why.
    """

    task: int
    reason: str = ""


def bad_task(learner: Learner, episode: Episode) -> BadTask | None:
    """The first one; None when only the sum of the tasks is not finite."""
    adjoint = getattr(learner, "adjoint", None)
    loud = {"adjoint": replace(adjoint, throw=True)} if isinstance(adjoint, Implicit) else {}
    with attributes(learner, **loud):
        for index in range(episode.query_y.shape[0]):
            try:
                loss = learner(Episode(*(field[index : index + 1] for field in episode)))
                grads = torch.autograd.grad(loss, _trainable(learner), allow_unused=True)
            except SolverError as error:
                return BadTask(index, error.reason)
            if not all(bool(value.isfinite().all()) for value in [loss, *grads] if value is not None):
                return BadTask(index)
    return None


def meta_gradients(learner: Learner, episode: Episode, processes: Processes = ALONE) -> tuple[Tensor, Tensor] | None:
    """(P,) the full meta-gradient of an episode, and what is left when the inner gradients are taken as constants.

    None for learners without inner steps, and for Reptile, which differentiates none. MAML++ is taken as it is after
    its first-order epochs. Every `.grad` stays as it is. All processes call it, each with all tasks.

    Raises:
        RuntimeError: in every process when one of them fails, so that none waits for it; alone, the error itself.
    """
    if not takes_steps(learner) or isinstance(learner, Reptile):
        return None
    own = learner.adjoint
    adjoints = (meta.Unrolled() if isinstance(own, meta.FirstOrder) else own, meta.FirstOrder())
    weight = len(processes.share(len(episode.query_y))) / len(episode.query_y)
    both, failure = [torch.cat([torch.zeros_like(p).flatten() for p in _trainable(learner)])] * 2, None
    try:
        if weight:
            both = [weight * _gradient(learner, processes.part(episode), adjoint) for adjoint in adjoints]
    except Exception as error:
        failure = error
        if processes.size == 1:
            raise
    if processes.most([float(failure is not None)])[0]:
        raise RuntimeError(f"a process could not compute it: {failure or 'another one'}") from failure
    full, first = processes.sum(both)
    return full, first


def rounding(learner: Learner, episode: Episode, dtype: torch.dtype) -> float | None:
    """|h - g| / |g| of the meta-gradient g and the one in the mixed precision of `dtype`, h; None where g is 0."""
    exact = _trainable_gradient(learner, episode)
    mixed = _trainable_gradient(learner, episode, dtype)
    return share(exact, mixed)


def second_order_share(learner: Learner, episode: Episode, processes: Processes = ALONE) -> float | None:
    """`share` of the meta-gradients of an episode; None where `meta_gradients` is."""
    pair = meta_gradients(learner, episode, processes)
    return None if pair is None else share(*pair)


def share(full: Tensor, first: Tensor) -> float | None:
    """|g - g1| / |g| of the full meta-gradient g and the first-order one g1; None where g is 0."""
    norm = float(full.norm())
    return float((full - first).norm()) / norm if norm > 0 else None


def cosine(full: Tensor, first: Tensor) -> float | None:
    """<g, g1> / (|g| |g1|): 1 where first order turns the update nowhere; None where one of them is 0."""
    norms = float(full.norm()) * float(first.norm())
    return float(full @ first) / norms if norms > 0 else None


def _gradient(learner: Learner, episode: Episode, adjoint: Any) -> Tensor:
    """The meta-gradient of an episode as one vector, by this adjoint."""
    changes = {"first_order_epochs": 0} if isinstance(learner, MAMLPlusPlus) else {}  # in them it uses another adjoint
    with attributes(learner, adjoint=adjoint, **changes):
        return _trainable_gradient(learner, episode)


def _trainable_gradient(learner: Learner, episode: Episode, autocast: torch.dtype | None = None) -> Tensor:
    """The meta-gradient of an episode as one vector, of a loss computed in this mixed precision."""
    parameters = _trainable(learner)
    kind = parameters[0].device.type
    with torch.autocast(kind, autocast or torch.bfloat16, enabled=autocast is not None, cache_enabled=False):
        loss = learner(episode)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def _trainable(learner: nn.Module) -> list[Tensor]:
    return [p for p in learner.parameters() if p.requires_grad]
